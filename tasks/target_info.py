"""What ``probe`` tells of a target."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: The total of a board that measures none, as the agent calls it.
SUM_OF_RAILS = "sum_of_rails"


class _Facts(BaseModel):
    """Newer agents may tell more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CpuInfo(_Facts):
    model: str
    architecture: str
    instruction_sets: tuple[str, ...]
    int8_instruction_sets: tuple[str, ...] = Field(
        description="Those that multiply int8 and add in one step (VNNI, AMX, dot product)."
    )


class GpuInfo(_Facts):
    name: str | None
    compute_capability: str
    multiprocessors: int


class EngineInfo(_Facts):
    """An engine on the target, or the reason why it is not there."""

    available: bool
    version: str | None = None
    reason: str = ""
    #: ONNX Runtime's.
    providers: tuple[str, ...] = ()
    max_opset: int | None = None
    #: TensorRT's. ``double`` is a stand-in that tests use; it builds nothing.
    double: bool = False
    precisions: tuple[str, ...] = ()
    tactic_sources: tuple[str, ...] = ()
    weakly_typed: bool = False
    gpu: GpuInfo | None = None
    dla_cores: int | None = None


class PowerInfo(_Facts):
    """What measures power there. ``total`` is a rail, sum_of_rails, gpu, or None where nothing does."""

    rails: tuple[str, ...] = ()
    #: Those that the total is, or is the sum of.
    counted_rails: tuple[str, ...] = ()
    total: str | None = None
    tegrastats: bool = False

    @property
    def words(self) -> str:
        """For people, who must not take a sum for a measured total."""
        if self.total != SUM_OF_RAILS:
            return f"{', '.join(self.rails) or 'the graphics card'}; of the whole: {self.total}"
        words = f"no rail of the whole; {SUM_OF_RAILS} is {' + '.join(self.counted_rails)}"
        left_out = ", ".join(rail for rail in self.rails if rail not in self.counted_rails)
        return (
            f"{words}; {left_out} left out, as another of them feeds it (not verified)" if left_out else words
        )


class MemoryInfo(_Facts):
    total: float | None
    available: float | None
    swap_free: float | None = None


class TargetInfo(_Facts):
    """What ``probe`` found. Memory and disk are in MiB; what could not be read is None."""

    schema_version: int
    simulated: bool = Field(default=False, description="Not a real machine: its kernel's files are made up.")
    hostname: str
    os: str
    kernel: str
    python: str
    board: str | None
    l4t: str | None
    module: str | None = Field(default=None, description="The Jetson module on the board, by part number.")
    jetpack: str | None = Field(default=None, description="The JetPack that brought its Jetson Linux.")
    power_modes: tuple[str, ...] = Field(default=(), description="Those of nvpmodel, by name.")
    power: PowerInfo | None = None
    power_problem: str | None = Field(
        default=None, description="Why the asked power mode or locked clocks cannot be set there."
    )
    trtexec: str | None = Field(default=None, description="Where NVIDIA's trtexec is.")
    power_mode: str | None = Field(default=None, description="The one that is set.")
    boot_id: str
    cpu: CpuInfo
    cores: int
    memory_mib: MemoryInfo
    free_disk_mib: float
    frequencies_mhz: dict[str, Any]
    accelerators: dict[str, str]
    holders: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="The job that holds each engine's accelerator."
    )
    engines: dict[str, EngineInfo]

    @property
    def is_simulated(self) -> bool:
        """Whether anything that it measures is made up."""
        return self.simulated or any(engine.double for engine in self.engines.values())

    @property
    def machine(self) -> str:
        """The board or the CPU, with what it has for int8, and the GPU where there is one."""
        gpu = next((engine.gpu for engine in self.engines.values() if engine.gpu), None)
        int8 = ", ".join(self.cpu.int8_instruction_sets) or "no int8 instructions"
        parts = [self.cpu.architecture, f"{self.cores} cores", int8]
        if gpu is not None:
            named = [gpu.name] if gpu.name and gpu.name != self.board else []
            parts += [*named, f"compute capability {gpu.compute_capability}"]
        simulated = "SIMULATED " if self.is_simulated else ""
        return f"{simulated}{self.board or self.cpu.model} ({', '.join(parts)})"
