"""What a recipe sets on a build, besides its precision: each where this version has it, or a clear refusal."""

from typing import Any, Dict, List

from jetway.tasks.on_device.tensorrt_engine import bindings

MIB = 1 << 20
LEAVE_OUT = "Leave it out for this target."


def apply(config: Any, options: Dict[str, Any], workspace_mib: int) -> None:
    set_workspace(config, workspace_mib)
    set_verbosity(config, options["detailed_layers"])
    if options["optimization_level"] is not None:
        set_optimization_level(config, options["optimization_level"])
    if options["max_aux_streams"] is not None:
        set_aux_streams(config, options["max_aux_streams"])
    if options["tactic_sources"] is not None:
        config.set_tactic_sources(tactic_mask(options["tactic_sources"]))
    if options["hardware_compatibility"] is not None:
        set_hardware_compatibility(config, options["hardware_compatibility"])
    if options["version_compatible"]:
        set_version_compatible(config)


def set_workspace(config: Any, workspace_mib: int) -> None:
    pool = bindings.member("MemoryPoolType", "WORKSPACE")
    if bindings.has(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(pool, workspace_mib * MIB)
    elif bindings.has(config, "max_workspace_size"):  # before 8.4
        config.max_workspace_size = workspace_mib * MIB


def set_verbosity(config: Any, detailed: bool) -> None:
    """What the inspector can tell of the engine later; 8.0 has no inspector and another word."""
    levels = [
        bindings.member("ProfilingVerbosity", "DETAILED"),
        bindings.member("ProfilingVerbosity", "VERBOSE"),
    ]
    known = [level for level in levels if level is not None]
    if detailed and known:
        config.profiling_verbosity = known[0]


def set_optimization_level(config: Any, level: int) -> None:
    if bindings.has(config, "builder_optimization_level"):
        config.builder_optimization_level = level
    else:
        raise bindings.absent("builder optimization level", "tensorrt.optimization_level", LEAVE_OUT)


def set_aux_streams(config: Any, count: int) -> None:
    if bindings.has(config, "max_aux_streams"):
        config.max_aux_streams = count
    else:
        raise bindings.absent("auxiliary streams", "tensorrt.max_aux_streams", LEAVE_OUT)


def tactic_mask(names: List[str]) -> int:
    mask = 0
    for name in names:
        source = bindings.named("TacticSource", name)
        if source is None:
            there = sorted(bindings.module().TacticSource.__members__)
            advice = "It has: {}.".format(", ".join(there))
            raise bindings.absent("tactic source {}".format(name), "tensorrt.tactic_sources", advice)
        mask |= 1 << int(source)
    return mask


def set_hardware_compatibility(config: Any, name: str) -> None:
    levels = {
        "ampere_plus": bindings.member("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        "same_compute_capability": bindings.member("HardwareCompatibilityLevel", "SAME_COMPUTE_CAPABILITY"),
    }
    if levels[name] is not None and bindings.has(config, "hardware_compatibility_level"):
        config.hardware_compatibility_level = levels[name]
    else:
        what = "hardware compatibility {}".format(name)
        raise bindings.absent(what, "tensorrt.hardware_compatibility", LEAVE_OUT)


def set_version_compatible(config: Any) -> None:
    flag = bindings.member("BuilderFlag", "VERSION_COMPATIBLE")
    if flag is None:
        raise bindings.absent("version-compatible engines", "tensorrt.version_compatible", LEAVE_OUT)
    config.set_flag(flag)


def flags_set(config: Any) -> List[str]:
    """Names of the flags that the build has, read back from TensorRT."""
    members = bindings.module().BuilderFlag.__members__
    return sorted(name for name, flag in members.items() if config.get_flag(flag))
