"""The checkpoint and the log of a training run, from which a killed run resumes."""

from __future__ import annotations

import json
import math
import os
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...io.atomic import check_writable, replacing
from ...io.tensor_format import TensorFormat
from .steps import Weights

FORMAT = TensorFormat(
    "embkern.autoencoder/3",
    "a checkpoint",
    required=("parameters", "first_moment", "second_moment", "best"),
    settings=("identity", "step", "epoch", "best_score", "history"),
)


KEPT = ("epoch", "loss", "direction_error", "rmse")  # of the best epoch, in the facts of the result


@dataclass
class Run:
    """Where a run stands after a whole epoch; everything that a resumed run needs."""

    weights: Weights
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = float("inf")
    best: Tensor | None = None

    def save(self, path: str | os.PathLike, identity: dict[str, Any]) -> None:
        """Write a checkpoint."""
        assert self.best is not None, "an epoch was the best so far"
        state = self.weights.state()
        step = state.pop("step")
        FORMAT.save(
            path,
            {**state, "best": self.best},
            identity=identity,
            step=step,
            epoch=self.epoch,
            best_score=self.best_score,
            history=self.history,
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``_read`` returned."""
        self.weights.load(state)
        self.epoch, self.history = state["epoch"], state["history"]
        self.best_score = state["best_score"]
        self.best = state["best"].to(self.weights.parameters.device)


def check_places(**files: str | os.PathLike | None) -> None:
    for name, path in files.items():
        if path is not None:
            check_writable(path, name)


class RunFiles:
    """The checkpoint and the log of a run, written after an epoch unless they were a moment ago."""

    def __init__(
        self, checkpoint: str | os.PathLike | None, log: str | os.PathLike | None, seconds: float
    ) -> None:
        self.checkpoint, self.log, self.seconds = checkpoint, log, seconds
        self.identity: dict[str, Any] = {}
        self.written = time.monotonic()
        self.epoch = 0  # of the checkpoint

    def resume(self, identity: dict[str, Any], epochs: int, weights: Weights) -> dict[str, Any] | None:
        """Return the state of the run to go on with, for weights like these; None if there is none."""
        self.identity = identity
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return None
        state = _read(self.checkpoint, identity, epochs, weights)
        self.epoch = state["epoch"]
        return state

    def keep(self, run: Run, *, last: bool) -> int:
        """Write both, if it is time; return the epoch that the checkpoint holds."""
        if last or time.monotonic() - self.written >= self.seconds:
            if self.checkpoint is not None:
                run.save(self.checkpoint, self.identity)
                self.epoch = run.epoch
            self.keep_log(run)
            self.written = time.monotonic()
        return self.epoch

    def keep_log(self, run: Run) -> None:
        """Write the log."""
        if self.log is not None:
            with replacing(self.log) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in run.history))

    def told(self, epoch: int, epochs: int, *, first: bool) -> str:
        """What to tell of the checkpoint when a run is lost."""
        if self.checkpoint is None:
            return "no checkpoint was named, so nothing is kept"
        holds = f"epoch {epoch} of {epochs}" if epoch else "no epoch yet"
        # The first process may have written once more, and been lost before it could say so.
        return f"{self.checkpoint} holds {holds}{'' if first else ', or more'}: run the same command again"


def _read(path: str | os.PathLike, identity: dict[str, Any], epochs: int, weights: Weights) -> dict[str, Any]:
    """Read a checkpoint of the run with this identity.

    Raises:
        ValueError: it is damaged, of another run, or of more epochs.
    """
    if Path(path).is_file() and zipfile.is_zipfile(path):  # it would wait at a named pipe
        raise ValueError(
            f"checkpoint: {path} is of an earlier version of embkern, without checksums; "
            "finish its run with that version, or delete it to start anew"
        )
    try:
        state = FORMAT.load(path, _state)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"checkpoint: {error}; delete it to start anew") from error
    saved = state["identity"]
    if saved != identity:
        different = [name for name in identity if saved.get(name) != identity[name]]
        raise ValueError(
            f"checkpoint: {path} belongs to another run (different {', '.join(different)}); "
            "delete it or name another file"
        )
    for name in FORMAT.required:
        got, expected = state[name], weights.parameters
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ValueError(
                f"checkpoint: {path}: {name}: expected {expected.dtype} of shape {tuple(expected.shape)}, "
                f"got {got.dtype} of {tuple(got.shape)}"
            )
    if state["epoch"] > epochs:
        raise ValueError(f"epochs: expected at least the checkpoint's {state['epoch']}, got {epochs}")
    return state


def _state(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds, once it is what ``Run.save`` may have written."""
    history, epoch, step = (settings[name] for name in ("history", "epoch", "step"))
    if type(epoch) is not int or type(step) is not int or min(epoch, step) < 1 or step > 2**53:
        raise ValueError(f"epoch, step: expected positive integers, got {epoch!r} and {step!r}")
    best = settings["best_score"]
    if type(best) is not float or not math.isfinite(best) or not isinstance(settings["identity"], dict):
        raise ValueError("best_score, identity: expected a finite float and a mapping")
    numbers = {"score", *KEPT}
    if (
        not isinstance(history, list)
        or len(history) != epoch
        or not all(
            isinstance(entry, dict) and all(type(entry.get(name)) in (int, float) for name in numbers)
            for entry in history
        )
    ):
        raise ValueError(f"history: expected {epoch} epochs, each with {', '.join(sorted(numbers))}")
    return {**tensors, **settings}
