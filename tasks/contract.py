"""What a board with its JetPack and its TensorRT can do, known before anything is built on it.

What the probe says of a target comes before these tables, which fill in the rest. Each row says where it comes from;
"not verified" stands where no document of NVIDIA's or probe of a real device was at hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jetway.configs.schema import EngineName, Precision
from jetway.tasks.target_info import TargetInfo

Version = tuple[int, ...]

_PARSER_DOCS = "docs/operators.md of onnx-tensorrt"
_OPSET_GUIDE = "NVIDIA's ONNX opset guide"
_NOT_VERIFIED = "not verified"


@dataclass(frozen=True)
class ParserLimit:
    """The newest operator set that TensorRT's ONNX parser takes, from a version on."""

    since: Version
    max_opset: int
    source: str


PARSER_LIMITS = (
    ParserLimit((8, 0), 13, f"{_PARSER_DOCS} 8.0"),
    ParserLimit((8, 2), 13, f"{_PARSER_DOCS} 8.2"),
    ParserLimit((8, 4), 17, f"{_NOT_VERIFIED}: as 8.5"),
    ParserLimit((8, 5), 17, f"{_PARSER_DOCS} 8.5"),
    ParserLimit((8, 6), 17, f"{_PARSER_DOCS} 8.6"),
    ParserLimit((9, 2), 19, f"{_PARSER_DOCS} 9.2"),
    ParserLimit((10, 0), 20, f"{_NOT_VERIFIED}: general knowledge"),
    ParserLimit((10, 6), 22, f"{_NOT_VERIFIED}: its changelog names ONNX 1.17"),
    ParserLimit((10, 15), 24, f"{_PARSER_DOCS} 10.15"),
    ParserLimit((11, 0), 25, f"{_OPSET_GUIDE} for 11.x"),
)


@dataclass(frozen=True)
class JetPack:
    """A JetPack release and what it brings. ``l4t`` is the first Jetson Linux release that it stands for."""

    name: str
    l4t: Version
    python: str
    tensorrt: str
    cuda: str
    source: str = f"{_NOT_VERIFIED}: general knowledge"


JETPACKS = (
    JetPack("4.6", (32, 6), "3.6", "8.0.1", "10.2"),
    JetPack("4.6.1 to 4.6.6", (32, 7), "3.6", "8.2.1", "10.2"),
    JetPack("5.0.2", (35, 1), "3.8", "8.4.1", "11.4"),
    JetPack("5.1", (35, 2), "3.8", "8.5.2", "11.4"),
    JetPack("6.0", (36, 3), "3.10", "8.6.2", "12.2"),
    JetPack("6.1, 6.2", (36, 4), "3.10", "10.3.0", "12.6"),
    JetPack("7.0, 7.1", (38, 2), "3.12", "10.13", "13.0"),
    JetPack("7.2", (39, 2), "3.12", "10.16", "13.2"),
)


_BOARD_SOURCE = f"rails: lines of real tegrastats; power modes: {_NOT_VERIFIED}, nvpmodel -p lists them"


@dataclass(frozen=True)
class Board:
    """A board by the name in its device tree. ``total_rail`` is the rail that the whole module draws from."""

    name: str
    pattern: str
    compute_capability: Version
    dla_cores: int
    rails: tuple[str, ...]
    total_rail: str | None
    power_modes: tuple[str, ...]
    source: str = _BOARD_SOURCE


_NX_RAILS = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
BOARDS = (
    Board(
        "Jetson Nano", r"Jetson Nano", (5, 3), 0,
        ("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"), "POM_5V_IN", ("MAXN", "5W"),
    ),
    Board(
        "Jetson TX2", r"TX2|quill", (6, 2), 0,
        (), None, ("MAXN", "MAXQ", "MAXP_CORE_ALL"), _NOT_VERIFIED,
    ),
    Board(
        "Jetson Xavier NX", r"Xavier NX", (7, 2), 2,
        _NX_RAILS, "VDD_IN", ("MODE_10W_2CORE", "MODE_15W_2CORE", "MODE_15W_4CORE", "MODE_15W_6CORE"),
    ),
    Board(
        "Jetson AGX Xavier", r"AGX Xavier|Jetson-AGX", (7, 2), 2,
        ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), None, ("MAXN", "MODE_10W", "MODE_15W", "MODE_30W_ALL"),
    ),
    Board(
        "Jetson AGX Orin", r"AGX Orin", (8, 7), 2,
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"), None,
        ("MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
        f"{_BOARD_SOURCE}; that VIN_SYS_5V0 feeds VDDQ_VDD2_1V8AO, which no sum counts: {_NOT_VERIFIED}",
    ),
    Board("Jetson Orin NX", r"Orin NX", (8, 7), 2, _NX_RAILS, "VDD_IN", ("MAXN", "10W", "15W", "25W")),
    Board("Jetson Orin Nano", r"Orin Nano", (8, 7), 0, _NX_RAILS, "VDD_IN", ("7W", "15W", "25W", "MAXN_SUPER")),
    Board(
        "Jetson AGX Thor", r"Thor", (11, 0), 0,
        ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"), "VIN", ("MAXN", "120W"),
    ),
)  # fmt: skip

OLDEST_TENSORRT = (8, 0)
#: Q/DQ take fp16 scales, and so fp16 values, from this ONNX operator set on.
FP16_SCALES_OPSET = 19
#: Convolutions and pooling take bfloat16 from this one on, so bf16 models are written in it.
BF16_OPSET = 22
BF16_TENSORRT, BF16_CAPABILITY = (10, 0), (8, 0)
#: TensorRT has no calibrator from here on.
NO_CALIBRATOR = (11, 0)
#: DLA left with 10.8 and came back with 11.4 on AGX Orin.
NO_DLA_FROM, DLA_AGAIN = (10, 8), (11, 4)
#: GPUs with int8 products: all from Volta on, and one Pascal.
INT8_CAPABILITY, INT8_PASCAL = (7, 0), (6, 1)


@dataclass(frozen=True)
class Contract:
    """What TensorRT can do on a target. ``refused`` says of a precision why it cannot be built there."""

    tensorrt: Version | None
    compute_capability: Version | None
    jetpack: JetPack | None
    board: Board | None
    parser: ParserLimit | None
    dla_cores: int
    refused: dict[Precision, str] = field(default_factory=dict)

    @property
    def has_dla(self) -> bool:
        return self.dla_cores > 0


def contract_of(info: TargetInfo) -> Contract:
    """The contract of a probed target."""
    engine = info.engines.get(EngineName.TENSORRT)
    version = version_of(engine.version) if engine and engine.version else None
    board = find_board(info.board or "")
    told = version_of(engine.gpu.compute_capability) if engine and engine.gpu else None
    capability = told or (board.compute_capability if board else None)
    cores = engine.dla_cores if engine and engine.dla_cores is not None else board.dla_cores if board else 0
    return Contract(
        tensorrt=version,
        compute_capability=capability,
        jetpack=find_jetpack(info.l4t or ""),
        board=board,
        parser=parser_limit(version) if version else None,
        dla_cores=cores,
        refused=refused_precisions(version, capability, engine.precisions if engine else ()),
    )


def version_of(text: str) -> Version:
    """``8.2.1.8`` → (8, 2, 1, 8)."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def find_board(model: str) -> Board | None:
    return next((board for board in BOARDS if re.search(board.pattern, model)), None)


def find_jetpack(l4t: str) -> JetPack | None:
    """The JetPack of a line such as ``# R35 (release), REVISION: 4.1, GCID: ...``."""
    match = re.search(r"R(\d+)\D+REVISION: (\d+)", l4t)
    if match is None:
        return None
    release = (int(match[1]), int(match[2]))
    older = [jetpack for jetpack in JETPACKS if jetpack.l4t[0] == release[0] and jetpack.l4t <= release]
    return older[-1] if older else None


def parser_limit(version: Version) -> ParserLimit | None:
    older = [limit for limit in PARSER_LIMITS if limit.since <= version]
    return older[-1] if older else None


def refused_precisions(
    version: Version | None, capability: Version | None, offered: Sequence[str]
) -> dict[Precision, str]:
    """Why TensorRT cannot build a precision here, in words, by precision. ``offered`` is the probe's own list."""
    refused = {}
    for precision in Precision:
        option = "int8" if precision.has_quantizers else str(precision)
        reason = _gpu_refuses(precision, capability) or _version_refuses(precision, version)
        if not reason and offered and option not in offered:
            reason = "this TensorRT does not offer it"
        if reason:
            refused[precision] = reason
    return refused


def _gpu_refuses(precision: Precision, capability: Version | None) -> str:
    if capability is None:
        return ""
    gpu = f"its GPU has compute capability {dotted(capability)}"
    if precision.is_int8 and capability != INT8_PASCAL and capability < INT8_CAPABILITY:
        return f"{gpu} and no int8 kernels"
    if precision is Precision.BF16 and capability < BF16_CAPABILITY:
        return f"{gpu}, and bfloat16 came with {dotted(BF16_CAPABILITY)}"
    return ""


def _version_refuses(precision: Precision, version: Version | None) -> str:
    if precision is Precision.INT8_DYNAMIC:
        return "only ONNX Runtime quantizes activations as they come"
    if version is None:
        return ""
    if precision is Precision.BF16 and version < BF16_TENSORRT:
        return f"TensorRT {dotted(version)} has no bfloat16, which came with {dotted(BF16_TENSORRT)}"
    if precision is Precision.INT8_CALIBRATED and version >= NO_CALIBRATOR:
        return f"TensorRT {dotted(version)} has no calibrator; explicit Q/DQ took its place"
    return ""


def dotted(version: Version) -> str:
    return ".".join(str(part) for part in version)
