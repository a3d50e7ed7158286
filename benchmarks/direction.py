"""The direction solver beside one Gram matrix with its eigenvectors, SVD, PCA and the authors' recipe.

Whole solves are timed in paired rounds, beside the least work of any method of this kind: X^T X and its
eigenvectors, in fp64 as in SVD here, and with the product in fp32. The recipe in plain torch (two nn.Linear,
fused Adam) is extrapolated from some hundred steps; embkern's trainer runs the whole recipe.

1 - cos is the mean over rows of the stored factors; objective, gap and steps are reported by the solver.
``weighted`` gives rows the weights (1 / id)^0.75, as for ids in order of frequency, also in their mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.experiments.timing import interleaved
from embkern.methods import autoencoder, direction, svd
from embkern.methods.svd import gram
from embkern.tables.factors import Factors

from .losses import TERMS
from .machine import peak_bytes
from .results_file import RESULTS, command_line, write_results
from .training_check import ids_of_steps
from .training_loops import LR, TABLES, PlainLoop, Table, table_rows

RECIPE_EPOCHS, RECIPE_BATCH = 30, 32
PLAIN_STEPS = 400


def main(arguments: list[str]) -> None:
    """Time and compare at every table and rank, print a table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks direction", description=__doc__)
    add = parser.add_argument
    add("--tables", nargs="+", default=["minilm"], choices=list(TABLES))
    add("--ratios", type=float, nargs="+", default=[2.5, 5, 10], help="of parameters: V H / (r (V + H))")
    add("--epochs", type=int, default=RECIPE_EPOCHS, help="of the recipe; 0 leaves it out")
    add("--repeats", type=int, default=5, help="rounds of whole solves")
    add("--device", default="cpu")
    add("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.tables:
        X, reason = table_rows(name, options.device)
        for ratio in options.ratios:
            V, H = X.shape
            rank = int(V * H / (ratio * (V + H)))
            print(f"\n{name} {V} x {H}, r = {rank}{f' ({reason})' if reason else ''}", flush=True)
            rows += [{"table": name, "random": reason is not None or name != "minilm", "V": V, "H": H,
                      "rank": rank, **row} for row in compare(X, rank, options)]  # fmt: skip
    command = command_line("direction", arguments)
    print("->", write_results(f"direction_{options.device}", command, rows, directory=options.results))


def compare(X: Tensor, rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one table and rank."""
    frequency = torch.arange(1, len(X) + 1, dtype=torch.float64).reciprocal()
    weight = frequency.pow(0.75) / frequency.pow(0.75).sum()
    methods: dict[str, Callable[[], Any]] = {
        "gram + eigh, fp64": lambda: torch.linalg.eigh(gram(X)),
        "gram + eigh, fp32 product": lambda: torch.linalg.eigh((X.t() @ X).double()),
        "svd": lambda: svd(X, rank),
        "pca": lambda: svd(X, rank, center=True),
        "direction": lambda: direction(X, rank),
        "direction, center": lambda: direction(X, rank, center=True),
        "direction, weighted": lambda: direction(X, rank, counts=frequency),
    }
    times = interleaved(methods, repeats=options.repeats, warmup=1, device=X.device.type)
    least = {name: each["median"] / 1e6 for name, each in times.items()}
    results: list[dict[str, Any]] = []
    for name, call in methods.items():
        made = call()
        row: dict[str, Any] = {
            "method": name,
            "seconds": round(least[name], 4),
            **quantile_seconds(times[name]),
        }
        if isinstance(made, Factors):
            row |= quality(X, made, weight)
            row["peak_bytes"] = peak_bytes(call, X.device.type)
            row["times_gram_fp64"] = round(least[name] / least["gram + eigh, fp64"], 3)
            row["times_gram_fp32"] = round(least[name] / least["gram + eigh, fp32 product"], 3)
        results.append(row)
    if options.epochs:
        results += recipe(X, rank, options.epochs, weight)
        for row in results:
            row["recipe_over_this"] = round(results[-1]["seconds"] / row["seconds"], 1)
    for row in results:
        print(line(row), flush=True)
    return results


def recipe(X: Tensor, rank: int, epochs: int, weight: Tensor) -> list[dict[str, Any]]:
    """Return rows of the authors' recipe: embkern's whole run, and the plain loop by its seconds per step."""
    start = time.perf_counter()
    factors = autoencoder(X, rank, epochs=epochs, progress=False)
    trained = {"method": "recipe, embkern", "epochs": epochs, "seconds": time.perf_counter() - start}
    table, terms = Table(X.shape[0], X.shape[1], rank), TERMS["cosine+power"]
    loop, steps = PlainLoop(X, table, terms, RECIPE_BATCH), epochs * -(-table.V // RECIPE_BATCH)
    loop.run(ids_of_steps(table.V, RECIPE_BATCH, 20, seed=0), terms.alpha, LR)
    each = []
    for seed in range(5):
        order = ids_of_steps(table.V, RECIPE_BATCH, PLAIN_STEPS // 5, seed)
        start = time.perf_counter()
        loop.run(order, terms.alpha, LR)
        each.append((time.perf_counter() - start) / (PLAIN_STEPS // 5))
    plain = {"method": "recipe, plain torch", "epochs": epochs, "seconds": statistics.median(each) * steps}
    return [trained | quality(X, factors, weight), plain | {"extrapolated_from_steps": PLAIN_STEPS}]


def quantile_seconds(times: dict[str, float]) -> dict[str, float]:
    """Return the 20th and 80th percentiles in seconds."""
    return {name: round(times[name] / 1e6, 4) for name in ("p20", "p80")}


@torch.no_grad()
def quality(X: Tensor, factors: Factors, weight: Tensor) -> dict[str, Any]:
    """Return mean and weighted mean of 1 - cos, the RMSE, and the facts of the solver."""
    errors, squares = [], 0.0
    for x, y in zip(X.split(4096), factors.to_dense().split(4096), strict=True):
        errors.append(1 - F.cosine_similarity(x.double(), y.double(), dim=1))
        squares += float((x.double() - y.double()).square().sum())
    error = torch.cat(errors)
    solved = factors.facts if "gap" in factors.facts else {}  # the autoencoder's facts have no gap
    return {
        "direction_error": round(float(error.mean()), 7),
        "weighted_direction_error": round(float(error @ weight.to(error.device)), 7),
        "rmse": round((squares / X.numel()) ** 0.5, 7),
        **solved,
        **({"relative_gap": solved["gap"] / solved["objective"]} if solved else {}),
    }


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""
    text = f"{row['method']:28}{row['seconds']:>10.3f} s"
    if "recipe_over_this" in row:
        text += f"{row['recipe_over_this']:>9.0f} x"
    if "direction_error" in row:
        text += f"   1 - cos {row['direction_error']:.5f}   weighted {row['weighted_direction_error']:.5f}"
    if "gap" in row:
        text += (
            f"   gap {row['relative_gap']:.1e} in {row['steps']} steps, {row['times_gram_fp64']:.2f} x gram"
        )
    return text
