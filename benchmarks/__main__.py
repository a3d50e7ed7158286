"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME [OPTIONS]` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "gather_project": "the lookup beside dense, quantised and two-step peers: time, bound, peak memory",
    "gather_decode": "the lookup in packed tables beside dense and quantised ones, on real text: time",
    "quality": "rate against distortion: every method from 4x to 64x, as a table and a picture",
    "cosine_mse": "the loss beside plain and compiled torch: time, share of the copy bandwidth, peak memory",
    "train": "the autoencoder's steps beside plain loops: time, share of the GEMM floor, peak memory",
    "direction": "the direction solver beside a Gram matrix, SVD and the paper's recipe: time, quality, gap",
    "methods": "SVD, PCA and the paper's autoencoder on a real table: quality and seconds",
    "reference_models": "a small BERT and a small GPT, trained on text of this installation, into the cache",
    "import_time": "what `import embkern` costs beyond torch",
    "offline_tasks": "writes two small tasks in the formats of GLUE and SQuAD, made of installed docstrings",
    "plots": "pictures of the figures of gather_project and train",
    "gpu_check": "on a CUDA machine: every kernel checked, GPU benchmarks, tuner, GPU tests, in one table",
    "nvcc_report": "registers, spills and shared memory of the CUDA kernels, by nvcc and without a GPU",
    "trellis_levels": "finds the levels of the trellises of packed tables, and tells their error",
    "tune_gather_project": "on a CUDA machine: the tile sizes of the Triton kernels",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        for name, what in BENCHMARKS.items():
            print(f"python -m benchmarks {name:20} {what}")
        sys.exit(len(sys.argv) > 1)
    sys.exit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
