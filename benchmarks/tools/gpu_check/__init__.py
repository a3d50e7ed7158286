"""All checks that need a CUDA device, in one command that takes less than ten minutes.

    python -m benchmarks.tools.gpu_check [--smoke] [--out FOLDER]   on a machine with a GPU
    python -m benchmarks.tools.gpu_check.prepare                    first, on a machine with nvcc
    python -m benchmarks.tools.gpu_check --rehearse                 anywhere: interpreter and emulator

`checklist.py` lists the stages in their order. Each runs in its own process, is ended at its time limit, and
leaves the others to run when it fails; what it did not come to is listed as left over. The folder keeps all
results up to that point:

    gpu_check_DEVICE.json   environment, stages, kernels, headlines, tiles, what is left over
    gpu_check.jsonl         a line per kernel, cell, tile and test when it ends
    gpu_check.log           all output of all stages
    gpu_check.tar.gz        all of it, and the results of benchmarks

The exit status is 0 if every stage passed, 1 if one did not, 2 without a CUDA device. No network is needed.
"""


def main(arguments: list[str]) -> int:
    """Run the checklist; return its exit status."""
    from . import checklist  # which imports this package

    return checklist.main(arguments)
