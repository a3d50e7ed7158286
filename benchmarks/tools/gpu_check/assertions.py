"""Stage 2: invalid ids must raise a device assertion, never cause a silent read.

An assertion destroys the CUDA context, so every case has its own process; the processes run concurrently.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .processes import ROOT, end_group

LIMIT_SECONDS = 60.0
OUT_OF_RANGE, NO_FIT = "an id is out of range", "the directory does not fit tiers and records"
NATIVE_OUT_OF_RANGE = "expected 0 <= id < V"


@dataclass(frozen=True)
class Assertion:
    """A call that must raise an assertion with this message."""

    name: str
    op: str
    backend: str
    message: str
    call: Callable


def _lookup(backend: str, count: int, bad: int) -> Callable:
    def call(place) -> None:  # type: ignore[no-untyped-def]  # importing it imports torch
        import torch

        ids = torch.zeros(count, dtype=torch.int64, device=place.type)
        ids[-1] = bad
        codes, basis = (torch.ones(size, device=place.type) for size in ((12, 16), (16, 64)))
        place.op("gather_project_forward", backend)(ids, codes, basis, None, 1.0)

    return call


def _backward(bad: int, codes_basis: tuple[bool, bool]) -> Callable:
    def call(place) -> None:  # type: ignore[no-untyped-def]
        import torch

        ids = torch.tensor([0, bad, 3], device=place.type)
        codes, basis, grad = (torch.ones(size, device=place.type) for size in ((12, 4), (4, 6), (3, 6)))
        needs = (*codes_basis, False, False)
        place.op("gather_project_backward", "triton")(grad, ids, codes, basis, 1.0, -1, *needs)

    return call


def _packed(id: int = 0, column: int | None = None, value: int = 0, backend: str = "triton") -> Callable:
    def call(place) -> None:  # type: ignore[no-untyped-def]
        import torch

        from embkern.tables.packed import TENSORS

        from ...packed_tables import random_packed_table

        table = random_packed_table(40, 5, 32).to(torch.device(place.type))
        tensors = [getattr(table, name) for name in TENSORS]
        if column is not None:
            tensors[1][0, column] = value
        ids = torch.tensor([0, id], device=place.type)
        place.op("gather_decode_forward", backend)(ids, *tensors, 5, 1.0)

    return call


ASSERTIONS = (
    Assertion("forward-1", "gather_project", "triton", OUT_OF_RANGE, _lookup("triton", 3, -1)),
    Assertion("forward+V", "gather_project", "triton", OUT_OF_RANGE, _lookup("triton", 3, 12)),
    Assertion("forward+2^40", "gather_project", "triton", OUT_OF_RANGE, _lookup("triton", 3, 2**40)),
    Assertion("codes-1", "gather_project", "triton", OUT_OF_RANGE, _backward(-1, (True, False))),
    Assertion("codes+2^40", "gather_project", "triton", OUT_OF_RANGE, _backward(2**40, (True, False))),
    Assertion("basis+V", "gather_project", "triton", OUT_OF_RANGE, _backward(12, (False, True))),
    Assertion("packed-1", "gather_decode", "triton", OUT_OF_RANGE, _packed(-1)),
    Assertion("packed+2^40", "gather_decode", "triton", OUT_OF_RANGE, _packed(2**40)),
    Assertion("packed+place", "gather_decode", "triton", NO_FIT, _packed(0, 0, 2**31 - 1)),
    Assertion("packed+tier", "gather_decode", "triton", NO_FIT, _packed(0, 1, -1)),
    Assertion("packed C++-1", "gather_decode", "native", NATIVE_OUT_OF_RANGE, _packed(-1, backend="native")),
    Assertion("packed C++ tier", "gather_decode", "native", NO_FIT, _packed(0, 1, -1, backend="native")),
    Assertion("few-1", "gather_project", "native", NATIVE_OUT_OF_RANGE, _lookup("native", 3, -1)),
    Assertion("few+2^40", "gather_project", "native", NATIVE_OUT_OF_RANGE, _lookup("native", 3, 2**40)),
    Assertion("some+V", "gather_project", "native", NATIVE_OUT_OF_RANGE, _lookup("native", 40, 12)),
    Assertion("many+2^40", "gather_project", "native", NATIVE_OUT_OF_RANGE, _lookup("native", 5000, 2**40)),
)


def main(arguments: list[str]) -> int:
    """Check every assertion; return 0 if all are raised. With ``--make``, raise one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check.assertions", description=__doc__
    )
    parser.add_argument("--make", help="one assertion, by name, in this process")
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    if options.make:
        return make(options.make, options.rehearse)
    faults, missing = check(ASSERTIONS, options.rehearse, options.limit_seconds)
    for name, fault in {**faults, **missing}.items():
        print(f"{'NO ASSERTION' if name in faults else 'NOT RUN'}: {name}: {fault}", flush=True)
    made = len(ASSERTIONS) - len(faults) - len(missing)
    print(f"{len(ASSERTIONS)} assertions: {made} made, {len(faults)} missed, {len(missing)} not run")
    return 1 if faults or missing else 0


def make(name: str, rehearse: bool) -> int:
    """Run one call in this process; it returns only if there was no assertion."""
    from .stand_in import place_of, raise_assertions

    place = place_of(rehearse)
    (assertion,) = (each for each in ASSERTIONS if each.name == name)
    if reason := place.unavailable(assertion.op, assertion.backend):
        print(f"not run: {reason}")
        return NOT_RUN
    if rehearse and assertion.backend == "triton":
        raise_assertions()
    assertion.call(place)
    place.synchronize()
    print("the call returned")
    return 0


NOT_RUN = 7  # exit status


def check(
    assertions: Sequence[Assertion], rehearse: bool = False, limit: float = LIMIT_SECONDS
) -> tuple[dict[str, str], dict[str, str]]:
    """Run the cases concurrently; return the failures and the reasons of cases not run, by name.

    An assertion on the device ends a process with the message of the kernel and torch's own.
    """
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check.assertions"]
    command += ["--rehearse"] if rehearse else []
    variables = os.environ | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    deadline = time.monotonic() + limit
    faults, missing = {}, {}
    at_once = max(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, len(assertions), at_once):
            running = []
            for each in assertions[first : first + at_once]:
                output = (Path(folder) / each.name).open("w+")
                process = subprocess.Popen(
                    [*command, "--make", each.name],
                    cwd=ROOT,
                    env=variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                running.append((each, output, process))
            for each, output, process in running:
                try:
                    status: int | None = process.wait(max(1.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    end_group(process, patience=0.5)
                    status = None
                with output:
                    output.seek(0)
                    text = output.read()
                print(f"-- {each.name} ended with {status}\n{text[-1500:]}", flush=True)
                if status == NOT_RUN:
                    missing[each.name] = text.strip().splitlines()[-1].removeprefix("not run: ")
                elif fault := _fault(each, status, text, rehearse):
                    faults[each.name] = fault
    return faults, missing


def _fault(assertion: Assertion, status: int | None, text: str, rehearse: bool) -> str | None:
    if status is None:
        return "no end in time"
    if status == 0:
        return "the call returned"
    if assertion.message not in text:
        return f"ended with {status} and without the message {assertion.message!r}"
    if not rehearse and "device-side assert" not in text:
        return f"ended with {status}, which is no device-side assertion"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
