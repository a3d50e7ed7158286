"""The run of a study: load the model, measure the rows that are missing, write the report."""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..evaluate.language_model import no_perplexity
from ..experiments.engine import read_result, write_result
from ..fidelity import read_sentences
from ..io.atomic import check_writable_directory, replacing
from ..methods.base import check_table
from ..models.find_table import UnsupportedModelError, find_table
from ..models.fisher_file import load_fisher
from ..models.loading import load_model, load_tokenizer
from ..models.report import public_name
from ..text.frequencies import token_frequencies
from .measures import MEASURES
from .plans import Plan, plan_rows
from .report import write_report
from .result import Study
from .rows import DENSE, Row
from .spec import StudyOptions
from .subject import Candidate, Subject
from .words import find_words, typical_words

ROWS_NAME = "rows.json"


def compare(
    model: str | os.PathLike,
    *,
    output: str | os.PathLike,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Study:
    """Compress a model's table by every method at every ratio, measure the results, and write a report.

    A row is measured again only if something that it depends on has changed: the model, the texts, the
    options, the code of the method, or the code that measures it. The documentation lists them under "What a
    result depends on".

    Args:
        model: a directory, or a name on the hub.
        output: directory of the report: ``report.md`` with ``figures``, ``report.html`` (one file that loads
            nothing), ``rows.json``, and ``rows``, from which an interrupted study resumes.
        overwrite: measure all rows of this study again.
        progress: show a bar on stderr; None shows it on a terminal.
        options: the fields of ``StudyOptions``: ``ratios``, ``methods``, ``text``, ``counts``, ...

    Returns:
        All rows. A row without a result gives the reason, such as a ratio that a method cannot reach.

    Raises:
        ValueError: an argument is wrong, or the model's embedding cannot be replaced; it names what.
        FileNotFoundError: the model, the text or the counts do not exist.
        ImportError: a package that the report needs is not installed.
    """
    started = time.perf_counter()
    parsed = _parse(model, output, options)
    subject = _load_subject(parsed, progress)
    plans = plan_rows(parsed, subject)
    rows = {} if overwrite else {plan.id: row for plan in plans if (row := _read(parsed, plan))}
    missing = [plan for plan in plans if plan.id not in rows]
    with tqdm(
        total=len(plans), initial=len(rows), desc="compare", unit="row",
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        for row in _measure(missing, parsed, subject, bar):
            write_result(_path(parsed, row.id), row)
            rows[row.id] = row
            bar.update()
    study = Study(
        model=public_name(parsed.model),
        command=parsed.command(),
        options=parsed,
        rows=[rows[plan.id] for plan in plans],
        measured=len(missing),
        seconds=round(time.perf_counter() - started, 1),
    )
    with replacing(parsed.output / ROWS_NAME) as temporary:
        temporary.write_text(study.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_report(study, parsed.output)
    return study


def compare_row(model: str | os.PathLike, row: str, *, output: str | os.PathLike, **options: Any) -> Row:
    """Measure one row of a study again and store it, without changing the report.

    Raises:
        ValueError: the study has no such row, because something that rows depend on has changed.
        FileNotFoundError: see ``compare``.
    """
    parsed = _parse(model, output, options)
    subject = _load_subject(parsed, progress=None)
    plans = {plan.id: plan for plan in plan_rows(parsed, subject)}
    if row not in plans:
        raise ValueError(
            f"row: {row!r} is not one of this study's {len(plans)} rows; it depends on another model, text, "
            "seed or option, or on other code"
        )
    (measured,) = _measure([plans[row]], parsed, subject)
    write_result(_path(parsed, measured.id), measured)
    return measured


def _path(options: StudyOptions, row: str) -> Path:
    return options.output / "rows" / f"{row}.json"


def _read(options: StudyOptions, plan: Plan) -> Row | None:
    row = read_result(_path(options, plan.id), Row, plan.depends)
    # Two spellings of the same options share a row; the report shows the one of this run.
    return row and row.model_copy(update={"method": plan.method})


def _parse(model: str | os.PathLike, output: str | os.PathLike, options: dict[str, Any]) -> StudyOptions:
    parsed = StudyOptions.parse(model=os.fspath(model), output=output, **options)
    for package in ("jinja2", "matplotlib", *(["scipy"] if parsed.text else [])):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"compare needs {package} for its report (pip install 'embkern[report]')")
    path, source = parsed.output.resolve(), Path(parsed.model)
    if source.exists() and (path == source.resolve() or path in source.resolve().parents):
        raise ValueError(f"output: {parsed.output} is, or holds, the model to read; choose another name")
    check_writable_directory(parsed.output, "output")
    return parsed


def _load_subject(options: StudyOptions, progress: bool | None) -> Subject:
    """Load the model and the texts that it is measured on."""
    sentences = None if options.text is None else read_sentences(options.text)
    model = load_model(options.model).to(options.device or "cpu").eval()
    tokenizer = load_tokenizer(options.model)
    for name in ("text", "dataset"):
        if getattr(options, name) is not None and tokenizer is None:
            raise ValueError(f"{name}: expected a tokenizer with it (the model has none)")
    weight = find_table(model).weight
    check_table(weight)
    frequencies, counted = token_frequencies(
        len(weight), options.counts, options.count_text or None, tokenizer, progress=progress
    )
    words = find_words(options.words, tokenizer) if options.words else typical_words(frequencies, tokenizer)
    return Subject(
        source=options.model,
        model=model,
        tokenizer=tokenizer,
        frequencies=frequencies,
        counted=counted,
        words=words,
        sentences=sentences,
        dataset=options.dataset,
        protocol=options.protocol,
        models=options.output / "models" if options.keep_models else None,
        fisher=None if options.fisher is None else load_fisher(options.fisher),
        seed=options.seed,
    )


def _measure(
    plans: list[Plan], options: StudyOptions, subject: Subject, bar: tqdm | None = None
) -> Iterator[Row]:
    """Yield the rows of plans; a method runs once for all rows of its table."""
    specs = {spec.text: spec for spec in options.specs()}
    for (method, ratio), group in itertools.groupby(plans, key=lambda plan: (plan.method, plan.ratio)):
        name = DENSE if ratio is None else f"{method}-{ratio:g}x"
        candidate = failure = None
        if ratio is not None:
            _show(bar, name)
            try:
                candidate = Candidate(subject, specs[method].recipe(ratio), name)
            except (ValueError, ImportError) as error:  # the ratio is out of reach, or a package is missing
                failure = error
        for plan in group:
            _show(bar, f"{name} {plan.measure}")
            started, result = time.perf_counter(), None
            reason = str(failure).split("\n")[0] if failure else None
            if plan.measure == "perplexity":
                reason = reason or no_perplexity(subject.model)
            try:
                result = None if reason else _result(plan, subject, candidate)
            # A tied head cannot decode through an activation, or a removed token is refused.
            except (UnsupportedModelError, IndexError) as error:
                reason = str(error)
            yield Row(
                id=plan.id,
                measure=plan.measure,
                method=method,
                ratio=ratio,
                depends=plan.depends,
                command=options.command(plan.id),
                result=result,
                reason=reason,
                retry=isinstance(failure, ImportError),
                seconds=round(time.perf_counter() - started, 3),
            )


def _result(plan: Plan, subject: Subject, candidate: Candidate | None) -> dict[str, Any]:
    measure = MEASURES[plan.measure]
    if candidate is None:
        assert measure.of_dense is not None
        return measure.of_dense(subject)
    assert measure.of_candidate is not None
    return measure.of_candidate(subject, candidate)


def _show(bar: tqdm | None, what: str) -> None:
    if bar is not None:
        bar.set_postfix_str(what)
