"""The report of a run as one page."""

from __future__ import annotations

from collections.abc import Sequence

from jetway.tasks.report.headline import run_headline
from jetway.tasks.report.material import RunMaterial
from jetway.tasks.report.page import render
from jetway.tasks.report.sections import target_section
from jetway.tasks.report.tables import gates_table, ladder_table, lineage_table, validity_table
from jetway.tasks.results import Validity, VariantResult, failed
from jetway.tasks.table import outcome_line, table_notes
from jetway.tasks.target_info import TargetInfo


def report_html(run: RunMaterial) -> str:
    """The whole page. Names and texts of the run are escaped wherever they stand."""
    targets = enumerate(run.target_names(), 1)
    return render(
        "run.html.jinja",
        title=run.name,
        simulated=run.simulated,
        run=run,
        headline=run_headline(run.rows, failed_targets=len(failed(run.without_result)), ladder=run.ladder),
        without_result=[outcome_line(one) for one in run.without_result],
        sections=[target_section(run, name, f"target-{index}") for index, name in targets],
        ladder=ladder_table(run.ladder),
        gates=gates_table(run.rows),
        validity=validity_table(run),
        notes=notes_of(run.rows),
        origin=origin_of(run),
        lineage=lineage_table(run.lineage),
    )


def notes_of(rows: Sequence[VariantResult]) -> list[str]:
    """What else is to be known of the figures; validity and gates have places of their own."""
    return table_notes([row.model_copy(update={"validity": Validity(), "gates": ()}) for row in rows])


def origin_of(run: RunMaterial) -> dict[str, str]:
    """Which run this is, what code made it, and which machines it ran on."""
    known = run.environment
    packages = known.get("packages", {})
    made = {
        "run": f"{run.name}, {run.run_id}",
        "commit of the project": known.get("git_commit", ""),
        "host": ", ".join(filter(None, (known.get("cpu"), known.get("platform")))),
        "packages": ", ".join(
            f"{name} {version}" for name, version in {"Python": known.get("python", ""), **packages}.items()
        ),
    }
    targets = {f"target {name}": _facts(found.info) for name, found in run.targets.items() if found.info}
    return {key: value for key, value in {**made, **targets}.items() if value}


def _facts(info: TargetInfo) -> str:
    engines = [f"{name} {engine.version}" for name, engine in info.engines.items() if engine.available]
    jetpack = [f"JetPack {info.jetpack}"] if info.jetpack else []
    mode = [f"power mode {info.power_mode}"] if info.power_mode else []
    return ", ".join([info.machine, info.os, *jetpack, f"kernel {info.kernel}", *mode, *engines])
