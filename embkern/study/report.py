"""The report of a study: Markdown with figures beside it, and one HTML page that loads nothing.

Both are rendered from the same sections. The page holds all rows as JSON, and with every number the row and
the key that it comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .._version import __version__
from ..io.atomic import replacing
from ..text.token_names import visible
from .document import Cell, Section, Table, names_of
from .result import PAGE_NAME, Study
from .sections import sections_of

MARKDOWN_NAME, FIGURES_NAME = "report.md", "figures"
_TEMPLATE = Path(__file__).parent.parent / "data" / "study.html"


def write_report(study: Study, directory: Path) -> None:
    """Write the Markdown, its figures and the HTML page."""
    sections = sections_of(study)
    (directory / FIGURES_NAME).mkdir(parents=True, exist_ok=True)
    for picture in (each for section in sections for each in section.pictures):
        _write(directory / FIGURES_NAME / f"{picture.name}.svg", picture.svg)
    _write(directory / MARKDOWN_NAME, to_markdown(study, sections))
    _write(directory / PAGE_NAME, to_html(study, sections))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- Markdown --------------------------------------------------------------------------------------------


def to_markdown(study: Study, sections: Sequence[Section]) -> str:
    """Return the report as Markdown, which shows the figures beside it."""
    parts = [f"# {_plain(_title(study))}", _plain(_about(study)), f"```sh\n{study.command}\n```"]
    for section in sections:
        parts += [f"## {section.title}", *map(_plain, section.paragraphs)]
        parts += [f"![{each.caption}]({FIGURES_NAME}/{each.name}.svg)" for each in section.pictures]
        parts += [_markdown_table(each) for each in section.tables]
        parts += [f"```\n{each}\n```" for each in section.commands]
    measured = [[Cell(row.measure), *names_of(row)] for row in study.rows]
    table = Table(["measures", "method", "asked"], measured, [row.id for row in study.rows], names=3)
    return "\n\n".join([*parts, "## Rows", _markdown_table(table)]) + "\n"


def _markdown_table(table: Table) -> str:
    cited = table.cites is not None
    columns = max(map(len, table.lines))
    lines = [[*map(_plain, table.head or [""] * columns), *(["row"] if cited else [])]]
    lines.append(["---:" if cited and i >= table.names else "---" for i in range(columns)] + ["---"] * cited)
    for i, cells in enumerate(table.lines):
        cite = [_markdown_cell(Cell(cites=table.cites[i]))] if table.cites else []
        empty = [""] * (columns - len(cells))
        lines.append([*map(_markdown_cell, cells), *empty, *cite])
    heading = [f"**{_plain(visible(token))}**\n" for token in table.tokens]
    return "\n".join([*heading, *(f"| {' | '.join(line)} |" for line in lines)])


def _markdown_cell(cell: Cell) -> str:
    tokens = ", ".join(
        f"**{_plain(visible(name))}**" if bold else _plain(visible(name)) for name, bold in cell.tokens
    )
    link = f"[{cell.cites}](rows/{cell.cites}.json)" if cell.cites else ""
    return " ".join(part for part in (tokens, _plain(cell.text), link) if part)


def _plain(text: str) -> str:
    """Escape everything that Markdown or HTML would interpret."""
    return re.sub(r"[&<>|`*_\\\[\]#~$@]|:(?=\S)", lambda found: f"&#{ord(found.group())};", text)


# ---- HTML ------------------------------------------------------------------------------------------------


def to_html(study: Study, sections: Sequence[Section]) -> str:
    """Return the report as one page that loads nothing."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    # ASCII, because a token may hold characters that reverse the direction of the text around them.
    rows = [(row, json.dumps(json.loads(row.model_dump_json()), indent=1)) for row in study.rows]
    return template.render(
        title=_title(study), about=_about(study), study=study, sections=sections, rows=rows
    )


def _title(study: Study) -> str:
    return f"{study.model}: compressed token embeddings"


def _about(study: Study) -> str:
    return (
        f"{len(study.rows)} rows of data, written by embkern {__version__}. Every line of a table names the "
        "row that it comes from. A row holds what it depends on and the command that measures it "
        "again: the command of the study, below, with --row and the row's id."
    )
