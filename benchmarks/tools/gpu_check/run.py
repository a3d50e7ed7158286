"""A run of the checklist: its stages, results file, archive, and what is printed at the end."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .lines import FILE, all_lines, environment_of, left_over
from .packages import SITE
from .processes import PASSED, SKIPPED, UNNECESSARY, Result, run_stage
from .table import counts_of_tests, report

SHORTEST, WORTH_IT = 5.0, 20.0  # seconds below which a stage, or an optional one, is not started
LOG, ARCHIVE = "gpu_check.log", "gpu_check.tar.gz"
SHOWN, SHOWN_IN_ALL = 1200, 3000  # characters of the ends of stages that did not pass, below the table


@dataclass(frozen=True)
class Stage:
    """One line of the checklist: a command and its time limit. No stage needs that another one passed.

    Attributes:
        name: with its number.
        what: it does, in a few words.
        command: of its process.
        seconds: after which it is ended.
        unless: a stage that makes this one unnecessary if it passed.
        modules: without which it is skipped.
        optional: it takes what time is left, if that is worth it, and is not missed.
    """

    name: str
    what: str
    command: Sequence[str]
    seconds: float
    unless: str | None = None
    modules: Sequence[str] = ()
    optional: bool = False


class Run:
    """The results so far, written after every stage."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command, self.out = options, command, options.out
        self.deadline, self.began = time.monotonic() + options.limit_seconds, time.time()
        self.results: list[Result] = []
        self.variables = _variables(self.out, options.rehearse)
        self.out.mkdir(parents=True, exist_ok=True)
        for path in (self.out / FILE, self.out / LOG, self.out / ARCHIVE, *self.out.glob("gpu_check_*.json")):
            path.unlink(missing_ok=True)  # of an earlier run

    def stage(self, stage: Stage) -> None:
        """Run a stage, unless it is unnecessary, a module is missing, or no time is left."""
        passed = {result.name for result in self.results if result.status == PASSED}
        reasons = [f"{name} is not installed" for name in stage.modules if not installed(name)]
        limit = min(stage.seconds, self.deadline - time.monotonic())
        if not reasons and limit < (WORTH_IT if stage.optional else SHORTEST):
            reasons.append(f"only {max(0.0, limit):.0f} s were left")
        if stage.unless in passed:
            self.results.append(Result(stage.name, [], UNNECESSARY, tail=f"{stage.unless} passed"))
        elif reasons:
            status = UNNECESSARY if stage.optional else SKIPPED
            self.results.append(Result(stage.name, [], status, tail="; ".join(reasons)))
        else:
            command, log = list(stage.command), self.out / LOG
            self.results.append(run_stage(stage.name, stage.what, command, limit, self.variables, log))
        self.write()

    def passed(self) -> bool:
        """Return whether every stage passed or was unnecessary."""
        return all(result.status in (PASSED, UNNECESSARY) for result in self.results)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines that the stages wrote."""
        return all_lines(self.out / FILE)

    def write(self) -> Path:
        """Write the results so far, to a file named after the device, and the archive."""
        found, lines = environment_of(self.out / FILE), self.lines()
        path = self.out / f"gpu_check_{file_name(found.get('device', 'unknown device'))}.json"
        content = {
            "command": self.command,
            "environment": found,
            "stages": [asdict(result) for result in self.results],
            "tests": counts_of_tests(lines),
            "left_over": left_over(lines),
            "lines": [line for line in lines if not {"environment", "planned", "test"} & line.keys()],
        }
        temporary = path.with_suffix(".tmp")
        head, rows = json.dumps({**content, "lines": 0}, indent=1), content["lines"]
        text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        temporary.write_text(head.replace('"lines": 0', f'"lines": [\n{text}\n ]') + "\n")
        temporary.replace(path)
        for other in self.out.glob("gpu_check_*.json"):
            if other != path:  # of a stage before the device was known
                other.unlink()
        self.archive()
        return path

    def archive(self) -> None:
        """Write all files of this run to one archive, which is whole at any time."""
        temporary = self.out / f".{ARCHIVE}"
        with tarfile.open(temporary, "w:gz") as archive:
            for each in sorted(self.out.iterdir()):
                mine = each.is_file() and each.stat().st_mtime >= self.began - 1
                if mine and not each.name.startswith(".") and each.name != ARCHIVE:
                    archive.add(each, arcname=f"gpu_check/{each.name}")
        temporary.replace(self.out / ARCHIVE)

    def end(self) -> None:
        """Print the table, a line per stage, and the last output of stages that did not pass."""
        path = self.write()
        print("\n".join(report(self.lines(), self.options.rehearse)))
        summary(self.results)
        print(f"-> {path.name}, {FILE}, {LOG}; all in {self.out / ARCHIVE}", flush=True)


def summary(results: list[Result]) -> None:
    """Print one line per stage, then the last output of stages that did not pass."""
    print()
    for result in results:
        lines = result.tail.strip().splitlines() or [""]
        note = result.tail.replace("\n", "; ") if result.status in (SKIPPED, UNNECESSARY) else lines[-1][:70]
        print(f"{result.name:14} {result.status:11} {result.seconds:7.1f} s  {note}".rstrip())
    left = SHOWN_IN_ALL
    for result in results:
        if result.status not in (PASSED, SKIPPED, UNNECESSARY) and left > 0:
            end = result.tail[-min(SHOWN, left) :]
            left -= len(end)
            print(f"\n== end of {result.name} ({result.status})\n{end}")


def installed(module: str) -> bool:
    """Return whether a module can be imported in a stage."""
    importlib.invalidate_caches()
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(module) is not None:
            return True
    return (SITE / module).is_dir()


def _variables(out: Path, rehearse: bool) -> dict[str, str]:
    """Return the environment variables of the stages: carried packages, deterministic cuBLAS, results."""
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", **os.environ}
    variables["EMBKERN_RESULTS"] = str(out.resolve())
    variables["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables | ({"TRITON_INTERPRET": "1"} if rehearse else {})


def file_name(device: str) -> str:
    """Return a device's name as part of a file name: `NVIDIA H100 80GB HBM3` -> `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def python(*arguments: str) -> list[str]:
    """Return a command of this Python, unbuffered."""
    return [sys.executable, "-u", *arguments]
