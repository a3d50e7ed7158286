"""Stages as processes: each has a time limit, appends to one log, and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
TAIL = 4000  # characters of a stage's output that the results file keeps; the log has all of it
PATIENCE = 5.0  # seconds between the interrupt and the kill of a stage that is late
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
UNNECESSARY = "unnecessary"
LIMIT = "LIMIT"  # in a command: the seconds after which it should start nothing new


@dataclass
class Result:
    """The result of a stage; ``tail`` is the end of its output."""

    name: str
    command: list[str]
    status: str
    seconds: float = 0.0
    returncode: int | None = None
    tail: str = ""


def run_stage(
    name: str, what: str, command: list[str], limit: float, variables: dict[str, str], log: Path
) -> Result:
    """Run a command for at most ``limit`` seconds, then end it and every process it started.

    Its output is appended to ``log`` as it comes, so that nothing is lost if this process is killed.
    """
    command = [f"{limit * 0.85:.0f}" if part == LIMIT else part for part in command]
    print(f"== {name}: {what} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n== {name} (at most {limit:.0f} s): {' '.join(command)}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = PASSED if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    tail = end_of(log, begin)
    result = Result(name, command, status, round(seconds, 1), process.returncode, tail)
    last = (tail.strip().splitlines() or [""])[-1]
    print(f"   {result.status} after {result.seconds} s: {last[:90]}", flush=True)
    return result


def end_of(log: Path, begin: int) -> str:
    """Return at most the last TAIL characters of a log after the byte ``begin``."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(begin, file.tell() - TAIL))
        return file.read().decode(errors="replace")


def end_group(process: subprocess.Popen, patience: float | None = None) -> None:
    """End a process group, first by an interrupt, so that pytest can print where it was."""
    for which in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, which)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE if patience is None else patience)
