"""Pictures of results: latency and speed-ups of gather_project, rows per second of train, divergence by rate.

Needs matplotlib. Every picture is written beside the results file it shows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .results_file import RESULTS

DRAWN = ("gather_project", "language_models", "train")  # benchmarks whose results have pictures

# Colour-blind safe (Okabe and Ito). Named backends are only in the JSON: the pictures show the default.
STYLES: dict[str, tuple[str, str, str]] = {
    "dense": ("#000000", "-", "s"),
    "liger": ("#000000", ":", "s"),
    "quint8": ("#CC79A7", "-", "^"),
    "quint4x2": ("#CC79A7", "--", "v"),
    "fbgemm-int8": ("#E69F00", "-", "^"),
    "fbgemm-int4": ("#E69F00", "--", "v"),
    "two-step": ("#0072B2", "-", "o"),
    "two-step-compiled": ("#0072B2", "--", "o"),
    "two-step-out": ("#56B4E9", "-", "o"),
    "two-step-sparse": ("#56B4E9", "--", "o"),
    "embkern": ("#D55E00", "-", "D"),
    "embkern-out": ("#009E73", "-", "D"),
    "embkern-sparse": ("#009E73", "--", "D"),
}

# The loops of `train`, without named engines.
TRAINING = {
    "plain": "#0072B2",
    "plain-compiled": "#56B4E9",
    "three-dot-compiled": "#CC79A7",
    "embkern-loss": "#E69F00",
    "embkern": "#D55E00",
}

# The methods of `language_models`, their labels, and whether a line joins their points.
METHODS: dict[str, tuple[str, str, str]] = {
    "allocate, calibrated": ("#009E73", "-", "D"),
    "allocate": ("#D55E00", "-", "D"),
    "allocate, own samples": ("#009E73", ":", "d"),
    "allocate, no text": ("#D55E00", ":", "d"),
    "one rate, errors fed forward": ("#0072B2", "-", "o"),
    "Lloyd-Max, scale per row": ("#56B4E9", "--", "o"),
    "int, groups of 32": ("#CC79A7", "--", "^"),
    "GGUF": ("#000000", "", "s"),
    "EXL3 rings": ("#000000", "-", "x"),
    "SVD": ("#E69F00", "--", "v"),
    "autoencoder": ("#E69F00", ":", "^"),
}


def main(arguments: list[str]) -> None:
    """Draw the given results files, or those in benchmarks/results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help=f"JSON files; default: {', '.join(f'{name}_*' for name in DRAWN)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to look for them")
    parser.add_argument("--model", help="for the latencies; default: the first in the file")
    parser.add_argument("--rank", type=int, help="for the latencies; default: the middle one of the model")
    parser.add_argument("--ids", help="default: the first kind in the file")
    options = parser.parse_args(arguments)
    found = (options.results.glob(f"{name}_*.json") for name in DRAWN)
    files = options.files or [path for paths in found for path in sorted(paths)]
    if not files:
        parser.error(f"no results of {', '.join(DRAWN)} in {options.results}: run a benchmark first")
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "legend.fontsize": 8}):
        for path in files:
            results = json.loads(path.read_text())
            if path.stem.startswith("language_models_"):
                print("->", divergence(results["rows"], results, path.with_suffix(".png")))
                continue
            if path.stem.startswith("train_"):
                print("->", training(results["rows"], results, path.with_suffix(".png")))
                continue
            rows = [row for row in results["rows"] if row["mode"] == "forward"]
            if not rows:
                print(f"{path.name}: no forward rows, nothing to draw")
                continue
            model = options.model or rows[0]["model"]
            ids = options.ids or rows[0]["ids"]
            rows = [row for row in rows if row["ids"] == ids]
            ranks = sorted({row["r"] for row in rows if row["model"] == model})
            if not ranks:
                parser.error(f"{path.name} has no forward rows of {model} with {ids} ids")
            rank = options.rank or ranks[len(ranks) // 2]
            chosen = [row for row in rows if (row["model"], row["r"]) == (model, rank)]
            print("->", latency(chosen, results, path.with_name(f"{path.stem}_latency.png")))
            print("->", speedup(rows, results, path.with_name(f"{path.stem}_speedup.png")))


def latency(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> Path:
    """Draw time against N, a line per provider and a panel per dtype; the bands are p20 to p80."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = _subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 4.2), sharey=True)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for name, (colour, line, marker) in STYLES.items():
            points = sorted(
                (r for r in rows if (r["provider"], r["dtype"]) == (name, dtype)), key=lambda r: r["N"]
            )
            if points:
                counts = [row["N"] for row in points]
                axis.plot(
                    counts,
                    [row["p50"] for row in points],
                    line,
                    color=colour,
                    marker=marker,
                    ms=4,
                    label=name,
                )
                low, high = ([row[key] for row in points] for key in ("p20", "p80"))
                axis.fill_between(counts, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="N, ids per call", title=dtype)
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("µs per call, median")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    first = rows[0]
    title = f"{first['model']}: {first['V']} × {first['H']}, r = {first['r']}, {first['ids']} ids"
    figure.suptitle(f"{title}\n{_machine(results)}", fontsize=10)
    return _save(figure, path)


def speedup(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> Path:
    """Draw embkern over the faster of two-step eager and compiled: a bar per N, grouped by table."""
    from matplotlib import colormaps

    ours = [row for row in rows if row["provider"] == "embkern" and row["speedup"] is not None]
    tables = list(dict.fromkeys((row["model"], row["r"]) for row in ours))
    counts = sorted({row["N"] for row in ours})
    dtypes = list(dict.fromkeys(row["dtype"] for row in ours))
    size = (max(7.0, 1.7 * len(tables)), 2.7 * len(dtypes) or 2.7)
    figure, axes = _subplots(len(dtypes) or 1, 1, figsize=size, sharex=True)
    colours = colormaps["viridis"]
    for axis, dtype in zip(axes[:, 0], dtypes, strict=False):
        for k, count in enumerate(counts):
            found = {
                (r["model"], r["r"]): r["speedup"] for r in ours if (r["dtype"], r["N"]) == (dtype, count)
            }
            width = 0.8 / len(counts)
            places = [i - 0.4 + width * (k + 0.5) for i, table in enumerate(tables) if table in found]
            heights = [found[table] for table in tables if table in found]
            axis.bar(
                places, heights, width, color=colours(0.9 * k / max(1, len(counts) - 1)), label=f"N = {count}"
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(ylabel=f"{dtype}, times as fast", xticks=range(len(tables)))
        axis.set_xticklabels([f"{model}\nr = {rank}" for model, rank in tables])
        axis.grid(True, axis="y", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, frameon=False)
    ids = f", {rows[0]['ids']} ids" if rows else ""
    figure.suptitle(
        f"embkern against the faster of two-step eager and compiled{ids}\n{_machine(results)}", fontsize=10
    )
    return _save(figure, path)


def training(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> Path:
    """Draw rows per second, a bar per loop on its better number of threads, grouped by batch."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in sorted((row for row in rows if row["op"] == "train"), key=lambda row: -row["p50"]):
        best[row["table"], row["terms"], row["batch"], row["provider"]] = row
    panels = list(dict.fromkeys((row["table"], row["terms"]) for row in rows if row["op"] == "train"))
    figure, axes = _subplots(len(panels), 1, figsize=(7.2, 2.4 * len(panels)))
    names = [name for name in TRAINING if any(key[3] == name for key in best)]
    width = 0.8 / max(1, len(names))
    for axis, (table, terms) in zip(axes[:, 0], panels, strict=True):
        batches = sorted({key[2] for key in best if key[:2] == (table, terms)})
        for k, name in enumerate(names):
            bars = [(i, best.get((table, terms, batch, name))) for i, batch in enumerate(batches)]
            axis.bar(
                [i - 0.4 + width * (k + 0.5) for i, row in bars if row],
                [row["rows_per_second"] for _, row in bars if row],
                width,
                color=TRAINING[name],
                label=name,
            )
        axis.set(
            yscale="log", ylabel="rows per second", title=f"{table}, {terms}", xticks=range(len(batches))
        )
        axis.set_xticklabels([f"batch {batch}" for batch in batches])
        axis.grid(True, axis="y", alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Training steps, median\n{_machine(results)}", fontsize=10)
    return _save(figure, path)


def divergence(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> Path:
    """Draw the mean KL divergence against bits per value, a line per method: input only, and tied."""
    panels = [(key, title) for key, title in USES.items() if any(row.get(key) for row in rows)]
    figure, axes = _subplots(1, len(panels), figsize=(5.2 * len(panels), 4.6), sharey=True)
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for name, (colour, line, marker) in METHODS.items():
            points = sorted(
                (row["bits"], row[key]["kl"], row["setting"].get("format", ""))
                for row in rows
                if row["method"] == name and row.get(key) and row[key]["kl"] > 0
            )
            if not points:
                continue
            bits, values = [point[0] for point in points], [point[1] for point in points]
            axis.plot(bits, values, linestyle=line or "none", color=colour, marker=marker, ms=4.5, label=name)
            for number, (x, y, label) in enumerate(points):  # alternately below and above: some lie together
                place = (5, 3 if number % 2 else -9)
                axis.annotate(label, (x, y), textcoords="offset points", xytext=place, fontsize=7)
        axis.set(xscale="log", yscale="log", xlabel="bits per value, every byte counted", title=title)
        axis.set_xlim(0.9, 10)
        axis.set_xticks([1, 2, 3, 4, 6, 8], ["1", "2", "3", "4", "6", "8"])
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("mean KL(dense || compressed) per token, nats")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    tokens = results["dense"]["tokens"]
    figure.suptitle(
        f"{results['model']}: embedding table {results['V']:,} × {results['H']}, {tokens:,} tokens",
        fontsize=10,
    )
    return _save(figure, path)


USES = {"input_only": "input only", "tied": "input and tied head"}


def _subplots(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """Return a figure that needs no display and its axes, (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=options.pop("figsize"), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _machine(results: dict[str, Any]) -> str:
    environment = results["environment"]
    threads = f", {environment['threads']} thread(s)" if results["device"] == "cpu" else ""
    name = environment["cpu"] if results["device"] == "cpu" else environment["cuda"]
    return f"{name}{threads}, torch {environment['torch']}"


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=200)
    return path
