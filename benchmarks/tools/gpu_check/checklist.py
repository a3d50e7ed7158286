"""The checklist: the stages in their order, with the seconds that each may take."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path

from .lines import FILE
from .processes import LIMIT, ROOT
from .run import Run, Stage, python
from .workers import SLOWER

NO_DEVICE = 2  # exit status of the device stage, and of this command then
SECONDS = 545  # for everything together; a stage that is late takes a few more to end
OUT = ROOT / "build" / "gpu_check" / "results"


def checklist(options: argparse.Namespace) -> list[Stage]:
    """Return the stages: 0 to 2 are the smoke test, 8 takes what time is left."""
    results = ["--results", str(options.out.resolve() / FILE)]
    limit = ["--limit-seconds", LIMIT]
    rehearse = ["--rehearse"] if options.rehearse else []
    only = ["--only", options.only] if options.only else []
    carried = ["--extension", str(options.extension)] if options.extension else []
    device = "cpu" if options.rehearse else "cuda"

    def tool(name: str, *arguments: str) -> list[str]:
        return python("-m", f"benchmarks.tools.gpu_check.{name}", *arguments, *rehearse)

    def benchmark(name: str, *arguments: str) -> list[str]:
        given = ["--device", device, "--quick", "--no-compile", *limit, *arguments]
        return python("-m", "benchmarks", name, *given)

    common = [*results, *limit]
    recipe = ["--tables", "minilm", "--terms", "cosine+power", "--batches", "32"]
    training = benchmark("train", *recipe)
    stages = [
        Stage("0 device", "versions, copies, products", tool("device", *results), 60),
        Stage("0 packages", "install carried wheels", tool("packages"), 15),
        Stage("0 extension", "load it and run kernels", tool("extension", *carried), 35),
        Stage("0 build", "else build it first", tool("build"), 120, unless="0 extension"),
        Stage("1 kernels", "every kernel against float64", tool("smoke", *common, *only), 100),
        Stage("2 assertions", "what they must refuse", tool("assertions", *limit), 30),
    ]
    if not options.smoke:
        stages += [
            Stage("3 timings", "of kernels that are right", tool("timings", *common), 55),
            Stage("3 headlines", "four cells beside eager torch", tool("headlines", *common), 30),
            Stage("3 training", "steps beside the plain loop", training, 20, modules=["pydantic"]),
            Stage("4 compiled", "the four cells, compiled", tool("headlines", "--compiled", *common), 40),
            Stage("5 tiles", "other tiles, against float64", tool("smoke", "--tiles", *common), 28),
            Stage("5 tile times", "of those", tool("timings", "--tiles", *common), 12),
            Stage("6 tests", "all that are marked gpu", tool("suite", *results), 145),
            Stage("7 build", "from source", tool("build"), 50, unless="0 build"),
            Stage("8 lookup", "gather_project beside peers", benchmark("gather_project"), 60, optional=True),
            Stage("8 packed", "gather_decode beside peers", benchmark("gather_decode"), 60, optional=True),
            Stage("8 loss", "cosine_mse beside plain torch", benchmark("cosine_mse"), 60, optional=True),
        ]
    if options.rehearse:  # the optional ones are benchmarks, which have tests of their own on a CPU
        return [replace(each, seconds=each.seconds * SLOWER) for each in stages if not each.optional]
    return stages


def main(arguments: list[str]) -> int:
    """Run the stages; return 0 if all passed, 1 if one did not, 2 without a CUDA device."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _stop)
    run = Run(options, " ".join(["python -m benchmarks.tools.gpu_check", *arguments]))
    try:
        for stage in checklist(options):
            run.stage(stage)
            if run.results[-1].returncode == NO_DEVICE and stage.name == "0 device":
                print(run.results[-1].tail, end="")
                return NO_DEVICE
    finally:
        run.end()
    return 0 if run.passed() else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    import benchmarks.tools.gpu_check as package

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.gpu_check",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="stages 0 to 2 alone")
    parser.add_argument("--rehearse", action="store_true", help="without a device, see stand_in.py")
    parser.add_argument("--only", help="of stage 1, the kernels with this in their name")
    parser.add_argument("--extension", type=Path, help="built elsewhere; default: build/gpu, if it is there")
    parser.add_argument(
        "--limit-seconds",
        type=float,
        help=f"for everything together; default: {SECONDS}, in a rehearsal {SLOWER} times as long",
    )
    default = Path(os.environ.get("OUT") or OUT)
    parser.add_argument("--out", type=Path, default=default, help="default: $OUT, or build/gpu_check/results")
    options = parser.parse_args(arguments)
    if options.limit_seconds is None:
        options.limit_seconds = SECONDS * (SLOWER if options.rehearse else 1)
    return options


def _stop(*_: object) -> None:
    raise SystemExit("stopped")  # the handlers on the way out end the processes and print the table
