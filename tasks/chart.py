"""Charts as PNG files of the store. matplotlib is imported when one is drawn: it costs a second."""

from __future__ import annotations

from typing import Any

from jetway.tasks.artifacts import Figure
from jetway.tasks.store import Store

DPI = 120


def new_canvas(width_in: float, height_in: float) -> Any:
    """An empty matplotlib figure of that size in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def add_chart(store: Store, canvas: Any, parents: tuple[str, ...] = ()) -> Figure:
    """Draws the canvas into the store; the same drawing gives the same file."""
    with store.scratch() as folder:
        path = folder / "chart.png"
        canvas.savefig(path, metadata={"Software": None})
        return store.add(Figure, path, parents=parents)
