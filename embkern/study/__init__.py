"""A whole study in one call: several methods at several ratios, a row of data per figure, one report.

Every row is a file of its own, named by a hash of what it depends on. A study that was interrupted goes on
with the rows that are missing, and one with another ratio or method measures what is new.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from tqdm import tqdm

from .._version import __version__
from ..fidelity import read_sentences
from ..io.atomic import check_writable_directory, replacing
from ..methods.base import check_table
from ..models.find_table import UnsupportedModelError, find_table
from ..models.loading import load_model, load_tokenizer
from ..models.report import public_name
from ..text.frequencies import token_frequencies
from . import measures
from .asked import Asked
from .measures import Candidate, Subject
from .report import PAGE_NAME, write_report
from .rows import DENSE, Plan, Row, RowFiles, model_fingerprint, text_fingerprint

ROWS_NAME = "rows.json"

_OF_DENSE: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "model": measures.describe_model,
    "neighbors": lambda subject: measures.measure_neighbors(subject, None),
    "perplexity": measures.measure_dense_perplexity,
}
_OF_CANDIDATE: dict[str, Callable[[Subject, Candidate], dict[str, Any]]] = {
    "table": measures.measure_table,
    "neighbors": measures.measure_neighbors,
    "lookup": measures.measure_lookup,
    "sentences": measures.measure_sentences,
    "perplexity": measures.measure_perplexity,
    "saved": measures.save_model,
}
_OF_MODELS = ("lookup", "saved")  # for what a model can hold


class Study(BaseModel):
    """All rows of a study, and how it was asked for."""

    model: str = Field(description="a hub name, or a directory's last part")
    command: str
    asked: Asked
    rows: list[Row]
    measured: int = Field(description="rows that were not there before")
    seconds: float

    @property
    def page(self) -> Path:
        """The report as a page."""
        return self.asked.output / PAGE_NAME


def compare(
    model: str | os.PathLike,
    *,
    output: str | os.PathLike,
    overwrite: bool = False,
    progress: bool | None = None,
    **asked: Any,
) -> Study:
    """Compress a model's table by every method at every ratio, measure what is left, write a report.

    Args:
        model: a directory, or a name on the hub.
        output: directory of the report: ``report.md`` with ``figures``, ``report.html`` (one file that loads
            nothing), ``rows.json``, and ``rows``, from which an interrupted study goes on.
        overwrite: measure rows again that are there.
        progress: show a bar on stderr; None shows it on a terminal.
        asked: the fields of ``Asked``: ``ratios``, ``methods``, ``text``, ``counts``, ...

    Returns:
        All rows. One whose method cannot reach its ratio says why.

    Raises:
        ValueError: an argument is wrong, or the model's embedding cannot be replaced; it names what.
        FileNotFoundError: the model, the text or the counts do not exist.
        ImportError: a package that the report needs is not installed.
    """
    started = time.perf_counter()
    question = _parse(model, output, asked)
    subject = _subject(question, progress)
    plans = _plans(question, subject)
    files = RowFiles(question.output / "rows")
    rows = {} if overwrite else {plan.id: row for plan in plans if (row := files.get(plan))}
    missing = [plan for plan in plans if plan.id not in rows]
    with tqdm(
        total=len(plans), initial=len(rows), desc="compare", unit="row",
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        for row in _measured(missing, question, subject, bar):
            files.put(row)
            rows[row.id] = row
            bar.update()
    study = Study(
        model=public_name(question.model),
        command=question.command(),
        asked=question,
        rows=[rows[plan.id] for plan in plans],
        measured=len(missing),
        seconds=round(time.perf_counter() - started, 1),
    )
    with replacing(question.output / ROWS_NAME) as temporary:
        temporary.write_text(study.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_report(study, question.output)
    return study


def compare_row(model: str | os.PathLike, row: str, *, output: str | os.PathLike, **asked: Any) -> Row:
    """Measure one row of a study again, and keep it; the report stays as it is.

    Raises:
        ValueError: the study has no such row: the model, a text, an option or the version is another.
        FileNotFoundError: as of ``compare``.
    """
    question = _parse(model, output, asked)
    subject = _subject(question, progress=None)
    plans = {plan.id: plan for plan in _plans(question, subject)}
    if row not in plans:
        raise ValueError(
            f"row: {row!r} is none of this study's {len(plans)} rows; it was of another model, text, seed, "
            f"option or version than embkern {__version__}"
        )
    (measured,) = _measured([plans[row]], question, subject)
    RowFiles(question.output / "rows").put(measured)
    return measured


def _parse(model: str | os.PathLike, output: str | os.PathLike, asked: dict[str, Any]) -> Asked:
    question = Asked.parse(model=os.fspath(model), output=output, **asked)
    for package in ("jinja2", "matplotlib", *(["scipy"] if question.text else [])):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"compare needs {package} for its report (pip install 'embkern[report]')")
    path, source = question.output.resolve(), Path(question.model)
    if source.exists() and (path == source.resolve() or path in source.resolve().parents):
        raise ValueError(f"output: {question.output} is, or holds, the model to read; choose another name")
    check_writable_directory(question.output, "output")
    return question


def _subject(asked: Asked, progress: bool | None) -> Subject:
    """Load the model and what is read of it."""
    sentences = None if asked.text is None else read_sentences(asked.text)
    model = load_model(asked.model).to(asked.device or "cpu").eval()
    tokenizer = load_tokenizer(asked.model)
    for name in ("text", "dataset"):
        if getattr(asked, name) is not None and tokenizer is None:
            raise ValueError(f"{name}: expected a tokenizer with it (the model has none)")
    weight = find_table(model).weight
    check_table(weight)
    frequencies, counted = token_frequencies(
        len(weight), asked.counts, asked.count_text or None, tokenizer, progress=progress
    )
    if asked.words:
        words = measures.find_words(asked.words, tokenizer)
    else:
        words = measures.typical_words(frequencies, tokenizer)
    return Subject(
        source=asked.model,
        model=model,
        tokenizer=tokenizer,
        frequencies=frequencies,
        counted=counted,
        words=words,
        sentences=sentences,
        dataset=asked.dataset,
        protocol=asked.protocol,
        models=asked.output / "models" if asked.keep_models else None,
        seed=asked.seed,
    )


def _plans(asked: Asked, subject: Subject) -> list[Plan]:
    """Return the rows of a study, in the order in which they are measured."""
    common = {
        "embkern": __version__,
        "model": model_fingerprint(asked.model, getattr(subject.model.config, "_commit_hash", None)),
        "counts": [text_fingerprint(each) for each in (asked.counts, *asked.count_text) if each],
        "seed": asked.seed,
        "device": subject.weight.device.type,
    }
    # The measures that are asked for, with what they alone depend on.
    own: dict[str, dict[str, Any]] = {"model": {}, "table": {}, "lookup": {}}
    own["neighbors"] = {"words": subject.words}
    if asked.text is not None:
        own["sentences"] = {"text": text_fingerprint(asked.text)}
    if asked.dataset is not None:
        own["perplexity"] = {"dataset": text_fingerprint(asked.dataset), "protocol": asked.protocol}
    if asked.keep_models:
        own["saved"] = {}

    def plan(measure: str, method: str, ratio: float | None, made: dict[str, Any]) -> Plan:
        return Plan(measure, method, ratio, {"measure": measure, **made, **own[measure], **common})

    plans = [plan(measure, DENSE, None, {"method": DENSE}) for measure in _OF_DENSE if measure in own]
    if measures.no_perplexity(subject.model):
        own.pop("perplexity", None)  # the dense model's row says why
    for spec, ratio in itertools.product(asked.specs(), asked.ratios):
        made = {"method": spec.name, "options": spec.options, "ratio": ratio}
        plans += [
            plan(measure, spec.text, ratio, made)
            for measure in _OF_CANDIDATE
            if measure in own and (spec.installable or measure not in _OF_MODELS)
        ]
    return plans


def _measured(plans: list[Plan], asked: Asked, subject: Subject, bar: tqdm | None = None) -> Iterator[Row]:
    """Yield the rows of plans; a method runs once for all rows that are measured of its table."""
    specs = {spec.text: spec for spec in asked.specs()}
    for (method, ratio), group in itertools.groupby(plans, key=lambda plan: (plan.method, plan.ratio)):
        name = method if ratio is None else f"{method}-{ratio:g}x"
        candidate = failure = None
        if ratio is not None:
            _show(bar, name)
            try:
                candidate = Candidate(subject, specs[method].recipe(ratio), name)
            except (ValueError, ImportError) as error:  # out of reach, or it needs another package
                failure = error
        for plan in group:
            _show(bar, f"{name} {plan.measure}")
            started, result = time.perf_counter(), None
            reason = str(failure).split("\n")[0] if failure else None
            if plan.measure == "perplexity":
                reason = reason or measures.no_perplexity(subject.model)
            try:
                result = None if reason else _result(plan, subject, candidate)
            except UnsupportedModelError as error:  # its tied head cannot decode through an activation
                reason = str(error)
            yield Row(
                id=plan.id,
                measure=plan.measure,
                method=method,
                ratio=ratio,
                depends=plan.depends,
                command=asked.command(plan.id),
                result=result,
                reason=reason,
                passing=isinstance(failure, ImportError),
                seconds=round(time.perf_counter() - started, 3),
            )


def _result(plan: Plan, subject: Subject, candidate: Candidate | None) -> dict[str, Any]:
    if candidate is None:
        return _OF_DENSE[plan.measure](subject)
    return _OF_CANDIDATE[plan.measure](subject, candidate)


def _show(bar: tqdm | None, what: str) -> None:
    if bar is not None:
        bar.set_postfix_str(what)


__all__ = ["Asked", "Row", "Study", "compare", "compare_row"]
