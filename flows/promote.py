"""``jetway promote``: moves the alias ``champion`` to what a finished run made of a variant."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jetway.flows.record import REPORT_PATH, worst_gate
from jetway.flows.stored_run import StoredRun
from jetway.tasks.deployment import ENGINE_PATH, MODEL_PATH
from jetway.tasks.errors import ConfigError
from jetway.tasks.gates import winner
from jetway.tasks.results import VariantResult
from jetway.tasks.table import human_bytes
from jetway.tasks.tracking.registry import Champion, model_name
from jetway.tasks.tracking.tracker import Tracker

PACKAGE_PATH = "package.zip"


def promote_run(id_or_prefix: str, variant: str | None, targets: Sequence[str]) -> None:
    """Promotes a variant of a run on each class of its targets: the one named, or the fastest that missed no gate.

    Of several targets of a class, which have one champion, the first gives it.
    Raises TrackingError for a run that is not there, ConfigError for a variant or a target that it does not have,
    and where targets of a class have several winners.
    """
    run = StoredRun(Tracker(), id_or_prefix)
    classes = by_class(run, rows_to_promote(run.result.rows, variant, targets))
    for target_class, (row, *others) in classes.items():
        champion = promote_row(run, row, "promoted by hand")
        print(f"{champion.title} is the champion now.")
        for other in others:
            print(f"{other.target} shares the champion of {row.target}, as its class is {target_class}.")


def by_class(run: StoredRun, rows: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """The rows of each class of targets. Raises ConfigError where those of a class are not of one variant."""
    classes: dict[str, list[VariantResult]] = {}
    for row in rows:
        classes.setdefault(class_of(run, row), []).append(row)
    for target_class, sharing in classes.items():
        if len({row.variant for row in sharing}) > 1:
            winners = ", ".join(f"{row.variant} on {row.target}" for row in sharing)
            raise ConfigError(
                f"The class {target_class} has one champion, and its targets have several winners: {winners}. "
                "Name one with --variant, or one target with --target."
            )
    return classes


def rows_to_promote(
    rows: Sequence[VariantResult], variant: str | None, targets: Sequence[str]
) -> list[VariantResult]:
    """One row a target. Raises ConfigError where there is none."""
    names = targets or list(dict.fromkeys(row.target for row in rows))
    return [_row_to_promote([row for row in rows if row.target == name], variant, name) for name in names]


def class_of(run: StoredRun, row: VariantResult) -> str:
    """The class of the row's target when it ran."""
    return run.tracker.run(run.child(row)).tags.get("target_class", row.target)


def promote_row(run: StoredRun, row: VariantResult, why: str) -> Champion:
    """Makes a row's run a version with its files and, where it was packaged, its package, and the champion."""
    tracker, child = run.tracker, run.child(row)
    target_class = class_of(run, row)
    files = tracker.files(child)
    attach_package(run, row, child)
    tags = {
        "target_class": target_class,
        "why": why,
        "engine_sha256": files[ENGINE_PATH].sha256,
        "onnx_sha256": files[MODEL_PATH].sha256,
    }
    return tracker.promote(
        model_name(run.recipe.name, target_class), child, description_of(run, row, why), tags
    )


def attach_package(run: StoredRun, row: VariantResult, child: str) -> None:
    """The package of a target's winner lies with the whole run; a version has the files of the variant's own."""
    if run.record.tags.get(f"package.{row.target}") != row.variant:
        return
    path = f"targets/{row.target}/{PACKAGE_PATH}"
    with tempfile.TemporaryDirectory() as folder:
        local = run.tracker.load_file(run.run_id, path, Path(folder))
        run.tracker.log_files(child, {PACKAGE_PATH: (run.tracker.files(run.run_id)[path], local)})


def description_of(run: StoredRun, row: VariantResult, why: str) -> str:
    """What MLflow's page of the version says, with links to the report and to the files."""
    tracker, child = run.tracker, run.child(row)
    links = {
        "report of its run": tracker.page_of(run.run_id, REPORT_PATH),
        "engine": tracker.page_of(child, ENGINE_PATH),
    }
    if PACKAGE_PATH in tracker.files(child):
        links["package to deploy"] = tracker.page_of(child, PACKAGE_PATH)
    latency_ms, size_bytes = row.value("latency_ms_p50"), row.value("size_bytes")
    measured = f"p50 {latency_ms:.3g} ms, " if latency_ms is not None and row.validity.valid else ""
    simulated = "SIMULATED. " if row.simulated else ""
    return (
        f"{simulated}{row.variant} on {row.target} ({row.board}), {row.engine}: {measured}"
        f"{human_bytes(size_bytes)}, gates {worst_gate([row]) or 'none'}; {why}.\n\n"
        + ", ".join(f"[{name}]({page})" for name, page in links.items())
    )


def _row_to_promote(rows: Sequence[VariantResult], variant: str | None, target: str) -> VariantResult:
    if not rows:
        raise ConfigError(f"The run has nothing on {target!r}. jetway show RUN prints what it has.")
    if variant is None:
        best = winner(rows)
        if best is None:
            raise ConfigError(
                f"Every variant missed a gate on {target}. Name one with --variant to promote it all the same."
            )
        return best
    found = [row for row in rows if row.variant == variant]
    if not found:
        names = ", ".join(row.variant for row in rows)
        raise ConfigError(f"The run has no variant {variant!r} on {target}. It has {names}.")
    return found[0]
