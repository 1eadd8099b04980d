"""``jetway check --deployed``: whether what the newest run deployed still is, and works, as it was recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from jetway.configs.schema import EvaluateConfig, Recipe, Target
from jetway.flows.pipeline import Observer, make_context
from jetway.flows.terminal import Terminal
from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.benchmark import benchmark_engines
from jetway.tasks.checks import (
    Check,
    all_passed,
    attempted,
    checks_markdown,
    checks_table,
    judged,
    skipped,
    summary,
)
from jetway.tasks.deployed import (
    ACCURACY_SAMPLES,
    accuracy_check,
    before_checks,
    latency_check,
    no_soak_checks,
    rate_check,
    soak_checks,
)
from jetway.tasks.deployment import Deployment, find_deployment, package_file
from jetway.tasks.errors import JetwayError, TargetError, TargetUnreachableError
from jetway.tasks.evaluate import evaluate_engine
from jetway.tasks.package import COMMAND_TIMEOUT_S, run_script, unpacked
from jetway.tasks.preflight import probe_target
from jetway.tasks.remote import example_inputs, push_handle, relay
from jetway.tasks.stage import StageContext
from jetway.tasks.target.process import readable
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.workload import Workload

#: No check is about the other passes of a session.
LATENCY_ALONE = {"scenarios": ("latency",), "power": None, "profile_layers": False, "trtexec": False}
#: Windows of a soak test, and the longest that one of them is.
SOAK_WINDOWS = 30
LONGEST_WINDOW_S = 10.0
#: Besides the soak itself: waking up, warming up, and writing down.
SOAK_EXTRA_S = 300.0
#: How the package's script ends when it refuses its input.
REFUSED = 2


def check_deployed(recipe: Recipe, path: Path, targets: list[Target], *, soak_minutes: float | None) -> int:
    """Checks what the newest run of the recipe deployed on each target; 0 when nothing failed, 1 otherwise.

    Raises TrackingError when there is no such run; a check that fails is a line, not an error.
    """
    tracker = Tracker()
    context = make_context(recipe, path, Observer())
    passed = True
    for target in targets:
        deployment = find_deployment(tracker, recipe.name, target.name)
        with Terminal() as terminal:
            context.progress = terminal
            inspection = Inspection(context, recipe, target, deployment, tracker, soak_minutes)
            checks = list(inspection.checks())
        log_checks(tracker, deployment, checks)
        passed &= all_passed(checks)
        title = f"{recipe.name} on {target.name}: {deployment.row.variant} of run {deployment.run.run_id[:8]}"
        Console().print(checks_table(checks, title))
        print(f"\n{summary(checks)}")
    return 0 if passed else 1


def log_checks(tracker: Tracker, deployment: Deployment, checks: list[Check]) -> None:
    """Beside those of earlier days, in the run that deployed."""
    at = datetime.now(UTC)
    folder = f"targets/{deployment.target}/deployed/{at:%Y-%m-%dT%H-%M-%SZ}"
    run_id, verdict = deployment.run.run_id, "PASS" if all_passed(checks) else "FAIL"
    document = {
        "schema_version": SCHEMA_VERSION,
        "at": at.isoformat(),
        "variant": deployment.row.variant,
        "target": deployment.target,
        "verdict": verdict,
        "checks": [check.model_dump(mode="json") for check in checks],
    }
    tracker.log_json(run_id, f"{folder}.json", document)
    tracker.log_text(run_id, f"{folder}.md", f"# {summary(checks)}\n\n{checks_markdown(checks)}")
    tracker.set_tags(run_id, {f"deployed.{deployment.target}": verdict})


class Inspection:
    """One deployment on its target."""

    def __init__(
        self,
        context: StageContext,
        recipe: Recipe,
        target: Target,
        deployment: Deployment,
        tracker: Tracker,
        soak_minutes: float | None,
    ) -> None:
        self._context = context
        self._recipe = recipe
        self._target = target
        self._found = deployment
        self._tracker = tracker
        self._soak_minutes = soak_minutes

    def checks(self) -> Iterator[Check]:
        """Every line of both checklists; a target that is away, or is lost on the way, fails the last one."""
        try:
            with open_target(self._target) as session:
                yield from self._before(session)
                yield from self._package(session)
                yield attempted("accuracy", lambda: self._accuracy(session))
                yield from self._timing(session)
                yield from self._soak(session)
        except TargetError as exc:
            yield judged("target", False, str(exc), error=type(exc).__name__)

    def _before(self, session: TargetSession) -> Iterator[Check]:
        info = probe_target(session)
        backend = self._target.backend(self._found.variant)
        state = session.call("checkup", {"engine": str(backend.engine)})
        file = session.call("engine_file", {"path": self._found.remote_path})
        mode = self._target.power_settings(self._recipe.benchmark)["power_mode"]
        yield from before_checks(self._found, self._target, info, state, file, power_mode=mode)

    def _package(self, session: TargetSession) -> Iterator[Check]:
        """The application: it starts, answers as it did, and says what is wrong with a bad input."""
        if not self._found.is_packaged:
            yield skipped("package answers", f"the run packaged no {self._found.row.variant}")
            return
        with tempfile.TemporaryDirectory() as folder:
            archive = package_file(self._tracker, self._found, Path(folder))
            try:
                with unpacked(session, archive) as remote:
                    yield attempted("package answers", lambda: package_answers(session, remote))
                    yield attempted("package refuses bad input", lambda: package_refuses(session, remote))
            except TargetUnreachableError:
                raise
            except JetwayError as exc:
                yield judged("package answers", False, str(exc), error=type(exc).__name__)

    def _accuracy(self, session: TargetSession) -> Check:
        asked = self._recipe.evaluate.samples or ACCURACY_SAMPLES
        samples = min(asked, ACCURACY_SAMPLES, len(self._found.records))
        config = EvaluateConfig(samples=samples, timeout_s=self._recipe.evaluate.timeout_s)
        found = evaluate_engine(
            self._context, session, self._found.engine, config, variant=self._found.row.variant
        )
        return accuracy_check(
            self._workload, self._found.records, self._context.store.load_json(found.records)
        )

    def _timing(self, session: TargetSession) -> Iterator[Check]:
        variant, config = self._found.row.variant, self._recipe.benchmark.model_copy(update=LATENCY_ALONE)
        try:
            now = benchmark_engines(self._context, session, {variant: self._found.engine}, config)
        except TargetUnreachableError:
            raise
        except JetwayError as exc:
            yield judged("latency", False, str(exc), error=type(exc).__name__)
            return
        yield latency_check(self._found, now, config.max_drift_ratio)
        yield rate_check(variant, self._recipe.gates, now.metrics(variant))

    def _soak(self, session: TargetSession) -> Iterator[Check]:
        if self._soak_minutes is None:
            yield from no_soak_checks()
            return
        try:
            result = self._run_soak(session, self._soak_minutes * 60)
        except TargetUnreachableError:
            raise
        except JetwayError as exc:
            yield judged("soak", False, str(exc), error=type(exc).__name__)
            return
        size = len(next(iter(self._workload.example_inputs().values())))
        yield from soak_checks(result, self._recipe, size)

    def _run_soak(self, session: TargetSession, duration_s: float) -> dict[str, object]:
        stage = f"soak {self._found.row.variant} on {self._target.name}"
        inputs = push_handle(self._context, session, example_inputs(self._context), stage=stage)
        engine = {"path": self._found.remote_path, "sha256": self._found.engine.sha256, "inputs": inputs}
        request = {
            "engine": engine,
            "duration_s": duration_s,
            "window_s": min(duration_s / SOAK_WINDOWS, LONGEST_WINDOW_S),
            "warmup_runs": self._recipe.benchmark.warmup_runs,
        }
        return session.run_job(
            "soak",
            request,
            timeout_s=duration_s + SOAK_EXTRA_S,
            on_progress=relay(self._context.progress, stage),
        )

    @property
    def _workload(self) -> Workload:
        return self._context.workload


def package_answers(session: TargetSession, remote: str) -> Check:
    """Whether the package starts on its own and gives what it gave when it was made."""
    said = run_script(session, remote, "infer.py", "--check").text.strip()
    return judged(
        "package answers", True, said.splitlines()[-1] if said else "it agrees with its expected output"
    )


def package_refuses(session: TargetSession, remote: str) -> Check:
    """An input that is none must be refused in words, not by a traceback."""
    argv = [session.target.python, f"{remote}/infer.py", f"{remote}/README.md"]
    result = session.connection.run(argv, timeout_s=COMMAND_TIMEOUT_S, check=False)
    said = readable(result.stderr).strip()
    explained = result.exit_status == REFUSED and "Traceback" not in said
    last_line = said.splitlines()[-1][-200:] if said else "it took a text file for its input"
    return judged("package refuses bad input", explained, f"exit status {result.exit_status}: {last_line}")
