"""Bits per value against KL divergence: the table of a language model by every method, input only and tied.

Everything else of the model stays dense. For each table: perplexity on held-out text, mean and 99th
percentile of KL(dense || compressed) per scored token in nats, and how often both find the same token
likeliest. Input only: the input embedding uses the table; tied: the output head as well. Every byte that is
stored counts.

Models are SmolLM2-135M-Instruct and Gemma-3-270M from Python packages (a run tells what to install), or
directories. Their tables come from files that hold them in Q8_0, so that Q8_0 has no error.

Tokens are counted, and second moments measured, on sentences of docstrings (benchmarks/text.py); the scored
text is of another kind, in equal parts manual pages, documentation, and descriptions and licences of packages
of this installation. Text and weights stay on the machine. Measured rows are kept in the cache, by a hash of
what they depend on, so that another run measures only what it adds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from embkern.evaluate.perplexity import Perplexity, evaluate_perplexity
from embkern.experiments.dependencies import code_hash, files_fingerprint, frequencies_code, method_code
from embkern.experiments.engine import Result, key_of, read_result, write_result
from embkern.io.cache import cache_directory
from embkern.methods import METHODS as COMPRESSORS
from embkern.methods import rank_for_ratio
from embkern.models.calibrate import calibrate, self_calibrate

from .language_model_rivals import GGML_FORMATS, NUMPY_FORMATS, feed_forward, gguf_format
from .language_model_subject import PARTS, Subject, counted_sentences, scored_text
from .results_file import RESULTS, command_line, write_results
from .runner import option_parser, table_line
from .tools.installed_models import INSTALLED, dense_model
from .trellis_rings import trellis_rings

RATIOS = [4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]
FEW_RATIOS = [8.0, 16.0, 32.0]
LOW_RANK_RATIOS = [4.0, 8.0, 16.0]
SCORED_TOKENS = 4096
COLUMNS = {
    "bits": ("bits", ".3f"),
    "ppl in": ("input_only", "perplexity", ".2f"),
    "KL in": ("input_only", "kl", ".4f"),
    "ppl tied": ("tied", "perplexity", ".2f"),
    "KL tied": ("tied", "kl", ".4f"),
    "99 %": ("tied", "kl_p99", ".3f"),
    "top 1": ("tied", "top1", ".3f"),
    "seconds": ("seconds", ".0f"),
}


class Entry(NamedTuple):
    """One table to measure.

    Attributes:
        method: a column of the results, and a line of the picture.
        setting: what distinguishes the tables of a method, such as its ratio or its bits.
        build: returns the table from a `Subject`.
        code: hash of the code of the method.
    """

    method: str
    setting: dict[str, Any]
    build: Callable[[Subject], Any]
    code: str


class Measured(Result):
    """The row of a table, with what it depends on."""

    depends: dict[str, Any]
    row: dict[str, Any]

    def dependencies(self) -> dict[str, Any]:
        """Return everything that the row follows from."""
        return self.depends


def main(arguments: list[str]) -> None:
    """Measure every table of every model; print a line each, write a results file per model."""
    options = _parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = command_line("language_models", arguments)
    found = False
    for name in options.models:
        try:
            directory = dense_model(name, options.cache)
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        found = True
        bench = LanguageModels(name if name in INSTALLED else directory.name, directory, options)
        print("->", bench.run(command))
    if not found:
        raise SystemExit("no model to measure")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser("language_models", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=list(INSTALLED), help=f"of {', '.join(INSTALLED)}, or directories")
    add("--methods", nargs="+", choices=list(METHODS), help="default: all but slow ones")
    add("--ratios", type=float, nargs="+", help="of the methods that take one; default: several for each")
    add("--ring-bits", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3, 4), help="of EXL3 rings")
    add("--tokens", type=int, default=SCORED_TOKENS, help="of the scored text")
    add("--part", choices=PARTS, default=PARTS[0], help="other documents of the same kinds are scored")
    add(
        "--beginning", choices=("text", "window"), default="text", help="BOS begins the text, or every window"
    )
    add("--threads", type=int, help="of torch")
    add("--cache", type=Path, help="directory of models and measured rows; default: the user's cache")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


# ---- methods ---------------------------------------------------------------------------------------------


def _by_ratio(
    method: str, ratios: Sequence[float], counts: str | None = None, label: str | None = None, **given: Any
) -> Iterator[Entry]:
    """Yield a method of embkern at every ratio."""
    each = COMPRESSORS[method]
    code = ",".join([method_code(method), *([frequencies_code()] if counts else [])])

    def build(ratio: float, subject: Subject) -> Any:
        options = {**given, **({"counts": getattr(subject, counts)} if counts else {})}
        if each.sized_by == "ratio":
            return each.compress(subject.table, ratio=ratio, **options)
        V, H = subject.table.shape
        rank = rank_for_ratio(V, H, ratio, offset=each.has_offset(each.options()))
        return each.compress(subject.table, rank, **options)

    for ratio in ratios:
        yield Entry(label or method, {"ratio": ratio, **given}, functools.partial(build, ratio), code)


def _at_bits(method: str, label: str, settings: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    """Yield a scalar quantiser of embkern at fixed settings."""

    def build(setting: dict[str, Any], subject: Subject) -> Any:
        group = {"group": subject.table.shape[1], **setting}  # the whole row unless a setting has another
        return COMPRESSORS[method].compress(subject.table, ratio=1.0, **group)

    for setting in settings:
        yield Entry(label, setting, functools.partial(build, setting), method_code(method))


def _calibrated(ratios: Sequence[float], *, own_samples: bool = False) -> Iterator[Entry]:
    """Yield rate allocation in the metric in which the model sees its table, on docstrings or own samples."""

    @functools.cache
    def known(subject: Subject) -> dict[str, Any]:
        if own_samples:
            return {"calibration": self_calibrate(subject.model, progress=False, limit_seconds=None)}
        found = calibrate(subject.model, subject.tokenizer, counted_sentences(), progress=False)
        return {"calibration": found, "counts": subject.counts_by_class}

    def build(ratio: float, subject: Subject) -> Any:
        return COMPRESSORS["allocate"].compress(subject.table, ratio=ratio, **known(subject))

    source = "on_samples" if own_samples else "on_text"
    code = f"{method_code('allocate')},{code_hash(f'embkern.models.calibrate.{source}')}"
    if not own_samples:
        code += f",{frequencies_code()}"
    label = "allocate, own samples" if own_samples else "allocate, calibrated"
    for ratio in ratios:
        yield Entry(label, {"ratio": ratio}, functools.partial(build, ratio), code)


def _rivals(
    method: str, setting: str, values: Sequence[Any], build: Callable[[Any, Subject], Any], *modules: str
) -> Iterator[Entry]:
    """Yield what is no method of embkern at every value of a setting; its code is that of some modules."""
    code = code_hash(*modules, follow=False)
    for value in values:
        yield Entry(method, {setting: value}, functools.partial(build, value), code)


def _formats(names: Sequence[str]) -> Iterator[Entry]:
    """Yield formats of GGUF."""

    def build(name: str, subject: Subject) -> Any:
        return gguf_format(subject.table, name)

    return _rivals("GGUF", "format", names, build, "benchmarks.language_model_rivals")


def _fed_forward(settings: Sequence[int]) -> Iterator[Entry]:
    """Yield one rate for all rows, with errors fed forward."""

    def build(bits: int, subject: Subject) -> Any:
        return feed_forward(subject.table, bits, subject.moment)

    modules = "benchmarks.language_model_rivals", "embkern.methods.scalar"
    return _rivals("one rate, errors fed forward", "bits", settings, build, *modules)


def _rings(settings: Sequence[int]) -> Iterator[Entry]:
    """Yield the format of ExLlamaV3, at one rate for all rows."""

    def build(bits: int, subject: Subject) -> Any:
        return trellis_rings(subject.table, bits)

    modules = "benchmarks.trellis_rings", "benchmarks.codes.trellis"
    return _rivals("EXL3 rings", "bits", settings, build, *modules)


GROUP = 32
METHODS: dict[str, Callable[[argparse.Namespace], Iterator[Entry]]] = {
    "allocate": lambda asked: _by_ratio("allocate", asked.ratios or RATIOS, "counts"),
    "allocate, calibrated": lambda asked: _calibrated(asked.ratios or RATIOS),
    "allocate, own samples": lambda asked: _calibrated(asked.ratios or FEW_RATIOS, own_samples=True),
    "allocate, no text": lambda asked: _by_ratio(
        "allocate", asked.ratios or FEW_RATIOS, "prior", "allocate, no text"
    ),
    "int, groups of 32": lambda asked: _at_bits(
        "rtn", "int, groups of 32", [{"bits": bits, "group": GROUP} for bits in (8, 4, 3, 2)]
    ),
    "Lloyd-Max, scale per row": lambda asked: _at_bits(
        "lloyd_max", "Lloyd-Max, scale per row", [{"bits": bits} for bits in (4, 3, 2)]
    ),
    "one rate, errors fed forward": lambda asked: _fed_forward((4, 3, 2)),
    "GGUF": lambda asked: _formats((*NUMPY_FORMATS, *GGML_FORMATS)),
    "EXL3 rings": lambda asked: _rings(asked.ring_bits),
    "SVD": lambda asked: _by_ratio("svd", asked.ratios or LOW_RANK_RATIOS, label="SVD"),
    "autoencoder": lambda asked: _by_ratio("autoencoder", asked.ratios or LOW_RANK_RATIOS),
}
SLOW = ("autoencoder", "EXL3 rings")  # only if `--methods` names them


# ---- measuring -------------------------------------------------------------------------------------------


class LanguageModels:
    """Measures the tables of one model, and keeps their rows."""

    def __init__(self, name: str, directory: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.file_name = f"language_models_{name}"
        if options.part != PARTS[0]:
            self.file_name += f"_{options.part}"
        if options.beginning != "text":
            self.file_name += f"_{options.beginning}"
        self.subject = Subject(directory)
        self.weights = files_fingerprint(sorted(directory.glob("*.safetensors")))
        self.cache = (options.cache or cache_directory()) / "language_models" / "rows"
        self.texts, sources = scored_text(options.part)
        window = self.subject.window
        self.protocol = {"max_length": window, "stride": window, "max_tokens": options.tokens}
        if options.beginning != "text":
            self.protocol["beginning"] = options.beginning
        V, H = self.subject.table.shape
        self.facts: dict[str, Any] = {
            "model": INSTALLED[name].title if name in INSTALLED else name,
            "V": V,
            "H": H,
            "dense": None,
            "counted": {"text": "docstrings", "sentences": len(counted_sentences())},
            "scored": {"part": options.part, "characters_by_source": sources, **self.protocol},
        }
        self.rows: list[dict[str, Any]] = []
        self.unavailable: dict[str, str] = {}

    def run(self, command: str) -> Path:
        """Measure all entries, method by method, and return the results file."""
        print(table_line(self.facts["model"], {name: name for name in COLUMNS}, COLUMNS, width=44))
        for method in self.options.methods or [each for each in METHODS if each not in SLOW]:
            entries = list(METHODS[method](self.options))
            if not entries:
                self.unavailable[method] = "this version of embkern does not have it"
            self._measure(entries)
            path = write_results(
                self.file_name,
                command,
                self.rows,
                directory=self.options.results,
                **self.facts,
                unavailable=self.unavailable,
            )
        for what, reason in self.unavailable.items():
            print(f"without {what}: {reason}")
        return path

    def _depends(self, entry: Entry) -> dict[str, Any]:
        own = ("batches", "divergence", "language_model", "perplexity", "windows")
        parts = [f"embkern.evaluate.{each}" for each in own]
        parts += ["embkern.fidelity.divergence", "embkern.models.table_swap"]
        return {
            "weights": self.weights,
            "method": entry.method,
            "setting": entry.setting,
            "code": entry.code,
            "protocol": self.protocol,
            "measure": code_hash(*parts, follow=False),
            "scored": _digest(self.texts),
            "counted": _digest(counted_sentences()),
        }

    def _measure(self, entries: Sequence[Entry]) -> None:
        """Measure the entries of a method that are not in the cache, in one pass over the text."""
        found: dict[str, dict[str, Any]] = {}
        missing: dict[str, tuple[Entry, Any, float]] = {}
        for entry in entries:
            key = key_of(self._depends(entry))
            stored = read_result(self.cache / f"{key}.json", Measured, self._depends(entry))
            if stored is not None:
                found[key] = stored.row
                continue
            start = time.perf_counter()
            try:
                table = entry.build(self.subject)
            except (ImportError, ValueError) as error:
                self.unavailable[_label(entry)] = str(error).splitlines()[0]
                continue
            missing[key] = (entry, table, time.perf_counter() - start)
        if missing:
            tables = {key: table for key, (_, table, _) in missing.items()}
            report = evaluate_perplexity(
                self.subject.model, self.subject.tokenizer, self.texts, tables, batch_size=2, progress=False,
                **self.protocol,
            )  # fmt: skip
            for each in report.tables:
                entry, table, seconds = missing[each.name]
                row = self._row(entry, table, seconds)
                row |= {"input_only": _figures(each.input_only), "tied": _figures(each.tied)}
                row["dense"] = _figures(report.model)
                depends = self._depends(entry)
                write_result(self.cache / f"{each.name}.json", Measured(depends=depends, row=row))
                found[each.name] = row
        for entry in entries:
            kept = found.get(key_of(self._depends(entry)))
            if kept is not None:
                self.facts["dense"] = kept["dense"]
                self.rows.append({name: value for name, value in kept.items() if name != "dense"})
                print(table_line(_label(entry), _shown(kept), COLUMNS, width=44), flush=True)

    def _row(self, entry: Entry, table: Any, seconds: float) -> dict[str, Any]:
        values = self.subject.table.numel()
        return {
            "method": entry.method,
            "setting": entry.setting,
            "bytes": table.nbytes,
            "bits": round(8 * table.nbytes / values, 4),
            "ratio": round(4 * values / table.nbytes, 3),
            "seconds": round(seconds, 1),
        }


def _label(entry: Entry) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in entry.setting.items())
    return f"{entry.method}: {shown}"


def _figures(measured: Perplexity | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    figures: dict[str, Any] = {"perplexity": round(measured.perplexity, 4), "tokens": measured.tokens}
    if (found := measured.divergence) is not None:
        figures |= {"kl": round(found.mean, 7), "kl_p99": round(found.p99, 6), "top1": round(found.top1, 5)}
    return figures


def _shown(row: dict[str, Any]) -> dict[str, str]:
    shown = {}
    for title, (*names, form) in COLUMNS.items():
        value: Any = row
        for name in names:
            value = value.get(name) if value is not None else None
        if value is not None:
            shown[title] = format(value, form)
    return shown


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}\n".encode())
    return digest.hexdigest()[:16]
