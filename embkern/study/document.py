"""The elements of a study's report: sections of paragraphs, pictures and tables, in no particular format.

Every cell that shows a number names the row that it comes from, and the key of the number in that row.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

from .rows import Row

_TOO_WIDE = 1e7  # shown in scientific notation, such as the perplexity of a ruined model


@dataclass(frozen=True)
class Cell:
    """A cell of a table: tokens, then a text, with the source of the text if it is a number of a row.

    Attributes:
        text: the shown text.
        row: id of the row that the number comes from.
        key: the number's place in the row, such as ``result.rmse`` or ``result.sizes.0.dense_us``.
        format: format specification of the number.
        tokens: names of tokens, which may hold any characters, each with whether it is bold.
        cites: id of a row that the cell links to.
        span: number of columns that the cell covers.
    """

    text: str = ""
    row: str | None = None
    key: str | None = None
    format: str | None = None
    tokens: tuple[tuple[str, bool], ...] = ()
    cites: str | None = None
    span: int = 1


@dataclass(frozen=True)
class Table:
    """A table: ``names`` columns of names, then columns of numbers.

    Attributes:
        cites: id of the row of each line, shown in a last column.
        tokens: names of tokens that stand above the table.
    """

    head: list[str]
    lines: list[list[Cell]]
    cites: list[str] | None = None
    names: int = 2
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture with its caption."""

    name: str
    svg: str
    caption: str

    @property
    def data(self) -> str:
        """Return the picture as a data URL."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, then paragraphs, pictures, tables and commands."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def value_at(row: Row, key: str) -> Any:
    """Return the value at a dotted key of a row, None if it is missing or not finite."""
    first, *parts = key.split(".")
    value: Any = getattr(row, first)
    for part in parts:
        if isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
    return value if not isinstance(value, float) or math.isfinite(value) else None


def number(row: Row, key: str, form: str) -> Cell:
    """Return a cell with a number of a row, or with a dash if there is none."""
    value = value_at(row, key)
    if isinstance(value, float) and abs(value) >= _TOO_WIDE:
        form = ".3g"
    return Cell("–") if value is None else Cell(format(value, form), row.id, key, form)


def names_of(row: Row) -> list[Cell]:
    """Return the cells that name the method of a row and the ratio asked for."""
    return [Cell(row.method), number(row, "ratio", "g")]
