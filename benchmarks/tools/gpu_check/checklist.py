"""The stages in their order, and the summary at the end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .lines import environment_of, read_lines
from .processes import LIMIT, PASSED, ROOT, SKIPPED, Result, run_stage
from .smoke import SLOWER
from .table import merged, table

RESULTS = ROOT / "benchmarks" / "results"
SHOWN = 1500  # characters of the end of a stage that did not pass, below the table
# Folders of tests marked gpu that need only what the kernels need, and those that need more.
GPU_TESTS = ("tests/cuda", "tests/ops", "tests/triton")
GPU_TESTS_OF_METHODS = ("tests/methods/autoencoder/test_graph.py",)


@dataclass(frozen=True)
class Stage:
    """One line of the checklist: a command, its time limit, and the stages it needs.

    ``share`` bounds its part of the time left at its start; it is skipped if one of ``modules`` is missing.
    """

    name: str
    what: str
    command: Sequence[str]
    seconds: float
    needs: Sequence[str] = ()
    share: float = 1.0
    modules: Sequence[str] = ()


def checklist(options: argparse.Namespace) -> list[Stage]:
    """Return the stages: 0 to 2 are the smoke test."""
    out, python = options.out.resolve(), sys.executable
    kernels = str(out / KERNELS)
    rehearse = ["--rehearse"] if options.rehearse else []
    limit = ["--limit-seconds", LIMIT]

    def module(name: str, *arguments: str) -> list[str]:
        return [python, "-u", "-m", f"benchmarks.tools.gpu_check.{name}", *arguments, *rehearse]

    def benchmark(name: str) -> list[str]:
        options = ["--device", "cuda", "--quick", *limit]  # it ends before its time limit
        return [python, "-u", "-m", "benchmarks", name, *options]

    carried = ["--extension", str(options.extension)] if options.extension else []
    most = 180 if options.smoke else 115  # it ends sooner where compilation is fast
    smoke = ["--results", kernels, *limit]
    smoke += ["--only", options.only] if options.only else []
    stages = [
        Stage("0 device", "versions, the device, its ceilings", module("device", "--results", kernels), 55),
        Stage("0 extension", "load it, else build it", module("extension", *carried), 170, ["0 device"]),
        Stage("1 kernels", "every kernel, right and how fast", module("smoke", *smoke), most, ["0 device"]),
        Stage("2 assertions", "what they must refuse", module("assertions", *limit), 60, ["0 device"]),
    ]
    if options.smoke:
        return [replace_seconds(stage, SLOWER if options.rehearse else 1) for stage in stages]
    tests = ["-m", "gpu", "--tb=short", "--durations=5", "-p", "no:cacheprovider", *_workers()]
    tests += [*GPU_TESTS, *(GPU_TESTS_OF_METHODS if _installed("pydantic") else ())]
    tuner = [python, "-u", "-m", "benchmarks", "tune_gather_project"]
    device = ["0 device"]
    later = [
        Stage("3 lookup", "gather_project beside peers", benchmark("gather_project"), 170, device, 0.25),
        Stage("3 packed", "gather_decode beside peers", benchmark("gather_decode"), 170, device, 0.2),
        Stage("3 loss", "cosine_mse beside plain torch", benchmark("cosine_mse"), 170, device, 0.25),
        Stage("3 training", "its steps", benchmark("train"), 170, device, 0.3, ["pydantic"]),
        Stage("4 tuner", "tiles of gather_project", tuner, 170, device, 0.3),
        Stage("5 tests", "all that are marked gpu", [python, "-m", "pytest", *tests], 300, device),
    ]
    return stages + later


NO_DEVICE = 2  # exit status of the device stage
KERNELS, LOG = "kernels.jsonl", "gpu_check.log"


def replace_seconds(stage: Stage, factor: float) -> Stage:
    """Return a stage whose time limit is ``factor`` times as long."""
    return Stage(**{**vars(stage), "seconds": stage.seconds * factor})


def main(arguments: list[str]) -> int:
    """Run the stages; return 0 if all passed, 1 if one did not, 2 without a CUDA device."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (KERNELS, LOG):  # of an earlier run
        (options.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    run = Run(options, " ".join(["python -m benchmarks.tools.gpu_check", *arguments]))
    try:
        for stage in checklist(options):
            run.stage(stage)
            if run.results[-1].returncode == NO_DEVICE and len(run.results) == 1:
                print(run.results[-1].tail, end="")
                return 2
    finally:
        run.end()
    return 0 if all(result.status == PASSED for result in run.results) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    import benchmarks.tools.gpu_check as package

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="stages 0 to 2 alone")
    parser.add_argument("--rehearse", action="store_true", help="with --smoke: no device, see stand_in.py")
    parser.add_argument("--only", help="of stage 1, the kernels with this in their name")
    parser.add_argument("--extension", type=Path, help="built elsewhere; default: build/gpu, if it is there")
    parser.add_argument("--limit-seconds", type=float, default=540, help="for everything together")
    default = os.environ.get("OUT") or RESULTS
    parser.add_argument(
        "--out", type=Path, default=Path(default), help="default: $OUT, or benchmarks/results"
    )
    options = parser.parse_args(arguments)
    if options.rehearse and not options.smoke:
        parser.error("--rehearse goes with --smoke: the other stages need a device")
    return options


def _stop(*_: object) -> None:
    raise SystemExit("stopped")  # the handlers on the way out end the processes and print the table


class Run:
    """The results so far, written after every stage."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.deadline = time.monotonic() + options.limit_seconds
        self.results: list[Result] = []
        self.variables = _variables(options.out, options.rehearse)

    def stage(self, stage: Stage) -> None:
        """Run a stage, unless a stage or module it needs is missing."""
        passed = {result.name for result in self.results if result.status == PASSED}
        reasons = [f"{name} did not pass" for name in stage.needs if name not in passed]
        reasons += [f"{name} is not installed" for name in stage.modules if not _installed(name)]
        if reasons:
            self.results.append(Result(stage.name, [], SKIPPED, tail="; ".join(reasons)))
        else:
            limit = min(stage.seconds, (self.deadline - time.monotonic()) * stage.share)
            command, log = list(stage.command), self.options.out / LOG
            self.results.append(run_stage(stage.name, command, limit, self.variables, log))
        self.write()

    def found(self) -> dict[str, Any]:
        """Return the record of the device stage."""
        return environment_of(self.options.out / KERNELS)

    def kernels(self) -> list[dict[str, Any]]:
        """Return a row per kernel."""
        return merged(read_lines(self.options.out / KERNELS))

    def write(self) -> Path | None:
        """Write the results so far, to a file named after the device."""
        found = self.found()
        if not found:
            return None
        path = self.options.out / f"gpu_check_{file_name(found['device'])}.json"
        content = {
            "command": self.command,
            "environment": found,
            "tests": test_counts(self.results),
            "stages": [asdict(result) for result in self.results],
            "kernels": self.kernels(),
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
        return path

    def end(self) -> None:
        """Print the table, a line per stage, and the last output of stages that did not pass."""
        path = self.write()
        if kernels := self.kernels():
            print("\n" + "\n".join(table(kernels, self.options.rehearse)))
        summary(self.results)
        if path:
            print(f"-> {path}, {KERNELS} and {LOG} beside it", flush=True)


def summary(results: list[Result]) -> None:
    """Print one line per stage, then the last output of stages that did not pass."""
    print()
    for result in results:
        note = result.tail.replace("\n", "; ") if result.status == SKIPPED else ""
        print(f"{result.name:14} {result.status:10} {result.seconds:7.1f} s  {note}".rstrip())
    for result in results:
        if result.status not in (PASSED, SKIPPED):
            print(f"\n== end of {result.name} ({result.status})\n{result.tail[-SHOWN:]}")


def _variables(out: Path, rehearse: bool) -> dict[str, str]:
    """Return the environment variables of the stages: deterministic cuBLAS, results in ``out``."""
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", **os.environ}
    variables["EMBKERN_RESULTS"] = str(out.resolve())
    return variables | ({"TRITON_INTERPRET": "1"} if rehearse else {})


def _workers() -> list[str]:
    """Return pytest's options for several processes, each with its own CUDA context."""
    if not _installed("xdist"):
        return []
    return ["-n", str(max(2, min(12, (os.cpu_count() or 1) - 2))), "--max-worker-restart", "40"]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_counts(results: list[Result]) -> dict[str, int]:
    """Return the counts in the last line of pytest: passed, failed, skipped, errors."""
    tails = [result.tail for result in results if result.name.endswith("tests")]
    lines = tails[0].strip().splitlines()[-1:] if tails else []
    return {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]+)", " ".join(lines))}


def file_name(device: str) -> str:
    """Return a device's name as part of a file name: `NVIDIA H100 80GB HBM3` -> `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
