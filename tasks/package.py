"""Stage ``package``: one zip file that runs the winner on its device without Jetway, tried out on the target."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import EngineName, Precision, Target
from jetway.tasks.artifacts import Engine, OnnxModel, Package, StageOutput, file_sha256
from jetway.tasks.cascade_unit import CLASSIFIER, SCRIPT, Behind, write_unit
from jetway.tasks.deepstream import deepstream_files
from jetway.tasks.errors import RemoteCommandError, TargetUnreachableError, WorkloadError
from jetway.tasks.remote import RETRIES, RETRY_DELAYS_S, is_unreachable
from jetway.tasks.stage import StageContext
from jetway.tasks.target.agent import build_agent
from jetway.tasks.target.process import CommandResult, readable
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.workload import batches

#: The files that go into every package as they are, and the text of its README.
SCRIPTS = ("infer.py", "benchmark.sh")
EXECUTABLE = (*SCRIPTS, SCRIPT.name)
FILES = Path(__file__).parent / "package_files"
#: Folder of a package.
DEEPSTREAM = "deepstream"
#: What a cascade found in its sample frames on the target.
EXPECTED_UNIT = "expected_cascade.jsonl"

DESCRIPTIONS = {
    "model.engine": "the engine",
    "passport.json": "what the engine is, what built it, and the options to load it with",
    "model.onnx": "the network that the engine was built from",
    "labels.txt": "the names of the classes, one a line",
    "infer.py": "runs the engine",
    "runtime.zip": "what it runs the engine with: Python, without anything to install",
    "benchmark.sh": "times it",
    DEEPSTREAM: "configuration and script for NVIDIA DeepStream, generated and not run on a board",
    "sample_input.npz": "the first sample of the evaluation data",
    "expected_output.npz": "what the engine answered to it on this target",
    SCRIPT.name: "runs this engine and the classifier's on what it finds, as one",
    "cascade.json": "what stands before and behind either engine",
    CLASSIFIER: "the classifier: a package of its own",
    "sample_frames.npy": "the first frames of the evaluation data",
    EXPECTED_UNIT: "what both engines found in them on this target",
}
CASCADE_COMMANDS = """python3 cascade.py                 # what both engines find in sample_frames.npy
python3 cascade.py frames.npy      # or .y4m, an image, a zip of images, a video
"""

#: What must be there already to run an engine, and what it is tied to, by engine; of its passport's platform.
NEEDED = {
    "onnxruntime": "numpy and `onnxruntime=={engine_version}`",
    "tensorrt": "TensorRT {engine_version} and its Python bindings (`tensorrt`), which JetPack brings for the system's "
    "own Python; numpy is not needed",
}
FITS = {
    "onnxruntime": "this model of CPU and this version of ONNX Runtime",
    "tensorrt": "this model of GPU and board, and this version of TensorRT",
}
NAMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}

#: Facts of one run about an engine, which are no part of the engine's passport.
RUN_FACTS = {"remote_path", "reused", "target"}

COMMAND_TIMEOUT_S = 300.0
TRIAL_RUNS = 20

# Like the first moment that a zip file can name: the same content gives the same bytes.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# What a lost connection left behind goes when the next package comes.
MAKE_FOLDER = """
mkdir -p -- "$1" && cd -- "$1" || exit
find . -maxdepth 1 -name "package.??????" -mmin +120 -exec rm -rf {} +
exec mktemp -d "$(pwd -P)/package.XXXXXX"
"""
SAVED = re.compile(r"^saved: sha256 ([0-9a-f]{64}) ", re.MULTILINE)

Arrays = dict[str, NDArray[Any]]


def package_winner(
    context: StageContext,
    session: TargetSession,
    engine: Engine,
    onnx: OnnxModel,
    *,
    variant: str = "",
    behind: Behind | None = None,
) -> StageOutput:
    """Packs the engine with its scripts and a sample, and runs what was packed on the target.

    With a classifier ``behind`` it, both are packed as one unit. The expected output is what the packed engine
    answers on the target itself, as another CPU may round differently. Raises RemoteCommandError when a script
    fails there, WorkloadError without a first sample.
    """
    stage = f"package on {session.target.name}"
    with context.store.scratch() as scratch:
        folder = scratch / "package"
        folder.mkdir()
        title = f"{variant or 'Engine'} for {session.target.name}"
        if behind:
            write_unit(context, folder, behind)
            (folder / CLASSIFIER).mkdir()
            write_files(behind.context, folder / CLASSIFIER, behind.engine, behind.onnx, title)
        write_files(context, folder, engine, onnx, title)
        context.progress(stage, 0, 2, "running the sample")
        save_expected_outputs(session, folder)
        archive = zip_folder(folder)
        context.progress(stage, 1, 2, "trying the package")
        verify_package(session, archive)
        context.progress(stage, 2, 2, "packaged")
        handle = context.store.add(
            Package,
            archive,
            parents=(engine.sha256, onnx.sha256),
            metadata={"variant": variant, "target": session.target.name},
        )
    return StageOutput(handle=handle)


def write_files(context: StageContext, folder: Path, engine: Engine, onnx: OnnxModel, title: str) -> None:
    """Everything but the expected output."""
    passport = {key: value for key, value in engine.metadata.items() if key not in RUN_FACTS}
    sample = sample_input(context)
    (folder / "model.engine").write_bytes(context.store.open(engine).read_bytes())
    (folder / "model.onnx").write_bytes(context.store.open(onnx).read_bytes())
    (folder / "passport.json").write_text(json.dumps(passport, indent=1, sort_keys=True) + "\n")
    (folder / "runtime.zip").write_bytes(build_agent())
    for name in SCRIPTS:
        (folder / name).write_bytes((FILES / name).read_bytes())
    if context.workload.labels:
        (folder / "labels.txt").write_text("\n".join(context.workload.labels) + "\n", encoding="utf-8")
    save_arrays(folder / "sample_input.npz", sample)
    write_deepstream(context, folder, passport, onnx)
    expected = [path for path, _ in expected_outputs(folder)]
    text = describe(passport, sample, title, [*(path.name for path in folder.iterdir()), *expected])
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_deepstream(
    context: StageContext, folder: Path, passport: Mapping[str, Any], onnx: OnnxModel
) -> None:
    """Files for DeepStream, which runs TensorRT engines alone, where the workload says what it does with frames."""
    frames = context.workload.frame_processing()
    if frames is None or passport["platform"]["engine"] != EngineName.TENSORRT:
        return
    precision = Precision(onnx.metadata.get("precision", Precision.FP32))
    (folder / DEEPSTREAM).mkdir()
    for name, text in deepstream_files(frames, precision, context.workload.labels).items():
        (folder / DEEPSTREAM / name).write_text(text, encoding="utf-8")


def save_arrays(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's types take any name for allow_pickle


def sample_input(context: StageContext) -> Arrays:
    """The first of the evaluation data, as many samples as ``example_inputs`` has."""
    workload = context.workload
    size = len(next(iter(workload.example_inputs().values())))
    for inputs, _ in batches(workload, workload.evaluation_data(), size):
        return {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
    raise WorkloadError(
        "evaluation_data of the workload is empty, so a package has no sample. Give it samples."
    )


def describe(passport: Mapping[str, Any], sample: Arrays, title: str, names: list[str]) -> str:
    """The README of a package."""
    template = Template((FILES / "README.md.template").read_text(encoding="utf-8"))
    platform = passport["platform"]
    engine = platform["engine"]
    return template.substitute(
        title=title,
        board=passport["board"] or passport["cpu"]["model"],
        architecture=platform["architecture"],
        engine=NAMES[engine],
        engine_version=platform["engine_version"],
        needed=NEEDED[engine].format(**platform),
        fits=FITS[engine],
        files="\n".join(f"| `{name}` | {text} |" for name, text in DESCRIPTIONS.items() if name in names),
        more_commands=CASCADE_COMMANDS if SCRIPT.name in names else "",
        inputs="\n".join(f"- `{name}`: {array.dtype}{list(array.shape)}" for name, array in sample.items()),
    )


def expected_outputs(folder: Path) -> list[tuple[str, str]]:
    """What a package holds of the target's answers, and the script that gives each."""
    found = [("expected_output.npz", "infer.py")]
    if (folder / SCRIPT.name).exists():
        found += [(f"{CLASSIFIER}/{path}", f"{CLASSIFIER}/{script}") for path, script in found]
        found.append((EXPECTED_UNIT, SCRIPT.name))
    return found


def save_expected_outputs(session: TargetSession, folder: Path) -> None:
    """Runs the files so far on the target, and brings what the engines answer into the folder."""
    with unpacked(session, zip_folder(folder)) as remote:
        for path, script in expected_outputs(folder):
            result = run_script(session, remote, script, "--save", f"{remote}/{path}")
            saved = SAVED.search(result.text)
            if saved is None:
                raise RemoteCommandError(
                    f"{session.target.name}: {script} of the package ended well but did not say what it saved: "
                    f"{result.text[-200:]!r}. Run it there by hand."
                )
            session.pull(f"{remote}/{path}", folder / path, saved[1])


def verify_package(session: TargetSession, archive: Path) -> None:
    """Unpacks a package on the target and runs its scripts. Raises RemoteCommandError."""
    with zipfile.ZipFile(archive) as file:
        is_cascade = SCRIPT.name in file.namelist()
    with unpacked(session, archive) as remote:
        run_script(session, remote, "infer.py", "--check")
        run_script(session, remote, "benchmark.sh", str(TRIAL_RUNS))
        if is_cascade:
            run_script(session, remote, SCRIPT.name, "--check")


@contextmanager
def unpacked(session: TargetSession, archive: Path) -> Iterator[str]:
    """A folder on the target with the archive's files, as long as the block lasts."""
    draft = Package(sha256=file_sha256(archive), size_bytes=archive.stat().st_size)
    pushed = session.push(draft, archive)
    made = _run(session, ["sh", "-c", MAKE_FOLDER, "jetway", session.target.work_dir]).text
    folder = made.splitlines()[-1]
    try:
        _run(session, [session.target.python, "-m", "zipfile", "-e", pushed, folder])
        yield folder
    finally:
        _remove(session, folder)


def _remove(session: TargetSession, folder: str) -> None:
    """What the block raised is the news, also when the link to clean up over is gone."""
    try:
        _run(session, ["rm", "-rf", "--", folder])
    except TargetUnreachableError:
        return


def run_script(session: TargetSession, folder: str, name: str, *arguments: str) -> CommandResult:
    """Runs a script of an unpacked package. Raises RemoteCommandError with what it said when it fails."""
    python = session.target.python
    interpreter = [python] if name.endswith(".py") else ["env", f"PYTHON={python}", "sh"]
    argv = [*interpreter, f"{folder}/{name}", *arguments]
    result = session.connection.run(argv, timeout_s=COMMAND_TIMEOUT_S, check=False)
    if result.exit_status != 0:
        said = readable(result.stderr + result.stdout).strip()
        raise RemoteCommandError(
            f"{session.target.name}: {' '.join((name, *arguments))} of the package fails there with exit status "
            f"{result.exit_status}: {said[-1000:]} The engine itself was built and measured, so compare the "
            "target's Python with the package's passport.json, and run again.",
            exit_status=result.exit_status,
            stderr=readable(result.stderr),
        )
    return result


def _run(session: TargetSession, argv: list[str]) -> CommandResult:
    return session.connection.run(argv, timeout_s=COMMAND_TIMEOUT_S)


def zip_folder(folder: Path) -> Path:
    """A zip file of the folder's files, in order of their names. The same files give the same bytes."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), ZIP_EPOCH)
            info.create_system = 3  # Unix: the bytes and the modes do not depend on the host
            info.external_attr = (
                0o100755 if path.suffix == ".sh" or path.name in EXECUTABLE else 0o100644
            ) << 16
            file.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive


@task(
    name="package",
    task_run_name="package {variant} on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def package(
    context: StageContext,
    target: Target,
    engine: Engine,
    onnx: OnnxModel,
    *,
    variant: str,
    behind: Behind | None = None,
) -> StageOutput:
    with context.timed(f"package on {target.name}"), open_target(target) as session:
        return package_winner(context, session, engine, onnx, variant=variant, behind=behind)
