"""`allocate` on tables of large vocabularies: seconds, and memory beyond the table and the result.

Each table is compressed in a process of its own, which no other disturbs. Rows are random with a decaying
spectrum, counts follow Zipf's law; the time of the search for codes does not depend on the values, that of
the rates hardly. `seconds` is wall time, `processor` that of all threads together; `beyond` is the rise of
the resident set during the call, less the bytes of the result (Linux only).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from embkern.experiments.environment import environment
from embkern.methods import allocate

from .machine import peak_bytes
from .results_file import RESULTS, command_line, write_results
from .runner import option_parser
from .vocabulary import random_table, zipf

SHAPES = ["250002x384", "128256x2048", "262144x640"]  # XLM-R's small relatives, Llama 3.2 1B, Gemma 3 270M


def main(arguments: list[str]) -> None:
    """Compress every table and print its line; write the results."""
    parser = option_parser("large_tables", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="VxH", help="of the tables")
    add("--ratio", type=float, default=16, help="bytes of the fp32 table over bytes of the result")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    add("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(_measured(options.one, options.ratio, options.threads)))
        return
    print(
        f"{'table':>14}{'seconds':>10}{'processor':>11}{'table, MB':>11}{'result, MB':>12}{'beyond, MB':>12}"
    )
    rows = []
    for shape in options.shapes:
        command = [sys.executable, "-m", "benchmarks", "large_tables", "--one", shape]
        command += ["--ratio", str(options.ratio), "--threads", str(options.threads)]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        rows.append(row)
        beyond = "-" if row["beyond"] is None else f"{row['beyond'] / 1e6:.0f}"
        print(f"{shape:>14}{row['seconds']:10.1f}{row['processor']:11.1f}{row['table'] / 1e6:11.0f}"
              f"{row['result'] / 1e6:12.1f}{beyond:>12}")  # fmt: skip
    command_text = command_line("large_tables", arguments)
    machine = environment() | {"threads": options.threads}
    print("->", write_results("large_tables", command_text, rows, directory=options.results, machine=machine))


def _measured(shape: str, ratio: float, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    V, H = (int(each) for each in shape.split("x"))
    table = random_table(V, H)
    counts = (zipf(V, 1.0) * 1e6).floor()
    allocate(
        table[:8192], ratio=ratio, counts=counts[:8192]
    )  # threads and scratch of libraries exist from here on
    results, times = [], []

    def call() -> None:
        start = time.perf_counter(), time.process_time()
        results.append(allocate(table, ratio=ratio, counts=counts))
        times.extend([time.perf_counter() - start[0], time.process_time() - start[1]])

    peak = peak_bytes(call, "cpu")
    size = results[0].nbytes
    return {
        "shape": shape,
        "ratio": ratio,
        "seconds": round(times[0], 2),
        "processor": round(times[1], 2),
        "table": table.nbytes,
        "result": size,
        "beyond": None if peak is None else max(0, peak - size),
    }
