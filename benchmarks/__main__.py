"""`python -m benchmarks` lists the benchmarks and tools; `python -m benchmarks NAME [OPTIONS]` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "gather_project": "the lookup beside dense, quantised and two-step peers: time, bound, peak memory",
    "gather_decode": "the lookup in packed tables beside dense and quantised ones, on real text: time",
    "packed_head": "the tied head over packed tables beside dense and 8-bit ones: logits, gradients: time",
    "packed_cross_entropy": "the loss of that head beside dense logits: time, extra memory",
    "generate": "whole language models beside dense and quantised ones: prefill, decoding, memory",
    "language_models": "rate against KL divergence: the table of language models, input only and tied",
    "masked_samples": "a masked model's own samples as a calibration, beside none and one on text",
    "codes": "codes of 1 to 4 bits: signal to noise on normal values against cycles of decoding",
    "quality": "rate against distortion: every method from 4x to 64x, as a table and a picture",
    "cosine_mse": "the loss beside plain and compiled torch: time, share of the copy bandwidth, peak memory",
    "train": "the autoencoder's steps beside plain loops: time, share of the GEMM floor, peak memory",
    "direction": "the direction solver beside a Gram matrix, SVD and the paper's recipe: time, quality, gap",
    "methods": "SVD, PCA and the paper's autoencoder on a real table: quality and seconds",
    "vocabulary": "a multilingual table cut to two languages: bytes, errors of rows that are read or not",
    "large_tables": "compressing tables of large vocabularies: seconds, memory beyond table and result",
    "tensor_trains": "tensor trains beside an SVD of equal bytes, and a core that two tables share: errors",
    "finetune": "training dense and compressed tables at the same learning rates: loss, movement of rows",
    "import_time": "what `import embkern` costs beyond torch",
    "plots": "pictures of the figures of gather_project, language_models and train",
}
TOOLS = {
    "reference_models": "a small BERT and a small GPT, trained on text of this installation, into the cache",
    "offline_tasks": "writes two small tasks in the formats of GLUE and SQuAD, made of installed docstrings",
    "gpu_check": "on a CUDA machine: every kernel checked and timed, GPU tests and build, in one table",
    "nvcc_report": "registers, spills and shared memory of the CUDA kernels, by nvcc and without a GPU",
    "packed_levels": "finds the levels of codes of packed tables, and prints their error",
    "tune_gather_project": "on a CUDA machine: the tile sizes of the Triton kernels",
}
MODULES = {name: f"benchmarks.{name}" for name in BENCHMARKS} | {
    name: f"benchmarks.tools.{name}" for name in TOOLS
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in MODULES:
        for name, description in (BENCHMARKS | TOOLS).items():
            print(f"python -m benchmarks {name:20} {description}")
        sys.exit(len(sys.argv) > 1)
    sys.exit(importlib.import_module(MODULES[sys.argv[1]]).main(sys.argv[2:]))
