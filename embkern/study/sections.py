"""The sections of a study's report: which figures it shows, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import figures
from .document import Cell, Picture, Section, Table, names_of, number, value_at
from .result import Study
from .rows import DENSE, Row
from .verdict import section_of

_WORST = 5  # number of worst rows in the report; a row of data has more


class _Results:
    """The rows of a study that have a result, by measure."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.reached = {
            (row.method, row.ratio): row.result["ratio"]
            for row in study.rows
            if row.measure == "table" and row.result
        }

    def of(self, measure: str, dense: bool = False) -> list[Row]:
        """Return the rows of compressed tables, or of the dense model."""
        return [
            row for row in self.study.rows
            if row.measure == measure and row.result is not None and (row.method == DENSE) == dense
        ]  # fmt: skip

    def lines(self, measure: str, key: str, *, missing: bool = False) -> dict[str, list[tuple[float, float]]]:
        """Return the points of a figure by method: ratio reached and value, or 1 - value if ``missing``."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self.of(measure):
            value, reached = value_at(row, key), self.reached.get((row.method, row.ratio))
            if value is not None and reached is not None:
                lines.setdefault(row.method, []).append((reached, 1 - value if missing else value))
        return lines

    def picture(self, name: str, panels: Sequence[figures.Panel], caption: str) -> Picture:
        """Draw panels; a method has the same style in all pictures of the study."""
        options = self.study.options
        return Picture(name, figures.draw(panels, options.methods, options.ratios), caption)


def sections_of(study: Study) -> list[Section]:
    """Return the sections of a study's report."""
    results = _Results(study)
    parts = (
        _model,
        _direction,
        _perplexity,
        _sentences,
        _bytes,
        _lookup,
        _head,
        _worst,
        _neighbors,
        _missing,
    )
    sections = [section_of(study), *(part(results) for part in parts)]
    return [section for section in sections if section is not None]


Column = tuple[str, str, str]  # title, key, format


def _listed(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Return a table with a line per row."""
    return Table(
        head=["method", "asked", *(title for title, _, _ in columns)],
        lines=[[*names_of(row), *(number(row, key, form) for _, key, form in columns)] for row in rows],
        cites=[row.id for row in rows],
    )


def _model(results: _Results) -> Section:
    (row,) = results.of("model", dense=True)
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


def _direction(results: _Results) -> Section | None:
    found = results.of("table")
    if not found:
        return None
    kinds = {
        "direction_error": "1 − cos, mean over rows",
        "weighted_direction_error": "1 − cos, mean over tokens read",
    }
    panels = [figures.Panel(title, results.lines("table", f"result.{key}")) for key, title in kinds.items()]
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
            "Direction error is 1 − cos of a row and its reconstruction: the mean over rows, the mean "
            "weighted by token frequencies (read), the 99th percentile over rows, and the worst row. Ratios, "
            "asked for or reached, are bytes of the stored table over bytes of everything that replaces it."
        ],
        [results.picture("direction", panels, "Direction error by the ratio reached")],
        [_listed(found, columns)],
    )


def _perplexity(results: _Results) -> Section | None:
    dense, found = results.of("perplexity", dense=True), results.of("perplexity")
    if not dense:
        return None
    level = value_at(dense[0], "result.perplexity")
    kinds = {"input_only": "input embedding compressed", "tied": "tied head compressed as well"}
    lines = {kind: results.lines("perplexity", f"result.{kind}.perplexity") for kind in kinds}
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
    dataset = Path(str(results.study.options.dataset)).name
    caption = "Perplexity by the ratio reached; ↑ marks a line that leaves the panel"
    return Section(
        "Perplexity",
        [
            f"Perplexity of the {kind} language model on {dataset}, without training. Input only: the "
            "input embedding is compressed and a tied head keeps the dense table. Tied head: both use the "
            "compressed table. The rows hold the protocol."
        ],
        [results.picture("perplexity", panels, caption)] if panels else [],
        [table],
    )


def _sentences(results: _Results) -> Section | None:
    found = results.of("sentences")
    if not found:
        return None
    panels = [
        figures.Panel("1 − cos, mean", results.lines("sentences", "result.mean_cosine", missing=True)),
        figures.Panel("1 − Spearman", results.lines("sentences", "result.spearman", missing=True)),
    ]
    columns = [
        ("mean cos", "result.mean_cosine", ".4f"),
        ("Spearman", "result.spearman", ".4f"),
        ("sentences", "result.sentences", ","),
    ]
    text = results.study.options.text
    caption = "Loss of sentence embeddings and of their similarities, by the ratio reached"
    return Section(
        "Sentence embeddings",
        [
            "Cosine of a sentence's embedding before and after compression, and the rank correlation of the "
            f"similarities of all pairs of sentences of {text and text.name}."
        ],
        [results.picture("sentences", panels, caption)],
        [_listed(found, columns)],
    )


def _bytes(results: _Results) -> Section | None:
    found = results.of("table")
    columns = [
        ("table", "result.table_bytes", ","),
        ("compressed", "result.compressed_bytes", ","),
        ("model", "result.model_bytes", ","),
        ("compressed model", "result.compressed_model_bytes", ","),
        ("seconds", "result.compress_seconds", ".1f"),
    ]
    paragraph = "Bytes of tensors as stored, and seconds of the method. A dash: a tied head cannot use it."
    return Section("Bytes", [paragraph], tables=[_listed(found, columns)]) if found else None


def _lookup(results: _Results) -> Section | None:
    what = "lookup of N ids, drawn by their frequencies"
    return _speed(results, "lookup", "Lookup speed", what, "ids")


def _head(results: _Results) -> Section | None:
    return _speed(results, "head", "Speed of the tied head", "call with N hidden states", "states")


def _speed(results: _Results, measure: str, title: str, what: str, unit: str) -> Section | None:
    found = results.of(measure)
    if not found:
        return None
    columns: list[Column] = []
    for i, size in enumerate(value_at(found[0], "result.sizes")):
        columns += [
            (f"N = {size[unit]:,}, dense", f"result.sizes.{i}.dense_us", ",.1f"),
            ("compressed", f"result.sizes.{i}.compressed_us", ",.1f"),
            ("×", f"result.sizes.{i}.times_as_fast", ".2f"),
        ]
    return Section(
        title,
        [
            f"Microseconds per {what}, in alternating rounds: medians, "
            "and the median of the ratios within a round (×, above 1 where the compressed table is faster). "
            f"{found[0].environment['cpu']}, torch {found[0].environment['torch']}."
        ],
        tables=[_listed(found, columns)],
    )


def _worst(results: _Results) -> Section | None:
    found = results.of("table")
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
        "Worst rows", ["The tokens whose rows have the largest direction error, 1 − cos."], tables=[table]
    )


def _neighbors(results: _Results) -> Section | None:
    (dense,) = results.of("neighbors", dense=True)
    found = {(row.method, row.ratio): row for row in results.of("neighbors")}
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
        [
            "The nearest rows by cosine, by the ratio asked for. Neighbours that compression kept are bold, "
            "followed by their number. The last table links to the rows."
        ],
        tables=[*tables, _cited(dense, methods, ratios, found)],
    )


def _cited(dense: Row, methods: list, ratios: list, found: dict) -> Table:
    """Return a table of the rows that the lists of neighbours come from."""
    lines = [[Cell(DENSE), Cell(cites=dense.id, span=max(1, len(ratios)))]]
    for method in methods:
        rows = (found.get((method, ratio)) for ratio in ratios)
        lines.append([Cell(method), *(Cell(cites=row.id) if row else Cell("–") for row in rows)])
    return Table(["", *(f"{ratio:g}×" for ratio in ratios)], lines, names=1)


def _near(row: Row, index: int) -> Cell:
    word = value_at(row, f"result.words.{index}")
    tokens = tuple((each["token"], each["kept"]) for each in word["neighbors"])
    return replace(number(row, f"result.words.{index}.kept", "d"), tokens=tokens)


def _missing(results: _Results) -> Section | None:
    found: dict[tuple, list[Row]] = {}
    for row in results.study.rows:
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
