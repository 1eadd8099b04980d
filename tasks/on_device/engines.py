"""The engines that a target may have, by the name that a request or a passport gives.

Each is a module with::

    NAME                                        as in requests and passports
    version() -> str                            raises DeviceError (mismatch) where the engine is absent
    facts() -> dict                             for the probe: ``available`` and what else there is to know
    build_options(request) -> dict              every option of a build, defaults filled in, as the passport has it
    load_options(request) -> dict               the options for running what was built
    platform_facts(load_options) -> dict        what a built engine depends on; it fits where all of it is the same
    build(request, engine_path, progress) -> dict          writes the engine; what the passport adds about the build
    inspect(engine_path, load_options, inputs) -> dict     what the passport adds about the built engine
    Session(engine_path, load_options)          a loaded engine

A session has ``output_names``, ``input_shapes`` and::

    batch_limits() -> (int, int)     fewest samples that a call takes, and the number that suits it
    inputs_of(tensors) -> inputs     what the engine takes of the given tensors.Tensor by name, as it takes them
    run(inputs) -> list              the outputs in the order of output_names, arrays or Tensors
    run_checked(inputs) -> list      the same with an error that shows the inputs
    query(inputs) -> callable        THE timed call: copies in, runs, copies out; inputs are where they can be used
    close()                          gives the memory back

One that can run several queries at once also has ``cuda``, ``lanes(count, inputs)``, each of them a work as
``throughput`` takes it, and ``layers(inputs, runs)`` for ``layers``. A vendor's package is imported when it is used.
"""

from typing import Any, Dict

from jetway.tasks.on_device import errors, onnxruntime_engine
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import engine as tensorrt_engine

ENGINES = {module.NAME: module for module in (onnxruntime_engine, tensorrt_engine)}  # type: Dict[str, Any]
DEFAULT = onnxruntime_engine.NAME


def engine_of(name: str) -> Any:
    """The module of the engine. Raises DeviceError (bad_request) for a name that is none."""
    if name not in ENGINES:
        raise DeviceError(
            "There is no engine {!r}. Set the target's `engine` to one of: {}.".format(
                name, ", ".join(sorted(ENGINES))
            ),
            errors.BAD_REQUEST,
        )
    return ENGINES[name]


def facts() -> Dict[str, Any]:
    """What each engine is here; one that is absent says why."""
    return {name: engine.facts() for name, engine in sorted(ENGINES.items())}
