"""Named pieces of work in several processes, so that one failure stops no other piece.

A process appends a line per name. If it crashes or hangs, the name that it was at is recorded as wrong; if
its CUDA context is lost (an error that CUDA keeps), it has written its line and ends by itself. In both cases
a new process takes the names that are left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lines import append, plan, read_lines
from .processes import ROOT

NAME_SECONDS = 45.0  # for one name with its compilation; a slower process is taken to hang
SLOWER = 12  # times as long in a rehearsal, on few cores
LOST = 9  # exit status of a process whose CUDA context is lost
RIGHT, WRONG, NOT_RUN = "right", "wrong", "not run"


@dataclass(frozen=True)
class Work:
    """A stage that consists of named pieces.

    Attributes:
        module: of this package; its processes are `python -m benchmarks.tools.gpu_check.MODULE`.
        description: of the command.
        key: of the lines, given the options.
        names: of the pieces, given the options.
        prepare: returns, in a process of the work, the function that does one piece: its line without the
            key, and why the process cannot go on, or None.
        processes: how many run at once.
        options: adds the module's own.
    """

    module: str
    description: str | None
    key: Callable[[argparse.Namespace], str]
    names: Callable[[argparse.Namespace], list[str]]
    prepare: Callable[[argparse.Namespace], Callable[[str], tuple[dict[str, Any], str | None]]]
    processes: int = 1
    options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None

    def main(self, arguments: list[str]) -> int:
        """Do every piece; return 0 if all are right."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.tools.gpu_check.{self.module}", description=self.description
        )
        add = parser.add_argument
        add("--results", type=Path, required=True, help="file of lines, which are appended")
        add("--limit-seconds", type=float, default=100)
        add("--only", default="", help="a part of the names of what is done")
        add("--rehearse", action="store_true", help="without a device, see stand_in.py")
        add("--worker", nargs="*", help=argparse.SUPPRESS)
        add("--deadline", type=float, help=argparse.SUPPRESS)
        add("--processes", type=int, default=min(self.processes, os.cpu_count() or 1))
        self.options(parser)
        options = parser.parse_args(arguments)
        if options.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, in the processes too
        if options.worker is not None:
            self._work(options)
            return 0
        command = [sys.executable, "-u", "-m", f"benchmarks.tools.gpu_check.{self.module}", *arguments]
        names = [name for name in self.names(options) if options.only in name]
        patience = NAME_SECONDS * (SLOWER if options.rehearse else 1)
        deadline = time.monotonic() + options.limit_seconds
        supervise(names, self.key(options), command, options.results, options.processes, deadline, patience)
        return summarize(options.results, self.key(options), names)

    def _work(self, options: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
        do, key = self.prepare(options), self.key(options)
        for name in options.worker:
            if time.monotonic() > options.deadline:
                return  # what has no line is left over
            start = time.monotonic()
            line, lost = do(name)
            seconds = round(time.monotonic() - start, 2)
            append(options.results, {key: name, "status": RIGHT, **line, "seconds": seconds})
            print(f"{key} {name}: {line.get('status', RIGHT)} {line.get('why', '')}".rstrip(), flush=True)
            if lost:
                print(f"this process ends: its CUDA context is lost at {name}: {lost}", flush=True)
                os._exit(LOST)  # the destructors of a lost context may crash


def supervise(
    names: Sequence[str],
    key: str,
    command: Sequence[str],
    results: Path,
    processes: int,
    deadline: float,
    patience: float,
) -> None:
    """Run ``command --deadline SECONDS --worker NAMES`` in several processes until each name has a line.

    After the deadline no process is started, and those that are left end after their present name.
    """

    def done() -> set[str]:
        return {line[key] for line in read_lines(results, key)}

    plan(results, key, names)
    count = max(1, min(processes, len(names)))
    shares = [_Share(list(names[index::count])) for index in range(count) if names[index::count]]
    for share in shares:
        share.start(command, deadline)
    while any(share.process for share in shares):
        time.sleep(0.2)
        for share in shares:
            if share.process is None:
                continue
            if failed := share.look(done, patience):
                append(results, {key: failed[0], "status": WRONG, "why": failed[1]})
            left = share.left(done())
            if share.process is None and left and time.monotonic() < deadline:
                share.names = left
                share.start(command, deadline)


@dataclass
class _Share:
    """The names of one process and of those that follow it after a failure."""

    names: list[str]
    process: subprocess.Popen | None = None
    done: int = 0
    since: float = field(default_factory=time.monotonic)

    def start(self, command: Sequence[str], deadline: float) -> None:
        """Start a process for the names."""
        self.process = subprocess.Popen(
            [*command, "--deadline", str(deadline), "--worker", *self.names], cwd=ROOT
        )
        self.done, self.since = 0, time.monotonic()

    def left(self, done: set[str]) -> list[str]:
        """Return the names without a line."""
        return [name for name in self.names if name not in done]

    def look(self, done: Callable[[], set[str]], patience: float) -> tuple[str, str] | None:
        """Poll the running process; return the name at which it crashed or hung, and why, if it did."""
        assert self.process is not None
        status = self.process.poll()  # before its lines are read: an ended process writes no more
        left = self.left(done())
        if len(self.names) - len(left) != self.done:
            self.done, self.since = len(self.names) - len(left), time.monotonic()
        if status is None and left and time.monotonic() - self.since > patience:
            self.process.kill()
            self.process.wait()
            self.process = None
            return left[0], f"no end after {patience:.0f} s"
        if status is None:
            return None
        self.process = None
        return (
            (left[0], f"the process ended with status {status}") if left and status not in (0, LOST) else None
        )


def summarize(results: Path, key: str, names: Sequence[str]) -> int:
    """Print what is not right, then the counts; return 0 if all names are right."""
    found = {line[key]: line for line in read_lines(results, key)}
    by_status: dict[str, list[str]] = {status: [] for status in (RIGHT, WRONG, NOT_RUN)}
    for name in names:
        line = found.get(name, {"status": NOT_RUN, "why": "no time was left"})
        by_status[line["status"]].append(name)
        if line["status"] != RIGHT:
            print(f"{line['status'].upper()}: {name}: {line.get('why', '')}")
    counts = ", ".join(f"{len(each)} {status}" for status, each in by_status.items())
    print(f"{len(names)} {key}: {counts}", flush=True)
    return 0 if len(by_status[RIGHT]) == len(names) else 1
