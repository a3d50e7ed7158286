"""Codes of 1 to 4 bits a value: signal to noise on a normal variable against cycles of decoding.

The rate of a code is measured on independent standard normal values, coded by best paths or nearest words
with levels found beforehand on other samples. Its decoders are C++, compiled per instruction set, checked bit
for bit against plain loops, and timed while they multiply rows of 640 values with a vector in fp32, or, where
levels are bytes, in integers. Times are the least of many runs of a few microseconds, so that other work of
the machine does not matter, in cycles of the core. Everything runs in one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..machine import using_threads
from ..results_file import RESULTS, command_line, write_results
from .cycles import measure_decoders
from .picture import draw
from .rates import measure_rates


def main(arguments: list[str]) -> None:
    """Measure rates and cycles, print them, write results and the picture; exit 1 if a decoder is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks codes", description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=3000, help="runs per decoder, of which the least counts"
    )
    parser.add_argument("--only", choices=("rates", "cycles"), help="print these alone, write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the results")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with using_threads(1):
        if options.only != "rates":
            rows += measure_decoders(options.repeats)
            _print_cycles(rows)
        if options.only != "cycles":
            for row in measure_rates():
                rows.append(row)
                _print_rate(row)
    if not options.only:
        command = command_line("codes", arguments)
        path = write_results("codes_cpu", command, rows, directory=options.output)
        print("->", path)
        print("->", draw(rows, path.with_suffix(".png")))
    if wrong := [row["decoder"] for row in rows if row["kind"] == "cycles" and not row["right"]]:
        raise SystemExit(f"decoders whose values are not those of a plain loop: {', '.join(wrong)}")


def _print_cycles(rows: list[dict[str, Any]]) -> None:
    sets = list(dict.fromkeys(row["set"] for row in rows))
    print(f"{'cycles for 32 values: fp32, integers':38}" + "".join(f"{name:>16}" for name in sets))
    found = {(row["decoder"], row["bits"], row["set"]): row for row in rows}
    for decoder, bits in dict.fromkeys((row["decoder"], row["bits"]) for row in rows):
        cells = []
        for name in sets:
            row = found.get((decoder, bits, name))
            whole = row and row["cycles_of_integers"]
            cells.append(f"{row['cycles']:.1f}{f', {whole:.1f}' if whole else ''}" if row else "")
        print(f"{decoder:30}{bits} bits  " + "".join(f"{cell:>16}" for cell in cells), flush=True)


def _print_rate(row: dict[str, Any]) -> None:
    seconds = row["encoding_seconds_per_million"]
    print(
        f"{row['code']:20}{row['bits']} bits, rings of {row['ring']:3}: {row['decibels']:6.2f} dB "
        f"(standard error {row['standard_error']:.3f})"
        + ("" if seconds is None else f", {seconds:.3f} s per million values"),
        flush=True,
    )
