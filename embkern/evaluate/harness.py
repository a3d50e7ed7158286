"""lm-evaluation-harness and MTEB on a compressed model, and on a second model for comparison.

Both run in this process, in which embkern is imported. Their own command lines do not import it, and load a
compressed model only where torch registers embkern.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, Field

from ..io.optional import require
from ..models.loading import load_model, load_tokenizer, not_loaded
from ..models.report import public_name
from .libraries import quiet_libraries


class HarnessScore(BaseModel):
    """The value of a metric on a task."""

    task: str
    metric: str
    value: float | None = Field(description="null where the harness has no number")
    stderr: float | None = Field(default=None, description="standard error, as the harness estimates it")
    against: float | None = Field(default=None, description="value of the model compared against")

    @property
    def difference(self) -> float | None:
        """``value - against``, None if either is missing."""
        return None if self.value is None or self.against is None else self.value - self.against


class HarnessRun(BaseModel):
    """The result of a harness on a model, and on another one if given."""

    harness: str
    version: str
    model: str
    against: str | None
    scores: list[HarnessScore]
    results: list[dict[str, Any]] = Field(description="the harness' output for the model, then for the other")
    command: str | None


def run_lm_eval(
    model: str | os.PathLike,
    tasks: Sequence[Any],
    *,
    against: str | os.PathLike | None = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    command: str | None = None,
    **options: Any,
) -> HarnessRun:
    """Run tasks of lm-evaluation-harness: ``lm_eval.simple_evaluate(HFLM(pretrained=model), tasks=tasks)``.

    Args:
        model: a causal or encoder-decoder language model, compressed or dense: a directory or hub name.
        tasks: names, or other values that ``simple_evaluate`` takes.
        against: another model to compare with, such as the dense one.
        include_path: directory of task files (YAML) of your own.
        batch_size: requests per batch, or ``auto``.
        device: such as ``cuda``; default: the CPU.
        command: command line to record in the result.
        options: further arguments of ``simple_evaluate``, such as ``num_fewshot=5``.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an option or a task is unknown, or a model cannot be used.
        FileNotFoundError: a model, or the data set of a task, cannot be loaded.
    """
    lm_eval = require("lm_eval", "harness")
    _check_options(options, lm_eval.simple_evaluate, own={"model", "model_args", "tasks", "task_manager"})
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    named = [task for task in tasks if isinstance(task, str)]
    if unknown := [task for task in named if not manager.match_tasks([task])]:
        raise ValueError(f"tasks: lm-eval knows no {', '.join(unknown)} (`lm-eval ls tasks` lists them)")

    def run(name: str) -> dict[str, Any]:
        live, tokenizer = load_model(name), load_tokenizer(name)
        if not live.can_generate():
            raise ValueError(
                f"model: expected a language model that generates, got {type(live).__name__}: {name}"
            )
        if tokenizer is None:
            raise ValueError(f"tokenizer: expected one beside the model {name}, found none")
        live = live if device is None else live.to(device)
        adapter = HFLM(pretrained=live, tokenizer=tokenizer, batch_size=batch_size)
        settings = {"task_manager": manager, "log_samples": False, **options}
        found = lm_eval.simple_evaluate(adapter, tasks=list(tasks), **settings)
        kept = ("results", "versions", "n-shot", "n-samples", "task_hashes")
        return {key: found[key] for key in kept if key in found}

    return _run("lm-eval", lm_eval.__version__, run, _scores_of_lm_eval, model, against, command)


def _scores_of_lm_eval(found: dict[str, Any]) -> Iterable[HarnessScore]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, source = key.partition(",")  # "acc,none": metric and filter of the answers
            if comma and not metric.endswith("_stderr"):
                shown = metric if source == "none" else key
                stderr = _number(values.get(f"{metric}_stderr,{source}"))
                yield HarnessScore(task=task, metric=shown, value=_number(value), stderr=stderr)


def run_mteb(
    model: str | os.PathLike,
    tasks: Sequence[Any],
    *,
    against: str | os.PathLike | None = None,
    languages: Sequence[str] | None = None,
    batch_size: int = 32,
    device: str | None = None,
    command: str | None = None,
    **options: Any,
) -> HarnessRun:
    """Run tasks of MTEB: ``mteb.evaluate(SentenceTransformer(model), tasks)``.

    MTEB's cache of results is not used, because it identifies a model by its name alone.

    Args:
        model: a sentence encoder, compressed or dense: a directory or hub name.
        tasks: names, or task objects.
        against: another model to compare with, such as the dense one.
        languages: languages of multilingual tasks, such as ``eng``.
        batch_size: sentences per batch.
        device: such as ``cuda``; default: the choice of sentence-transformers.
        command: command line to record in the result.
        options: further arguments of ``mteb.evaluate``.

    Raises:
        ImportError: mteb is not installed.
        ValueError: an option or a task is unknown, or a model cannot be loaded.
        FileNotFoundError: a model, or the data set of a task, cannot be loaded.
    """
    mteb = require("mteb", "harness")
    encoder = require("sentence_transformers", "harness").SentenceTransformer
    settings: dict[str, Any] = {
        "cache": None,
        "encode_kwargs": {"batch_size": batch_size, "show_progress_bar": False},
        "show_progress_bar": False,
    }
    _check_options(options, mteb.evaluate, own={"model", "tasks", *settings})
    try:
        loaded = [
            mteb.get_task(task, languages=languages) if isinstance(task, str) else task for task in tasks
        ]
    except KeyError as error:
        raise ValueError(f"tasks: {error.args[0].removeprefix('KeyError: ')}") from error
    metrics = {task.metadata.name: task.metadata.main_score for task in loaded}

    def run(name: str) -> dict[str, Any]:
        try:
            live = encoder(name, device=device)
        except Exception as error:  # transformers raises many kinds
            raise not_loaded(name, error) from error
        found = mteb.evaluate(live, loaded, **settings, **options)
        tasks = {each.task_name: {**each.to_dict(), "score": each.get_score()} for each in found.task_results}
        return json.loads(json.dumps(tasks, default=str))

    def scores(found: dict[str, Any]) -> Iterable[HarnessScore]:
        for task, result in found.items():
            yield HarnessScore(task=task, metric=metrics[task], value=_number(result["score"]))

    return _run("mteb", mteb.__version__, run, scores, model, against, command)


# ---- both ------------------------------------------------------------------------------------------------


def _check_options(options: dict[str, Any], function: Callable, own: set[str]) -> None:
    known = inspect.signature(function).parameters.keys() - own
    if unknown := options.keys() - known:
        raise ValueError(
            f"options: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
        )


def _run(
    harness: str,
    version: str,
    run: Callable[[str], dict[str, Any]],
    scores_of: Callable[[dict[str, Any]], Iterable[HarnessScore]],
    model: str | os.PathLike,
    against: str | os.PathLike | None,
    command: str | None,
) -> HarnessRun:
    names = [os.fspath(each) for each in (model, against) if each is not None]
    with quiet_libraries():
        results = [run(name) for name in names]
    scores = list(scores_of(results[0]))
    if against is not None:
        other = {(score.task, score.metric): score.value for score in scores_of(results[1])}
        for score in scores:
            score.against = other[score.task, score.metric]
    return HarnessRun(
        harness=harness,
        version=version,
        model=public_name(names[0]),
        against=public_name(names[1]) if against is not None else None,
        scores=scores,
        results=results,
        command=command,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``--name value``, ``--name=value`` and ``--flag`` to a dictionary; values are YAML.

    Raises:
        ValueError: a word is not a name where one is expected, or a value is not YAML.
    """
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise ValueError(f"options: expected --name value, got {name!r}")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            options[name.removeprefix("--").replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"options: {name}: expected YAML, got {value!r}") from error
    return options
