"""Stage 1: every kernel at every shape and dtype, in several processes, so that one failure stops no other.

A kernel is right if its error against float64 is at most twice plain torch's (or one rounding of the result),
a second call gives the same bits, and a CUDA graph replayed on other inputs gives the result of a call. After
the checks of its kernels, a process waits until it is alone on the device and times the right ones. Every
call has the same inputs, so that those that fit in the L2 cache are read from there.

An error that CUDA keeps ends the process, as do crashes and hangs; a new process takes its remaining kernels.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .lines import append, environment_of, read_lines
from .processes import ROOT

PROCESSES = 8
CASE_SECONDS = 45.0  # for one kernel with its compilation; a slower process is taken to hang
SLOWER = 12  # times as long in a rehearsal, on few cores
TIMING_SECONDS = 15.0  # at the end of the stage, in which no process waits to be alone
LOST = 9  # exit status of a process whose CUDA context is lost
RIGHT, WRONG, NOT_RUN = "right", "wrong", "not run"


def main(arguments: list[str]) -> int:
    """Judge and time every case; return 0 if all are right."""
    options = _parse(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, in the processes too
    if options.worker is not None:
        return _worker(options)
    deadline = time.monotonic() + options.limit_seconds
    from .kernels import cases
    from .stand_in import place_of

    names = [case.name for case in cases(place_of(options.rehearse))]
    if options.only:
        names = [name for name in names if options.only in name]
    count = max(1, min(options.processes, len(names)))
    shares = [_Share(names[index::count]) for index in range(count)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    earlier = len(read_lines(options.results))  # lines of another run
    for share in shares:
        share.start(options, deadline)
    while any(share.process for share in shares):
        time.sleep(0.2)
        for share in shares:
            if line := share.look(lambda: read_lines(options.results)[earlier:], options, deadline):
                append(options.results, line)
    lines = [line for line in read_lines(options.results)[earlier:] if "status" in line]
    by_status = {
        status: [line for line in lines if line["status"] == status] for status in (RIGHT, WRONG, NOT_RUN)
    }
    for line in by_status[WRONG] + by_status[NOT_RUN]:
        print(f"{line['status'].upper()}: {line['case']}: {line['why']}")
    print(
        f"{len(names)} kernels: " + ", ".join(f"{len(each)} {status}" for status, each in by_status.items())
    )
    return 0 if len(by_status[RIGHT]) == len(names) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu_check.smoke", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("kernels.jsonl"), help="lines are appended")
    parser.add_argument("--limit-seconds", type=float, default=100)
    parser.add_argument("--processes", type=int, default=min(PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--only", help="a part of the names of the kernels to run")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> list[str]:
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.tools.gpu_check.smoke",
        "--results",
        str(options.results),
    ]
    return [*command, "--rehearse"] if options.rehearse else command


@dataclass
class _Share:
    """The cases of one process and of its successors after a failure."""

    names: list[str]
    process: subprocess.Popen | None = None
    judged: int = 0
    since: float = field(default_factory=time.monotonic)

    def start(self, options: argparse.Namespace, deadline: float) -> None:
        """Start a process for the remaining names."""
        command = [*_command(options), "--deadline", str(deadline), "--worker", *self.names]
        self.process = subprocess.Popen(command, cwd=ROOT)
        self.since = time.monotonic()

    def look(
        self, read: Callable[[], list[dict[str, Any]]], options: argparse.Namespace, deadline: float
    ) -> dict[str, Any] | None:
        """Poll the process; return a line about the case in which it failed, if it did."""
        if self.process is None:
            return None
        status = self.process.poll()  # before its lines are read: an ended process writes no more
        judged = {line["case"] for line in read() if "status" in line}
        left = [name for name in self.names if name not in judged]
        if len(self.names) - len(left) != self.judged:
            self.judged, self.since = len(self.names) - len(left), time.monotonic()
        patience = CASE_SECONDS * (SLOWER if options.rehearse else 1)
        hangs = status is None and bool(left) and time.monotonic() - self.since > patience
        if status is None and not hangs:
            return None
        if hangs:
            self.process.kill()
            self.process.wait()
        self.process = None
        line = None
        if left and status != LOST:
            why = f"no end after {patience:.0f} s" if hangs else f"the process ended with status {status}"
            line = {"case": left.pop(0), "status": WRONG, "why": why}
        if left and time.monotonic() < deadline:
            self.names, self.judged = left, 0
            self.start(options, deadline)
        return line


def _worker(options: argparse.Namespace) -> int:
    """Judge the named cases, then time the right ones alone on the device."""
    import torch

    from .kernels import cases
    from .stand_in import place_of

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    place = place_of(options.rehearse)
    found = {case.name: case for case in cases(place)}
    right = []
    with Turn(options.results) as turn:
        for name in options.worker:
            if time.monotonic() > options.deadline:
                append(options.results, {"case": name, "status": NOT_RUN, "why": "no time was left"})
                continue
            line, lost = judged_line(found[name], place)
            append(options.results, line)
            print(f"{name}: {line['status']} {line.get('why', '')}".rstrip(), flush=True)
            if lost:
                _end(f"this process ends: its CUDA context is lost: {lost}")
            if line["status"] == RIGHT:
                right.append(name)
        alone = turn.alone(options.deadline - TIMING_SECONDS)
        for name in right:
            if time.monotonic() > options.deadline:
                break
            line, lost = timed_line(found[name], place, environment_of(options.results), alone)
            append(options.results, line)
            if lost:
                _end(f"this process ends: its CUDA context is lost while timing {name}: {lost}")
    return 0


def _end(why: str) -> NoReturn:
    """Exit immediately: the destructors of a lost context may crash."""
    print(why, flush=True)
    os._exit(LOST)


def judged_line(case: Any, place: Any) -> tuple[dict[str, Any], str | None]:
    """Return the line of one case, and why the process cannot continue, if so."""
    start = time.monotonic()
    line = {"case": case.name, "shape": str(case.shape), "status": RIGHT}
    lost = None
    if reason := place.unavailable(case.kernel.op, case.kernel.backend):
        return {**line, "status": NOT_RUN, "why": reason}, None
    from .place import deterministic

    try:
        with deterministic():
            faults = judge(case, place, line)
    except Exception as error:  # a failing kernel does not stop the checks of the others
        from ...machine import first_line

        faults, lost = [first_line(error)], place.lost()
    if faults:
        line.update(status=WRONG, why="; ".join(faults))
    if not lost:
        place.release()
    return {**line, "seconds": round(time.monotonic() - start, 2)}, lost


def judge(case: Any, place: Any, line: dict[str, Any]) -> list[str]:
    """Return the faults of a kernel; the figures are added to ``line``."""
    import torch

    from ...runner import DTYPES, relative_error
    from .place import poisoned

    problem, dtype = case.problem(place), DTYPES[case.dtype]
    with poisoned():
        first = problem.call()
        place.synchronize()
    results = [each.clone() for each in first]
    faults, worst = [], 0.0
    for index, (got, native, exact) in enumerate(
        zip(results, problem.plain(dtype), problem.plain(torch.float64), strict=True)
    ):
        if got.shape != exact.shape or got.dtype != native.dtype:
            faults.append(f"result {index}: {got.dtype} {tuple(got.shape)} in place of {tuple(exact.shape)}")
        elif exact.numel():
            error, theirs = relative_error(got, exact), relative_error(native, exact)
            rounding = torch.finfo(got.dtype).eps / 2  # on few values plain torch may be more exact by chance
            allowed = max(2 * theirs, rounding) + problem.tiny
            worst = max(worst, error / allowed)
            if not error <= allowed:
                faults.append(f"result {index}: error {error:.1e}, plain torch's is {theirs:.1e}")
    line["error_over_allowed"] = round(worst, 3)
    again = problem.call()
    place.synchronize()
    if not _equal(results, again):
        faults.append("a second call gave other bits")
    other = case.problem(place, seed=1)
    replayed = place.replay(problem.call, lambda: problem.change(other))
    if not _equal(replayed, problem.call()):
        faults.append(f"the {place.replays} gave other bits than a call")
    if _equal(results, replayed):
        faults.append(f"the {place.replays} did not read the new inputs")
    line["replayed_by"] = place.replays
    return faults


def _equal(some: Iterable[Any], others: Iterable[Any]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def timed_line(
    case: Any, place: Any, ceilings: dict[str, Any], alone: bool
) -> tuple[dict[str, Any], str | None]:
    """Return the line with a case's time, its floor and their ratio."""
    from embkern.experiments.timing import quantiles

    from ...machine import first_line

    line: dict[str, Any] = {"case": case.name}
    try:
        problem = case.problem(place)
        times, timer = place.time(problem.timed or problem.call)
        figures = quantiles(times)
        line.update(p50=figures["median"], p20=figures["p20"], p80=figures["p80"], timer=timer, alone=alone)
        if products := ceilings.get("gflops"):
            product = products.get(case.dtype) or products["fp32"]
            floor = max(problem.least_bytes / ceilings["copy_gbps"], problem.least_flops / product) / 1e3
            line.update(floor=round(floor, 3), ratio=round(figures["median"] / floor, 2))
    except Exception as error:  # a failed timing does not affect the others
        return {**line, "untimed": first_line(error)}, place.lost()
    place.release()
    return line, None


class Turn:
    """The lock of the results file: shared by processes that check, exclusive to one that times."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Turn:
        """Acquire the shared lock."""
        self.file = self.path.open("a")
        fcntl.flock(self.file, fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.file.close()

    def alone(self, deadline: float) -> bool:
        """Acquire the exclusive lock; return False if that fails before the deadline."""
        fcntl.flock(self.file, fcntl.LOCK_UN)
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
