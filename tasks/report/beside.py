"""The same tables of two runs as one: rows of the same thing stand one under the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jetway.tasks.report.tables import Cell, Table

Sides = tuple[str, str]
#: What is compared, where nothing else is said.
RUNS: Sides = ("first run", "second run")
SIDE_TITLE = "run"
DIFFERS = "≠"

Row = Mapping[str, Cell]


def beside(
    tables: tuple[Table | None, Table | None], keys: Sequence[str], caption: str, *, marked: bool = False
) -> Table | None:
    """Both runs' rows in the order of the second, which ``keys`` tell apart; None without tables.

    ``keys`` are titles of columns, whose first comes first. Where it is ``marked``, cells that differ say so.
    """
    titles = {cell.value: cell for table in tables if table for cell in table.titles}
    if not titles:
        return None
    first, second = (_by_key(table, keys) for table in tables)
    columns = [keys[0], SIDE_TITLE, *(title for title in titles if title != keys[0])]
    pairs = [(first.get(key, {}), second.get(key, {})) for key in dict.fromkeys([*second, *first])]
    return Table(
        caption=caption,
        titles=tuple(titles.get(title, Cell(title)) for title in columns),
        rows=tuple(row for pair in pairs for row in _rows(pair, columns, marked=marked)),
    )


def _by_key(table: Table | None, keys: Sequence[str]) -> dict[tuple[str, ...], Row]:
    if table is None:
        return {}
    titles = [cell.value for cell in table.titles]
    rows = [dict(zip(titles, cells, strict=True)) for cells in table.rows]
    return {tuple(row[key].value for key in keys): row for row in rows}


def _rows(pair: tuple[Row, Row], columns: Sequence[str], *, marked: bool) -> list[tuple[Cell, ...]]:
    differing = {title for title in columns if marked and all(pair) and _differ(pair, title)}
    named = [{**row, SIDE_TITLE: Cell(name)} for row, name in zip(pair, RUNS, strict=True) if row]
    cells = [tuple(_cell(row, title, marked=title in differing) for title in columns) for row in named]
    return [*(tuple(map(_above, row)) for row in cells[:-1]), *cells[-1:]]


def _above(cell: Cell) -> Cell:
    """Of a row that the other run's stands under."""
    return replace(cell, class_=f"{cell.class_} paired")


def _differ(pair: tuple[Row, Row], title: str) -> bool:
    before, after = (row.get(title, Cell("")).value for row in pair)
    return before != after


def _cell(row: Row, title: str, *, marked: bool) -> Cell:
    cell = row.get(title, Cell(""))
    return replace(cell, value=f"{DIFFERS} {cell.value}", class_=f"{cell.class_} differs") if marked else cell
