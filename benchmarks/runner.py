"""The protocol of the benchmarks: options, selections of cells, checks, paired rounds, rows, tables.

A module of an op names its cells, builds its providers and computes the figures of its rows; a `Bench` checks
every provider against float64 before it is timed, and writes the results file as it proceeds.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from embkern.experiments.environment import environment
from embkern.experiments.timing import Sample, paired_rounds, quantiles

from .machine import first_line, lost_context, peak_bytes
from .results_file import RESULTS, write_results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST_ROUNDS = 5

Selection = dict[str, list[Any]]
T = TypeVar("T")


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of ``exact``; infinity in place of NaN."""
    error = float((got.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def assert_within(errors: Sequence[float], limits: Sequence[float], names: Sequence[str] = ()) -> float:
    """Return the largest relative error; raise AssertionError where one exceeds its limit."""
    prefixes = [f"{name}: " for name in names] or [""] * len(errors)
    for error, limit, prefix in zip(errors, limits, prefixes, strict=True):
        assert error <= limit, f"{prefix}relative error {error:.2e}, at most {limit:.2e} is allowed"
    return max(errors)


def option_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m benchmarks NAME``; the module's docstring is its help."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    providers: Iterable[str],
    *,
    seconds: dict[str, tuple[float, float]],
    limits: tuple[float, float] = (1440.0, 170.0),
) -> argparse.Namespace:
    """Add the options that every comparison has, and parse.

    Args:
        parser: with the options of the op.
        arguments: of the command line.
        providers: their names.
        seconds: of measured rounds per cell, by device; with ``--quick`` the second one.
        limits: seconds of a whole run; with ``--quick`` the second one.
    """
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--providers", nargs="+", choices=list(providers))
    add("--no-compile", action="store_true", help="leave out what needs torch.compile")
    add("--threads", type=int, help="of torch on the CPU")
    add("--repeats", type=int, default=30, help="most rounds per cell; at least 5")
    add("--cell-seconds", type=float, help="of measured rounds, beyond the fewest of them")
    add(
        "--limit-seconds",
        type=float,
        help=f"start no cell after this long; default: {limits[0]:.0f}, if quick {limits[1]:.0f}",
    )
    add("--quick", action="store_true", help="a small selection and short cells")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    if options.cell_seconds is None:
        options.cell_seconds = seconds[options.device][options.quick]
    if options.limit_seconds is None:
        options.limit_seconds = limits[options.quick]
    return options


def selected(
    options: argparse.Namespace, selections: Iterable[Selection]
) -> Iterator[tuple[Selection, Selection]]:
    """Yield every selection, with what the options give in place of its entries; and what they give."""
    for selection in selections:
        given = {key: getattr(options, key) for key in selection if getattr(options, key)}
        yield selection | given, given


def table_line(label: str, figures: dict[str, str], columns: Iterable[str], width: int = 28) -> str:
    """Return a line of a printed table: one figure per column, aligned with the column's name."""
    cells = (f"{figures.get(name, '-'):>{max(9, len(name)) + 1}}" for name in columns)
    return f"{label:{width}}{''.join(cells)}"


@dataclass
class Prepared:
    """A provider that passed its check.

    Attributes:
        sample: times its next calls.
        facts: fields of its row, such as the error and the timer's name.
        peak_of: the call whose peak memory is measured, if any.
    """

    sample: Sample
    facts: dict[str, Any]
    peak_of: Callable[[], Any] | None = None


@dataclass
class Measured:
    """The times of a cell by provider, in paired rounds, with the facts and the peak memory of each."""

    times: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)

    def figures(self, name: str) -> dict[str, Any]:
        """Return the facts of a provider and the quantiles of its times, as fields of its row."""
        found = quantiles(self.times[name])
        return {
            **self.facts[name],
            "rounds": len(self.times[name]),
            "p50": found["median"],
            "p20": found["p20"],
            "p80": found["p80"],
        }

    def line(self, label: str, columns: Iterable[str]) -> str:
        """Return the printed line of medians."""
        medians = {name: f"{quantiles(each)['median']:.1f}" for name, each in self.times.items()}
        return table_line(label, medians, columns)


class Bench:
    """A run of a benchmark: its rows, what was unavailable and why, its failures, and its deadline."""

    def __init__(self, name: str, arguments: Sequence[str], options: argparse.Namespace) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.name, self.options = name, options
        self.command = " ".join([f"python -m benchmarks {name}", *arguments])
        self.environment = environment()  # now, because an error may make the device unusable
        self.deadline = time.monotonic() + options.limit_seconds
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.unavailable: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def late(self) -> bool:
        """Return whether the time is over, so that no cell may be started."""
        return time.monotonic() > self.deadline

    def before_deadline(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items until the time is over; print how many of ``what`` remain, and the first of them."""
        for position, item in enumerate(items):
            if self.late():
                left = len(items) - position
                print(f"--limit-seconds: {left} of {len(items)} {what} were not measured, from {item} on")
                return
            yield item

    def missing(self, what: str, reason: str) -> None:
        """Record and print, once, why something is left out."""
        if what not in self.unavailable:
            self.unavailable[what] = reason
            print(f"without {what}: {reason}")

    def available(
        self,
        names: Iterable[str],
        reason: Callable[[str], str | None],
        label: Callable[[str], str] = str,
    ) -> list[str]:
        """Return the providers that can run here; the reason of every other one is recorded."""
        found = []
        for name in names:
            if why := reason(name):
                self.missing(label(name), why)
            else:
                found.append(name)
        return found

    @contextlib.contextmanager
    def recorded(self, name: str, where: str) -> Iterator[None]:
        """Record the failure of a provider and continue with the others; a failure fails the run at its end.

        After an error that CUDA keeps (`lost_context`) every later figure would fail too: the run writes what
        it has and ends.
        """
        try:
            yield
        except Exception as error:
            message = first_line(error)
            self.failures.append({"provider": name, "where": where, "error": message})
            print(f"FAILED {name}: {message}")
            if reason := lost_context():
                print(f"the run ends here, its CUDA context is lost: {reason}")
                self.finish()

    def measure(
        self, where: str, names: Iterable[str], prepare: Callable[[str], Prepared | None]
    ) -> Measured:
        """Prepare every provider, then time all of them in paired rounds.

        ``prepare`` raises where the provider is wrong; it returns None where the cell does not apply to it.
        """
        measured, samples = Measured(), {}
        for name in names:
            with self.recorded(name, where):
                prepared = prepare(name)
                if prepared is None:
                    continue
                if prepared.peak_of is not None:
                    measured.peaks[name] = peak_bytes(prepared.peak_of, self.options.device)
                samples[name], measured.facts[name] = prepared.sample, prepared.facts
        if samples:
            repeats = (FEWEST_ROUNDS, max(FEWEST_ROUNDS, self.options.repeats))
            measured.times = paired_rounds(samples, seconds=self.options.cell_seconds, repeats=repeats)
        return measured

    def write(self) -> Path:
        """Write the results so far."""
        return write_results(
            f"{self.name}_{self.options.device}",
            self.command,
            self.rows,
            directory=self.options.results,
            machine=self.environment,
            device=self.options.device,
            **self.facts,
            unavailable=self.unavailable,
            failures=self.failures,
        )

    def finish(self) -> None:
        """Write the results, print the failures, and exit with 1 if there are any."""
        print("->", self.write())
        for failure in self.failures:
            print(f"FAILED {failure['provider']} on {failure['where']}: {failure['error']}")
        if self.failures:
            raise SystemExit(1)
