"""Processes of named work: crashes, hangs, lost contexts and what is left over; what of it is printed."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.tools.gpu_check import table, workers
from benchmarks.tools.gpu_check.lines import all_lines, append, left_over, plan, read_lines

BROKEN_WORKER = """
import json, os, sys, time
given = sys.argv[sys.argv.index("--worker") + 1:]
results = open(sys.argv[sys.argv.index("--results") + 1], "a")
for name in given:
    if time.monotonic() > float(sys.argv[sys.argv.index("--deadline") + 1]): sys.exit(0)
    if name == "hangs": time.sleep(60)
    if name == "crashes": os.kill(os.getpid(), 11)
    if name == "sleeps": time.sleep(4)
    lost = name == "loses"
    line = {"kernel": name, "status": "wrong" if lost else "right", "why": "assert"}
    results.write(json.dumps(line) + chr(10))
    results.flush()
    if lost: sys.exit(9)
"""


def supervised(tmp_path, names, processes, seconds, patience):
    worker, results = tmp_path / "worker.py", tmp_path / "lines.jsonl"
    worker.write_text(BROKEN_WORKER)
    command = [sys.executable, str(worker), "--results", str(results)]
    deadline = time.monotonic() + seconds
    workers.supervise(names, "kernel", command, results, processes, deadline, patience)
    return results


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_process_that_breaks_takes_no_other_name_with_it(tmp_path, processes):
    names = ["a", "loses", "b", "crashes", "c", "hangs", "d"]
    results = supervised(tmp_path, names, processes, seconds=120, patience=8.0)
    lines = {line["kernel"]: line for line in read_lines(results, "kernel")}
    assert lines["crashes"]["why"] == "the process ended with status -11"
    assert lines["hangs"]["why"] == "no end after 8 s"
    assert {name: line["status"] for name, line in lines.items()} == {
        name: "right" if len(name) == 1 else "wrong" for name in names
    }
    assert left_over(all_lines(results)) == {}


def test_what_has_no_time_is_left_over(tmp_path, capsys):
    results = supervised(tmp_path, ["sleeps", "b", "c"], 1, seconds=2.0, patience=60.0)
    lines = all_lines(results)
    left = left_over(lines)["kernel"]
    assert left in (["b", "c"], ["sleeps", "b", "c"]), "a process that started late does nothing"
    assert workers.summarize(results, "kernel", ["sleeps", "b", "c"]) == 1
    assert f"{len(left)} not run" in capsys.readouterr().out
    printed = table.report(lines)
    assert f"left over, kernel: {len(left)}: {', '.join(left)}" in printed


def test_a_lost_context_ends_the_process_after_its_line(tmp_path):
    results = tmp_path / "lines.jsonl"
    code = f"""
import sys
from benchmarks.tools.gpu_check.workers import Work
done = lambda name: ({{"status": "wrong", "why": name}}, "CUDA error" if name == "loses" else None)
work = Work("smoke", None, lambda o: "kernel", lambda o: [], lambda o: done)
given = ["--results", {str(results)!r}, "--deadline", "1e12", "--worker", "first", "loses", "never"]
sys.exit(work.main(given))
"""
    status = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code])
    assert status == workers.LOST
    assert [line["kernel"] for line in read_lines(results, "kernel")] == ["first", "loses"]


def test_the_table_shows_first_what_is_wrong_and_both_dtypes_in_a_row(tmp_path):
    path = tmp_path / "lines.jsonl"
    plan(path, "kernel", ["k bf16", "k fp32", "bad", "late"])
    facts = {"kernel_name": "k", "shape": "1x2"}
    append(path, {"kernel": "k bf16", **facts, "dtype": "bf16", "status": "right"})
    append(path, {"kernel": "k fp32", **facts, "dtype": "fp32", "status": "right"})
    append(
        path, {"kernel": "bad", "dtype": "bf16", "shape": "3x4", "status": "wrong", "why": "error 1.0e+00"}
    )
    append(path, {"timed kernel": "k bf16", "p50": 12.34, "floor": 6.0, "ratio": 2.06, "status": "right"})
    append(path, {"timed kernel": "k fp32", "status": "not run", "why": "no graph"})
    append(
        path,
        {
            "headline": "lookup",
            "shape": "5x6",
            "status": "right",
            "aim": "faster",
            "us": {"embkern": {"median": 3.0}, "F.embedding": {"median": 6.0}},
            "times_as_fast_as": {"F.embedding": 2.0},
            "failed": {"two-step": "OutOfMemoryError: no"},
        },
    )
    text = table.report(all_lines(path))
    assert text[1] == "WRONG: bad: error 1.0e+00"
    assert text[2] == "NOT RUN: late: no time was left"
    rows = {line.split()[0]: line.split()[1:] for line in text if line}
    assert rows["k"] == ["1x2", "12.3", "6.0", "2.1", "right"]
    assert rows["bad"] == ["3x4", "WRONG"]
    assert "kernels: 2 right, 1 wrong, 1 not run" in text
    (lookup,) = (line for line in text if line.startswith("lookup"))
    assert "2.00 x F.embedding, two-step FAILED: OutOfMemoryError: no   (aim: faster)" in lookup
    assert max(map(len, text)) < 250
