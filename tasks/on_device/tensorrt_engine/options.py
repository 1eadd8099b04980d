"""What a build request asks of TensorRT, with every default filled in."""

from typing import Any, Dict, Tuple

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.transfer import hash_file

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-calibrated")
FLOATS = ("fp32", "fp16", "bf16")
DEFAULTS = {
    "precision": "fp32",
    "int8_rest": "fp32",
    "tf32": False,
    "mixed": {},
    "profiles": [],
    "workspace_mib": [4096, 1024, 256],
    "optimization_level": None,
    "timing_cache": True,
    "tactic_sources": None,
    "max_aux_streams": None,
    "hardware_compatibility": None,
    "version_compatible": False,
    "detailed_layers": True,
    "dla": None,
    "calibration": None,
    "cuda_graph": False,
    "zero_copy": False,
    "streams": 1,
}  # type: Dict[str, Any]
DLA_DEFAULTS = {"core": 0, "gpu_fallback": True, "layers": {}}  # type: Dict[str, Any]
CALIBRATION_DEFAULTS = {"algorithm": "entropy", "batches": [], "cache": None}  # type: Dict[str, Any]
#: They say how an engine runs, and leave the engine as it is.
LOAD_ONLY = ("cuda_graph", "zero_copy", "streams")
CHOICES = {
    "precision": PRECISIONS,
    "int8_rest": FLOATS,
    "hardware_compatibility": (None, "ampere_plus", "same_compute_capability"),
}  # type: Dict[str, Tuple[Any, ...]]
CALIBRATION_ALGORITHMS = ("entropy", "minmax")


def normalised(request: Dict[str, Any]) -> Dict[str, Any]:
    """The request's ``options`` with every default. Raises DeviceError (bad_request), naming the recipe's key."""
    options = _filled(request.get("options") or {}, DEFAULTS, "tensorrt")
    if options["dla"] is not None:
        options["dla"] = _filled(options["dla"], DLA_DEFAULTS, "tensorrt.dla")
    if options["calibration"] is not None:
        options["calibration"] = _filled(options["calibration"], CALIBRATION_DEFAULTS, "tensorrt.calibration")
    for key, allowed in CHOICES.items():
        _check_choice("tensorrt." + key, options[key], allowed)
    for kept in options["mixed"].values():
        _check_choice("tensorrt.mixed", kept, FLOATS)
    _check_workspaces(options["workspace_mib"])
    _check_calibration(options)
    return options


def recorded(options: Dict[str, Any]) -> Dict[str, Any]:
    """The options that make the engine what it is: calibration files by digest instead of by path."""
    options = {key: value for key, value in options.items() if key not in LOAD_ONLY}
    calibration = options["calibration"]
    if calibration is None:
        return options
    cache = calibration["cache"]
    digests = {
        "algorithm": calibration["algorithm"],
        "batches": [hash_file(path) for path in calibration["batches"]],
        "cache": hash_file(cache) if cache else None,
    }
    return dict(options, calibration=digests)


def for_loading(options: Dict[str, Any]) -> Dict[str, Any]:
    """What running the built engine needs of them."""
    core = options["dla"]["core"] if options["dla"] else None
    return dict({key: options[key] for key in LOAD_ONLY + ("version_compatible",)}, dla_core=core)


def _filled(given: Dict[str, Any], defaults: Dict[str, Any], section: str) -> Dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise _bad(
            section, "does not know {}; it has {}".format(", ".join(unknown), ", ".join(sorted(defaults)))
        )
    return dict(defaults, **given)


def _check_choice(key: str, value: Any, allowed: Tuple[Any, ...]) -> None:
    if value not in allowed:
        raise _bad(key, "is {!r}, and must be one of: {}".format(value, ", ".join(map(str, allowed))))


def _check_workspaces(rungs: Any) -> None:
    if not rungs or any(rung < 1 for rung in rungs) or sorted(set(rungs), reverse=True) != list(rungs):
        raise _bad("tensorrt.workspace_mib", "is {}, and must fall from rung to rung, in MiB".format(rungs))


def _check_calibration(options: Dict[str, Any]) -> None:
    calibration = options["calibration"]
    if (options["precision"] == "int8-calibrated") != (calibration is not None):
        raise _bad("tensorrt.calibration", "goes with the precision int8-calibrated, and with no other")
    if calibration is None:
        return
    _check_choice("tensorrt.calibration.algorithm", calibration["algorithm"], CALIBRATION_ALGORITHMS)
    if not calibration["batches"] and not calibration["cache"]:
        raise _bad("tensorrt.calibration", "has neither batches nor a cache: give it samples")


def _bad(key: str, text: str) -> DeviceError:
    return DeviceError("{} {}.".format(key, text), errors.BAD_REQUEST)
