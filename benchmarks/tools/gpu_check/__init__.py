"""All checks that need a CUDA device, in one command.

    python -m benchmarks.tools.gpu_check [--smoke] [--out FOLDER]   on a machine with a GPU
    python -m benchmarks.tools.gpu_check.prepare                    first, on a machine with nvcc: compile
    python -m benchmarks.tools.gpu_check --smoke --rehearse         anywhere: interpreter and emulator

`checklist.py` lists the stages in their order; each runs in its own process with a time limit. When a stage
fails, only the stages that need it are skipped. The folder keeps all results up to that point:

    gpu_check_DEVICE.json   stages, kernels, environment
    kernels.jsonl           the device, a line per kernel when its check ends, a line with its time
    gpu_check.log           all output of all stages

The exit status is 0 if every stage passed, 1 if one did not, 2 without a CUDA device. No network is needed.
"""


def main(arguments: list[str]) -> int:
    """Run the checklist; return its exit status."""
    from . import checklist  # which imports this package

    return checklist.main(arguments)
