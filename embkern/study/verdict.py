"""The verdict of a study: at each ratio the best method, what it loses and saves, and how to make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..methods import METHODS
from .document import Cell, Section, Table, names_of, number, value_at
from .result import Study
from .rows import DENSE, Row
from .spec import MethodSpec, StudyOptions, quoted

# Options of methods that `embkern compress` has a flag for; others need a call in Python.
FLAGS = {
    "activation", "batch_size", "center", "epochs", "exponent", "floor", "init", "lr", "seed", "speed"
}  # fmt: skip
SAVED = "result.model_saved"


class Criterion(NamedTuple):
    """What methods are judged by: a number of the rows of a measure."""

    measure: str
    key: str
    format: str
    title: str
    phrase: str
    higher: bool = False


# The first one that a study has is used: what the model does comes before what its table looks like.
CRITERIA = (
    Criterion("perplexity", "result.tied.perplexity", ",.2f", "perplexity", "lowest perplexity"),
    Criterion("perplexity", "result.input_only.perplexity", ",.2f", "perplexity", "lowest perplexity"),
    Criterion(
        "sentences", "result.spearman", ".4f", "Spearman",
        "highest rank correlation of sentence similarities with those of the dense model", higher=True,
    ),
    Criterion(
        "table", "result.weighted_direction_error", ".5f", "1 − cos, read",
        "lowest direction error, weighted by token frequencies",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Best:
    """The best method at a ratio.

    Attributes:
        criterion: what it is the best by.
        row: the row with that number.
        table: the row with its bytes.
        command: makes the model.
    """

    criterion: Criterion
    row: Row
    table: Row
    command: str

    @property
    def figures(self) -> tuple[str, str]:
        """The number, and the share of the model's bytes that is saved, as they are shown."""
        return number(self.row, self.criterion.key, self.criterion.format).text, self._saved.text

    @property
    def line(self) -> list[Cell]:
        """The cells of the report."""
        figure = number(self.row, self.criterion.key, self.criterion.format)
        return [*names_of(self.row), figure, self._saved]

    @property
    def _saved(self) -> Cell:
        saved = number(self.table, SAVED, ".1%")
        return Cell(saved.text, saved.row, saved.key, saved.format, cites=self.table.id)


def verdicts_of(study: Study) -> list[Best]:
    """Return the best method at each ratio."""
    specs = {spec.text: spec for spec in study.options.specs()}
    tables = {(row.method, row.ratio): row for row in _measured(study, "table") if row.method in specs}
    for criterion in CRITERIA:
        found = [
            row for row in _measured(study, criterion.measure)
            if (row.method, row.ratio) in tables and value_at(row, criterion.key) is not None
        ]  # fmt: skip
        if found:
            break
    else:
        return []
    best: dict[Any, Row] = {}
    for row in found:
        value, known = value_at(row, criterion.key), best.get(row.ratio)
        if known is None or (value > value_at(known, criterion.key)) == criterion.higher:
            best[row.ratio] = row
    return [
        Best(
            criterion,
            best[ratio],
            tables[best[ratio].method, ratio],
            command_of(study.options, specs[best[ratio].method], ratio, causal=_is_causal(study)),
        )
        for ratio in study.options.ratios
        if ratio in best
    ]


def section_of(study: Study) -> Section | None:
    """Return the section of the report, or None where no method has a result."""
    found = verdicts_of(study)
    if not found:
        return None
    criterion = found[0].criterion
    text = (
        f"At each ratio the method with the {criterion.phrase}, the share of the whole model's bytes that it "
        "saves, and the command that makes the model."
    )
    if _is_causal(study):
        text += (
            " Without --no-calibrate, embkern compress first calibrates on samples of the model itself; that "
            "lowers the error further and is not measured here."
        )
    table = Table(
        ["method", "asked", criterion.title, "smaller by"],
        [best.line for best in found],
        [best.row.id for best in found],
    )
    return Section("Verdict", [text], tables=[table], commands=[best.command for best in found])


def command_of(options: StudyOptions, spec: MethodSpec, ratio: float, *, causal: bool = False) -> str:
    """Return the command, or the call in Python, that makes the model of a method at a ratio."""
    output = f"{spec.name}-{ratio:g}x"
    calibrates = causal and spec.name == "allocate"
    fisher = options.fisher if METHODS[spec.name].of_fisher else None
    if spec.options.keys() <= FLAGS:
        flags = [word for name, value in spec.options.items() for word in _flag(name, value)]
        parts = ["embkern", "compress", options.model, "--ratio", f"{ratio:g}", "--method", spec.name, *flags]
        parts += [] if options.counts is None else ["--counts", str(options.counts)]
        parts += [word for source in options.count_text for word in ("--count-text", source)]
        parts += [] if fisher is None else ["--fisher", str(fisher)]
        parts += ["--no-calibrate"] if calibrates else []
        return " ".join(map(quoted, [*parts, "-o", output]))
    given: dict[str, Any] = {"ratio": ratio, "method": spec.name, **spec.options}
    if options.counts is not None:
        given["counts"] = str(options.counts)
    if options.count_text:
        given["count_text"] = options.count_text
    if fisher is not None:
        given["fisher"] = str(fisher)
    if calibrates:
        given["calibrate"] = False
    return f"embkern.compress({options.model!r}, {_keywords({**given, 'output': output})})"


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] * value if isinstance(value, bool) else [flag, str(value)]


def _keywords(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _measured(study: Study, measure: str) -> list[Row]:
    return [row for row in study.rows if row.measure == measure and row.result and row.method != DENSE]


def _is_causal(study: Study) -> bool:
    return any(row.measure == "model" and value_at(row, "result.kind") == "causal" for row in study.rows)
