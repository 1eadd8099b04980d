"""HTML pages that need nothing else: one file, no script, no network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jetway.tasks.report import words

FOLDER = Path(__file__).parent


def render(template: str, *, title: str, simulated: bool, **content: Any) -> str:
    """A whole page from a template of this folder. What is no Markup is escaped, wherever it stands."""
    return (
        _environment()
        .get_template(template)
        .render(title=title, simulated=simulated, words=words, style=_style(), **content)
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> Markup:
    return Markup((FOLDER / "style.css").read_text())
