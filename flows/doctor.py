"""``jetway doctor``: tries a target out with tiny networks, and writes what it found into one file."""

from __future__ import annotations

import getpass
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jetway.configs.schema import (
    BenchmarkConfig,
    BuildConfig,
    EngineName,
    EvaluateConfig,
    ExportConfig,
    QatConfig,
    Target,
)
from jetway.flows.terminal import Terminal
from jetway.tasks.artifacts import Checkpoint, Engine, OnnxModel
from jetway.tasks.benchmark import benchmark_engines
from jetway.tasks.build import build_engine
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.checks import Check, all_passed, attempted, checks_table, judged, summary
from jetway.tasks.doctor import (
    OPSET,
    Anonymizer,
    Case,
    benchmark_check,
    possible_cases,
    precision_check,
    report_markdown,
    target_checks,
    target_facts,
    trtexec_checks,
)
from jetway.tasks.environment import describe_environment
from jetway.tasks.errors import ConfigError, JetwayError, TargetError
from jetway.tasks.evaluate import evaluate_engine
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower_onnx
from jetway.tasks.preflight import probe_target
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.stage import Progress, StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.target_state import state_checks
from jetway.tasks.tiny_networks import ERROR_RATIO, TINY_NETWORKS, TinyWorkload, host_outputs

EXIT_FAILED = TargetError.exit_code
#: The network whose engines are timed, one of each precision.
TIMED_NETWORK = next(iter(TINY_NETWORKS))
#: Long enough to see that timing works; nobody shall quote it.
SHORT_SESSION: dict[str, Any] = {
    "warmup_runs": 5, "min_queries": 30, "min_duration_s": 0.3, "max_extensions": 0, "max_drift_ratio": 1.0,
    "timeout_s": 300,
}  # fmt: skip


def run_doctor(target: Target, *, as_json: bool, report: Path | None) -> int:
    """Prints the checks, writes the report, and returns the exit code: 0 without a failure, 3 otherwise."""
    report = report or Path(f"jetway-doctor-{target.name}.md")
    if report.is_dir() or not report.parent.is_dir():
        raise ConfigError(f"--report {report}: name a file in a folder that is there.")
    with Terminal() as terminal, tempfile.TemporaryDirectory(prefix="jetway-doctor-") as folder:
        diagnosis = diagnose(target, Store(Path(folder)), terminal)
    report.write_text(diagnosis.report(), encoding="utf-8")
    code = 0 if all_passed(diagnosis.checks) else EXIT_FAILED
    if as_json:
        checks = [check.model_dump(mode="json") for check in diagnosis.checks]
        print(json.dumps({"target": target.name, "exit_code": code, "report": str(report), "checks": checks}))
    else:
        Console().print(checks_table(diagnosis.checks, target.name))
        print(
            f"\n{summary(diagnosis.checks)}. To report a problem, attach {report}: it names no user or machine."
        )
    return code


@dataclass
class Diagnosis:
    """The checks so far, and what is known of the target."""

    target: Target
    checks: list[Check] = field(default_factory=list)
    info: TargetInfo | None = None

    def report(self) -> str:
        known = target_facts(self.target, self.info) if self.info else None
        facts = {"simulated": bool(self.info and self.info.is_simulated), "target": known}
        return report_markdown(
            self.checks, {**facts, "host": describe_environment()}, anonymizer_for(self.target, self.info)
        )


def anonymizer_for(target: Target, info: TargetInfo | None) -> Anonymizer:
    """Hides who works here and on the target, what both are called, and where their files lie."""
    words = {
        target.name: "TARGET", target.host: "HOST", target.user: "USER",
        getpass.getuser(): "USER", socket.gethostname(): "HOST",
    }  # fmt: skip
    paths = {target.work_dir: "WORK_DIR", target.identity_file: "KEY", target.known_hosts: "KNOWN_HOSTS"}
    words |= {path: name for path, name in paths.items() if path and "/" in path}
    versions: list[str] = []
    if info is not None:
        words[info.hostname] = "HOST"
        versions = [engine.version for engine in info.engines.values() if engine.version]
    return Anonymizer({word: name for word, name in words.items() if word}, versions)


def diagnose(target: Target, store: Store, progress: Progress) -> Diagnosis:
    """Everything in order; a target that cannot be reached, or is lost on the way, fails the check that says so."""
    diagnosis = Diagnosis(target)
    try:
        with open_target(target) as session:
            diagnosis.target = session.target
            diagnosis.info = info = probe_target(session)
            for check in examine(session, info, store, progress):
                diagnosis.checks.append(check)
    except TargetError as exc:
        diagnosis.checks.append(judged("connection", False, str(exc), error=type(exc).__name__))
    return diagnosis


def examine(session: TargetSession, info: TargetInfo, store: Store, progress: Progress) -> Iterator[Check]:
    target = session.target
    yield from target_checks(target, info)
    yield from state_checks(target, info, session.call("checkup", {"engine": str(target.engine)}))
    cases, refused = possible_cases(target, info)
    yield from refused
    trial = Trial(session, store, progress, cases, with_trtexec=info.trtexec is not None)
    try:
        for network in TINY_NETWORKS:
            for case in cases:
                yield attempted(f"{network} {case.name}", partial(trial.run, network, case))
        yield from trial.time()
    finally:
        trial.clean_up()


class Trial:
    """Builds tiny networks on a target and compares what they answer there with what they answer here."""

    def __init__(
        self,
        session: TargetSession,
        store: Store,
        progress: Progress,
        cases: list[Case],
        *,
        with_trtexec: bool = False,
    ) -> None:
        self._session = session
        self._store = store
        self._progress = progress
        self._cases = cases
        self._with_trtexec = with_trtexec
        # Unlike any before it, so that nothing built earlier is used again.
        self._revision = int(time.time())
        self._engines: dict[tuple[str, str], Engine] = {}
        self._float: dict[str, Checkpoint] = {}

    def run(self, network: str, case: Case) -> Check:
        """Builds, runs and compares one network in one precision."""
        context, model = self._model(network, case)
        engine = build_engine(
            context, self._session, model, BuildConfig(revision=self._revision), case.tensorrt,
            variant=f"{network} {case.name}",
        )  # fmt: skip
        self._engines[network, case.name] = engine
        found = evaluate_engine(
            context, self._session, engine, EvaluateConfig(), variant=f"{network} {case.name}"
        )
        return precision_check(f"{network} {case.name}", case.precision, found.metrics[ERROR_RATIO], engine)

    def time(self) -> Iterator[Check]:
        """A short session of one network in all precisions, beside the target's own trtexec."""
        engines = {
            case.name: self._engines[TIMED_NETWORK, case.name]
            for case in self._cases
            if (TIMED_NETWORK, case.name) in self._engines and case.tensorrt.dla is None
        }
        if not engines:
            return
        context = self._context(TinyWorkload(TIMED_NETWORK))
        try:
            result = benchmark_engines(context, self._session, engines, self._timing())
        except JetwayError as exc:
            yield judged("benchmark", False, str(exc), error=type(exc).__name__)
            return
        yield benchmark_check(result)
        yield from trtexec_checks(result)

    def clean_up(self) -> None:
        """Removes the engines from the target: nobody will ask for them again."""
        paths = [str(engine.metadata["remote_path"]) for engine in self._engines.values()]
        files = [f"{path}{suffix}" for path in paths for suffix in ("", ".json", ".tensorrt")]
        with suppress(JetwayError):
            self._session.connection.run(["rm", "-rf", "--", *files], timeout_s=60)

    def _timing(self) -> BenchmarkConfig:
        if self._session.target.engine is not EngineName.TENSORRT:
            return BenchmarkConfig.model_validate(SHORT_SESSION)
        passes = {"scenarios": ("latency", "throughput"), "trtexec": self._with_trtexec}
        return BenchmarkConfig.model_validate({**SHORT_SESSION, **passes})

    def _context(self, workload: TinyWorkload) -> StageContext:
        return StageContext(workload, self._store, threads=1, progress=self._progress)

    def _model(self, network: str, case: Case) -> tuple[StageContext, OnnxModel]:
        """The ONNX file as the deploy flow makes it, and a context that scores against this host's outputs."""
        context = self._context(TinyWorkload(network))
        if network not in self._float:
            self._float[network] = save_checkpoint(self._store, context.workload.network(), structure=None)
        checkpoint = self._float[network]
        if case.precision.has_quantizers:
            quantized = quantize_ptq(context, checkpoint, QatConfig()).handle
            assert isinstance(quantized, Checkpoint)
            checkpoint = quantized
        exported = export_onnx(context, checkpoint, ExportConfig(opset=OPSET), case.precision.exported).handle
        assert isinstance(exported, OnnxModel)
        expected = host_outputs(self._store.open(exported), TinyWorkload(network))
        context = self._context(TinyWorkload(network, expected))
        backend = self._session.target.own_backend
        lowered = lower_onnx(context, exported, backend, case.precision, QatConfig(), case.tensorrt).handle
        assert isinstance(lowered, OnnxModel)
        return context, lowered
