"""What the report of a study says: sections of words, pictures and tables, whatever they are written in.

Every cell that shows a number knows the row it is from, and the key of the number in it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures
from .rows import DENSE, Row

if TYPE_CHECKING:
    from . import Study

_WORST = 5  # worst rows shown; a row of data has more
_TOO_WIDE = 1e7  # for a column: a perplexity, where the lengths of rows went astray


@dataclass(frozen=True)
class Cell:
    """A cell of a table: tokens, then a text; a text that is a number of a row says which.

    Attributes:
        text: what is shown.
        row: id of the row that it is from.
        key: where in the row, such as ``result.rmse`` or ``result.sizes.0.dense_us``.
        format: of the number there.
        tokens: names from the vocabulary, of any characters, each with whether it is bold.
        cites: id of a row to link to.
        span: columns that the cell takes.
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
    """A table; ``names`` columns of names, then numbers, then the id of the row of each line, if cited."""

    head: list[str]
    lines: list[list[Cell]]
    cites: list[str] | None = None
    names: int = 2
    tokens: tuple[str, ...] = ()  # what it is about


@dataclass(frozen=True)
class Picture:
    """A picture, and what it shows in words."""

    name: str
    svg: str
    caption: str

    @property
    def data(self) -> str:
        """Return it as a URL that holds it."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, then words, pictures and tables."""

    title: str
    words: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


class _Rows:
    """The rows of a study by what they measure."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.reached = {
            (row.method, row.ratio): row.result["ratio"]
            for row in study.rows
            if row.measure == "table" and row.result
        }

    def of(self, measure: str, dense: bool = False) -> list[Row]:
        """Return the rows of compressed tables that have a result, or of the dense model."""
        return [
            row for row in self.study.rows
            if row.measure == measure and row.result is not None and (row.method == DENSE) == dense
        ]  # fmt: skip

    def lines(self, measure: str, key: str, *, missing: bool = False) -> dict[str, list[tuple[float, float]]]:
        """Return by method the points of a figure: ratio reached, value, or what it misses of 1."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self.of(measure):
            value, reached = value_at(row, key), self.reached.get((row.method, row.ratio))
            if value is not None and reached is not None:
                lines.setdefault(row.method, []).append((reached, 1 - value if missing else value))
        return lines

    def picture(self, name: str, panels: Sequence[figures.Panel], caption: str) -> Picture:
        """Draw panels; a method looks alike in all pictures of the study."""
        asked = self.study.asked
        return Picture(name, figures.draw(panels, asked.methods, asked.ratios), caption)


def value_at(row: Row, key: str) -> Any:
    """Return what is at a dotted key of a row; None if it is not there, or not finite."""
    first, *parts = key.split(".")
    value: Any = getattr(row, first)
    for part in parts:
        if isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
    return value if not isinstance(value, float) or math.isfinite(value) else None


def number(row: Row, key: str, form: str) -> Cell:
    """Return a cell with a number of a row; a dash where there is none."""
    value = value_at(row, key)
    if isinstance(value, float) and abs(value) >= _TOO_WIDE:
        form = ".3g"
    return Cell("–") if value is None else Cell(format(value, form), row.id, key, form)


def document(study: Study) -> list[Section]:
    """Return the sections of a study's report."""
    rows = _Rows(study)
    parts = (_model, _direction, _perplexity, _sentences, _bytes, _lookup, _worst, _neighbors, _missing)
    return [section for part in parts if (section := part(rows)) is not None]


Column = tuple[str, str, str]  # title, key, format


def _listed(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Return a table with a line per row."""
    return Table(
        head=["method", "asked", *(title for title, _, _ in columns)],
        lines=[[*names_of(row), *(number(row, key, form) for _, key, form in columns)] for row in rows],
        cites=[row.id for row in rows],
    )


def names_of(row: Row) -> list[Cell]:
    """Return the cells that say of which method a row is, at which ratio."""
    return [Cell(row.method), number(row, "ratio", "g")]


def _model(rows: _Rows) -> Section:
    (row,) = rows.of("model", dense=True)
    facts = {
        "architecture": ("architecture", ""),
        "rows of the table": ("num_embeddings", ","),
        "width": ("embedding_dim", ","),
        "dtype": ("dtype", ""),
        "bytes of the table": ("table_bytes", ","),
        "bytes of the model": ("model_bytes", ","),
        "share of the table": ("table_share", ".1%"),
        "token frequencies from": ("frequencies", ""),
    }
    lines = [[Cell(name), number(row, f"result.{key}", form)] for name, (key, form) in facts.items()]
    heads = ", ".join(value_at(row, "result.tied_heads")) or "none"
    lines.append([Cell("output heads that share it"), Cell(heads, row.id, "result.tied_heads")])
    return Section("The model", tables=[Table([], lines, cites=[row.id] * len(lines), names=2)])


def _direction(rows: _Rows) -> Section | None:
    found = rows.of("table")
    if not found:
        return None
    kinds = {
        "direction_error": "1 − cos, mean over rows",
        "weighted_direction_error": "1 − cos, mean over tokens read",
    }
    panels = [figures.Panel(title, rows.lines("table", f"result.{key}")) for key, title in kinds.items()]
    columns = [
        ("reached", "result.ratio", ".2f"),
        ("mean", "result.direction_error", ".4f"),
        ("read", "result.weighted_direction_error", ".5f"),
        ("99 %", "result.direction_error_p99", ".4f"),
        ("worst", "result.worst_rows.0.direction_error", ".4f"),
        ("RMSE", "result.rmse", ".5f"),
        ("neighbours kept", "result.neighbor_overlap", ".1%"),
    ]
    return Section(
        "Direction error by rate",
        [
            "Direction error is 1 − cos of a row and its reconstruction: the mean over rows, the mean in "
            "which a row weighs as often as its token is read, the 99th percentile over rows, the worst row. "
            "Asked and reached are bytes of the table as stored over bytes of everything that replaces it."
        ],
        [rows.picture("direction", panels, "Direction error by the ratio reached")],
        [_listed(found, columns)],
    )


def _perplexity(rows: _Rows) -> Section | None:
    dense, found = rows.of("perplexity", dense=True), rows.of("perplexity")
    if not dense:
        return None
    level = value_at(dense[0], "result.perplexity")
    kinds = {"input_only": "only the input table compressed", "tied": "the tied head as well"}
    lines = {kind: rows.lines("perplexity", f"result.{kind}.perplexity") for kind in kinds}
    panels = [figures.Panel(kinds[kind], lines[kind], level) for kind in kinds if lines[kind]]
    columns = [
        ("input only", "result.input_only.perplexity", ",.2f"),
        ("tied head", "result.tied.perplexity", ",.2f"),
        ("tokens scored", "result.input_only.tokens", ","),
    ]
    table = _listed(found, columns)
    own = number(dense[0], "result.perplexity", ",.2f")
    tokens = number(dense[0], "result.tokens", ",")
    first = [Cell(DENSE), Cell("–"), own, own if lines["tied"] else Cell("–"), tokens]
    table = Table(table.head, [first, *table.lines], [dense[0].id, *(table.cites or [])])
    kind = value_at(dense[0], "result.kind")
    caption = "Perplexity by the ratio reached; ↑ leaves the panel"
    return Section(
        "Perplexity",
        [
            f"Of the {kind} language model on {Path(str(rows.study.asked.dataset)).name}, nothing trained. "
            "Input only: tokens are looked up in the compressed table and a tied head keeps the dense one. "
            "The rows tell the protocol."
        ],
        [rows.picture("perplexity", panels, caption)] if panels else [],
        [table],
    )


def _sentences(rows: _Rows) -> Section | None:
    found = rows.of("sentences")
    if not found:
        return None
    panels = [
        figures.Panel("1 − cos, mean", rows.lines("sentences", "result.mean_cosine", missing=True)),
        figures.Panel("1 − Spearman", rows.lines("sentences", "result.spearman", missing=True)),
    ]
    columns = [
        ("mean cos", "result.mean_cosine", ".4f"),
        ("Spearman", "result.spearman", ".4f"),
        ("sentences", "result.sentences", ","),
    ]
    caption = "What is lost of sentence embeddings and of their similarities, by the ratio reached"
    return Section(
        "Sentence embeddings",
        [
            "Cosine of a sentence's embedding before and after, and the rank correlation of the similarities "
            f"of all pairs of sentences of {rows.study.asked.text and rows.study.asked.text.name}."
        ],
        [rows.picture("sentences", panels, caption)],
        [_listed(found, columns)],
    )


def _bytes(rows: _Rows) -> Section | None:
    found = rows.of("table")
    columns = [
        ("table", "result.table_bytes", ","),
        ("compressed", "result.compressed_bytes", ","),
        ("model", "result.model_bytes", ","),
        ("with it", "result.compressed_model_bytes", ","),
        ("seconds", "result.compress_seconds", ".1f"),
    ]
    words = "Tensor bytes as stored, and how long the method took. A dash: no model can hold what it makes."
    return Section("Bytes", [words], tables=[_listed(found, columns)]) if found else None


def _lookup(rows: _Rows) -> Section | None:
    found = rows.of("lookup")
    if not found:
        return None
    columns: list[Column] = []
    for i, size in enumerate(value_at(found[0], "result.sizes")):
        columns += [
            (f"N = {size['ids']:,}, dense", f"result.sizes.{i}.dense_us", ",.1f"),
            ("compressed", f"result.sizes.{i}.compressed_us", ",.1f"),
            ("×", f"result.sizes.{i}.times_as_fast", ".2f"),
        ]
    return Section(
        "Looking up",
        [
            "Microseconds to look up N ids, drawn by their frequencies; both tables take turns. Medians, and "
            "the median of the ratios within a round: × above 1 is faster than dense. "
            f"{found[0].environment['cpu']}, torch {found[0].environment['torch']}."
        ],
        tables=[_listed(found, columns)],
    )


def _worst(rows: _Rows) -> Section | None:
    found = rows.of("table")
    if not found:
        return None
    count = min(_WORST, *(len(value_at(row, "result.worst_rows")) for row in found))
    lines = []
    for row in found:
        worst = value_at(row, "result.worst_rows")[:count]
        cells = []
        for i, each in enumerate(worst):
            name = each["token"] if each["token"] is not None else f"#{each['id']}"
            error = number(row, f"result.worst_rows.{i}.direction_error", ".4f")
            cells.append(replace(error, tokens=((name, False),)))
        lines.append([*names_of(row), *cells])
    table = Table(["method", "asked", *map(str, range(1, count + 1))], lines, [row.id for row in found])
    return Section(
        "Worst rows", ["Tokens whose rows lost their direction most, with 1 − cos."], tables=[table]
    )


def _neighbors(rows: _Rows) -> Section | None:
    (dense,) = rows.of("neighbors", dense=True)
    found = {(row.method, row.ratio): row for row in rows.of("neighbors")}
    methods, ratios = (list(dict.fromkeys(each)) for each in zip(*found, strict=True)) if found else ([], [])
    tables = []
    for i, word in enumerate(value_at(dense, "result.words")):
        lines = [[Cell(DENSE), replace(_near(dense, i), span=max(1, len(ratios)))]]
        for method in methods:
            cells = [found.get((method, ratio)) for ratio in ratios]
            lines.append([Cell(method), *(_near(row, i) if row else Cell("–") for row in cells)])
        head = ["", *(f"{ratio:g}×" for ratio in ratios)]
        tables.append(Table(head, lines, names=1, tokens=(word["token"],)))
    return Section(
        "Nearest neighbours",
        ["The nearest rows by cosine, by the ratio asked for. Bold: kept, and how many are. Last, the rows."],
        tables=[*tables, _cited(dense, methods, ratios, found)],
    )


def _cited(dense: Row, methods: list, ratios: list, found: dict) -> Table:
    """Return a table of the rows that the lists of neighbours are from."""
    lines = [[Cell(DENSE), Cell(cites=dense.id, span=max(1, len(ratios)))]]
    for method in methods:
        rows = (found.get((method, ratio)) for ratio in ratios)
        lines.append([Cell(method), *(Cell(cites=row.id) if row else Cell("–") for row in rows)])
    return Table(["", *(f"{ratio:g}×" for ratio in ratios)], lines, names=1)


def _near(row: Row, index: int) -> Cell:
    word = value_at(row, f"result.words.{index}")
    tokens = tuple((each["token"], each["kept"]) for each in word["neighbors"])
    return replace(number(row, f"result.words.{index}.kept", "d"), tokens=tokens)


def _missing(rows: _Rows) -> Section | None:
    found: dict[tuple, list[Row]] = {}
    for row in rows.study.rows:
        if row.reason is not None:
            found.setdefault((row.method, row.ratio, row.reason), []).append(row)
    lines = [
        [
            *names_of(group[0]),
            Cell(", ".join(row.measure for row in group)),
            Cell(reason, group[0].id, "reason"),
        ]
        for (_, _, reason), group in found.items()
    ]
    cites = [group[0].id for group in found.values()]
    table = Table(["method", "asked", "what", "why"], lines, cites, names=4)
    return Section("Not measured", tables=[table]) if found else None
