"""Every error that Jetway raises on purpose.

    JetwayError                      exit 1
    ├── ConfigError                  exit 2   the recipe, the target file or the command line
    ├── TargetError                  exit 3   the machine at the other end of the SSH connection
    │   ├── FleetError                        some of several targets; the others' results are kept
    │   ├── TargetUnreachableError            no connection; worth retrying
    │   ├── HostKeyError                      the key is unknown or has changed
    │   ├── TargetTimeoutError
    │   ├── TargetBusyError                   another job holds the accelerator's lease
    │   ├── TargetMismatchError               engine absent, opset too new, an engine built elsewhere
    │   └── RemoteCommandError
    │       └── BuildError                    with its cause: out_of_memory, killed, small_workspace,
    │                                         unsupported_operator, disk_full
    ├── StageError                   exit 4   a stage could not do its work
    │   ├── WorkloadError                     what the user brought raises or returns the wrong thing
    │   ├── PruningError
    │   ├── TrainingError
    │   ├── QuantizationError
    │   ├── ExportError
    │   └── ParityError                       ONNX and PyTorch disagree
    ├── ArtifactError                exit 4   a file that should be there is missing or corrupt
    ├── MeasurementError             exit 5   evidence too thin for the statement asked for
    └── TrackingError                exit 6   MLflow or Prefect
        └── TrackingUnreachableError          no answer from MLflow; worth retrying, and its writes are spooled

A message says what, where, and what to do next. Attributes are keyword-only, with defaults, so that every
error survives a pickle. Vendor exceptions are translated once, where they surface, ``from exc``.
"""

from __future__ import annotations

from typing import Any


class JetwayError(Exception):
    """Base of the tree. ``exit_code`` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.__dict__.update(attributes)


class ConfigError(JetwayError):
    exit_code = 2


class TargetError(JetwayError):
    exit_code = 3


class FleetError(TargetError):
    """Some of several targets gave no result. ``result`` is the run's, of the others; None when there is none."""

    def __init__(self, message: str, *, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class TargetUnreachableError(TargetError):
    """The connection could not be made or was lost. A retry may help."""


class HostKeyError(TargetError):
    """The target's host key is not the recorded one."""


class TargetTimeoutError(TargetError):
    """A command or a job ran past its limit."""


class TargetBusyError(TargetError):
    """Another job holds the accelerator."""


class TargetMismatchError(TargetError):
    """The target cannot run what it was given."""


class RemoteCommandError(TargetError):
    """A command or job on the target failed."""

    def __init__(self, message: str, *, exit_status: int | None = None, stderr: str = "") -> None:
        super().__init__(message, exit_status=exit_status, stderr=stderr)


class BuildError(RemoteCommandError):
    """The engine could not be built. ``cause`` is one word of the tree above, or ``unknown``."""

    def __init__(
        self, message: str, *, cause: str = "unknown", exit_status: int | None = None, stderr: str = ""
    ) -> None:
        super().__init__(message, exit_status=exit_status, stderr=stderr)
        self.cause = cause


class StageError(JetwayError):
    exit_code = 4


class WorkloadError(StageError):
    pass


class PruningError(StageError):
    pass


class TrainingError(StageError):
    pass


class QuantizationError(StageError):
    pass


class ExportError(StageError):
    pass


class ParityError(StageError):
    """ONNX and PyTorch disagree beyond the limit. ``output`` names the worst one."""

    def __init__(self, message: str, *, output: str = "", max_abs_error: float | None = None) -> None:
        super().__init__(message, output=output, max_abs_error=max_abs_error)


class ArtifactError(JetwayError):
    exit_code = 4


class MeasurementError(JetwayError):
    exit_code = 5


class TrackingError(JetwayError):
    exit_code = 6


class TrackingUnreachableError(TrackingError):
    """MLflow does not answer, or says that it cannot for now. A retry may help."""
