"""The report of a run as one page."""

from __future__ import annotations

from collections.abc import Sequence

from jetway.tasks.report.headline import run_headline
from jetway.tasks.report.material import RunMaterial
from jetway.tasks.report.origin import origin_of
from jetway.tasks.report.page import render
from jetway.tasks.report.sections import target_section
from jetway.tasks.report.tables import (
    calibration_table,
    gates_table,
    ladder_table,
    lineage_table,
    validity_table,
)
from jetway.tasks.results import Validity, VariantResult, failed
from jetway.tasks.table import outcome_line, table_notes


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
        calibration=[calibration_table(one) for one in run.calibration],
        origin=origin_of(run),
        lineage=lineage_table(run.lineage),
    )


def notes_of(rows: Sequence[VariantResult]) -> list[str]:
    """What else is to be known of the figures; validity and gates have places of their own."""
    return table_notes([row.model_copy(update={"validity": Validity(), "gates": ()}) for row in rows])
