"""Everything that only a CUDA machine can show, in one command.

    python -m benchmarks.gpu_check [--smoke] [--out FOLDER]     on a machine with a GPU
    python -m benchmarks.gpu_check.prepare                      before, on one with nvcc: what can be compiled
    python -m benchmarks.gpu_check --smoke --rehearse           anywhere: interpreter and emulator as device

`checklist.py` has the stages in their order; each is a process of its own with a time limit. A stage that
fails stops only those that need it. Whatever happens, the folder keeps what was found until then:

    gpu_check_DEVICE.json   stages, kernels, environment
    kernels.jsonl           what the device is, a line per kernel as it ends, a line with its time
    gpu_check.log           all output of all stages

The exit status is 0 if every stage passed, 1 if one did not, 2 without a CUDA device. No network is needed.
"""


def main(arguments: list[str]) -> int:
    """Run the checklist; return its exit status."""
    from . import checklist  # which imports this package

    return checklist.main(arguments)
