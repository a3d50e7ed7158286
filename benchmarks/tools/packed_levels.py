"""Finds the levels of packed tables, embkern/data/packed_levels.txt, and their error.

Lloyd's iteration: samples of a standard normal variable are coded by the best path, then least squares fit
the entries of the tables whose sums are the levels. The optimum depends on the entries to begin with, so the
best of several random ones is kept. Entries are rounded to whole steps. The squared error on independent
samples is printed beside that of Lloyd-Max levels at the same bits, and the lower bound of any code of that
rate, 4^-bits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch import Tensor

from benchmarks.codes.sums import ROW, SUMS_4096, trellis_of_sums
from benchmarks.codes.trellis import normal_samples, squared_error
from embkern.methods.quantizer_levels import distortion
from embkern.ops.packed_codes import LEVELS_FILE, LEVELS_PER_UNIT

SAMPLES, SEED = 720_000, 2**31 - 1  # on which errors are measured
HEADER = (
    "# Tables of levels of packed tables, in steps of 2^-5, for a standard normal variable:",
    "# six rows of 1 bit, three of 2 bits, four of 3 and four of 4 bits (docs/packed-format.md).",
    "# Found by `python -m benchmarks packed_levels`.",
)


def main(arguments: list[str]) -> None:
    """Find levels of 1 to 4 bits, print their errors, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packed_levels", description=__doc__)
    parser.add_argument("--starts", type=int, default=10, help="random tables to begin with")
    parser.add_argument("--output", type=Path, default=LEVELS_FILE)
    options = parser.parse_args(arguments)
    lines = [*HEADER]
    for bits, sums in SUMS_4096.items():
        trellis = trellis_of_sums(bits)
        entries = sums.trained(trellis, options.starts)
        whole = sums.whole(LEVELS_PER_UNIT * entries, trellis.memory)
        errors = [_error(bits, each) for each in (entries, whole / LEVELS_PER_UNIT)]
        rivals = {"packed": errors[1], "Lloyd-Max": distortion(bits), "bound": 4.0**-bits}
        shown = ", ".join(f"{name} {-10 * math.log10(error):.2f} dB" for name, error in rivals.items())
        print(f"{bits} bits: error {errors[1]:.5f}, not rounded {errors[0]:.5f}; {shown}", flush=True)
        lines += [" ".join(map(str, row)) for row in whole.int().view(-1, 16).tolist()]
    options.output.write_text("\n".join(lines) + "\n", encoding="ascii")
    print("->", options.output)


def _error(bits: int, entries: Tensor) -> float:
    trellis = trellis_of_sums(bits)
    samples = normal_samples(ROW, SAMPLES, SEED)
    return squared_error(trellis, SUMS_4096[bits].levels(entries, trellis.memory), samples)
