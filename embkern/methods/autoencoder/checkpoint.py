"""The state, checkpoint and log of a training run."""

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
from .weights import Weights

FORMAT = TensorFormat(
    "embkern.autoencoder/3",
    "a checkpoint",
    required=("parameters", "first_moment", "second_moment", "best"),
    settings=("identity", "step", "epoch", "best_score", "history"),
)
BEST_EPOCH_FACTS = ("epoch", "loss", "direction_error", "rmse")  # in the facts of the result


@dataclass
class RunState:
    """The state of a run after an epoch: everything that it resumes from.

    Attributes:
        weights: the weights with the moments of Adam and the number of steps.
        epoch: the number of epochs that are done.
        history: the log's entry of each epoch.
        best_score: the least score so far.
        best: flat parameters of the best epoch.
    """

    weights: Weights
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = float("inf")
    best: Tensor | None = None

    def save(self, path: str | os.PathLike, identity: dict[str, Any]) -> None:
        """Write a checkpoint."""
        assert self.best is not None, "every run has a best epoch after its first"
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
        """Resume from what ``read_checkpoint`` returned."""
        self.weights.load(state)
        self.epoch, self.history = state["epoch"], state["history"]
        self.best_score = state["best_score"]
        self.best = state["best"].to(self.weights.parameters.device)


def check_files(**files: str | os.PathLike | None) -> None:
    """Raise OSError, with the argument's name, for a path that cannot be written."""
    for name, path in files.items():
        if path is not None:
            check_writable(path, name)


class RunFiles:
    """The checkpoint and the log of a run.

    Args:
        checkpoint: file of the checkpoint, or None.
        log: file of JSON lines, or None.
        seconds: least time between two writes.
    """

    def __init__(
        self, checkpoint: str | os.PathLike | None, log: str | os.PathLike | None, seconds: float
    ) -> None:
        self.checkpoint, self.log, self.seconds = checkpoint, log, seconds
        self.identity: dict[str, Any] = {}
        self.last_saved = time.monotonic()
        self.saved_epoch = 0

    def resume(self, identity: dict[str, Any], epochs: int, weights: Weights) -> dict[str, Any] | None:
        """Return the state in the checkpoint for weights of this size, or None without a checkpoint."""
        self.identity = identity
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return None
        state = read_checkpoint(self.checkpoint, identity, epochs, weights)
        self.saved_epoch = state["epoch"]
        return state

    def save_if_due(self, run: RunState, *, last: bool) -> int:
        """Write both files after ``seconds`` or the last epoch; return the epoch in the checkpoint."""
        if last or time.monotonic() - self.last_saved >= self.seconds:
            if self.checkpoint is not None:
                run.save(self.checkpoint, self.identity)
                self.saved_epoch = run.epoch
            self.write_log(run)
            self.last_saved = time.monotonic()
        return self.saved_epoch

    def write_log(self, run: RunState) -> None:
        """Write the log, if one was asked for."""
        if self.log is not None:
            with replacing(self.log) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in run.history))

    def status(self, epoch: int, epochs: int, *, first: bool) -> str:
        """Return what the checkpoint holds, for the message of a lost run.

        Args:
            epoch: the epoch that this process knows to be saved.
            epochs: the epochs of the run.
            first: whether this is the first process, which writes the checkpoint.
        """
        if self.checkpoint is None:
            return "no checkpoint was named, so nothing is kept"
        holds = f"epoch {epoch} of {epochs}" if epoch else "no epoch yet"
        # The first process may have saved again and been lost before the others knew of it.
        return f"{self.checkpoint} holds {holds}{'' if first else ', or more'}: run the same command again"


def read_checkpoint(
    path: str | os.PathLike, identity: dict[str, Any], epochs: int, weights: Weights
) -> dict[str, Any]:
    """Read the checkpoint of the run with this identity.

    Args:
        path: the file.
        identity: what the checkpoint must have in common with the run.
        epochs: the epochs of the run.
        weights: weights of the size that the checkpoint must have.

    Raises:
        ValueError: the checkpoint is damaged, belongs to another run, or has more epochs than this run.
    """
    if Path(path).is_file() and zipfile.is_zipfile(path):  # is_zipfile would block on a named pipe
        raise ValueError(
            f"checkpoint: {path} is of an earlier version of embkern, without checksums; "
            "finish its run with that version, or delete it to start anew"
        )
    try:
        state = FORMAT.load(path, _check_state)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"checkpoint: {error}; delete it to start anew") from None
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


def _check_state(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return tensors and settings in one dict; ValueError unless ``RunState.save`` can have written them."""
    history, epoch, step = (settings[name] for name in ("history", "epoch", "step"))
    if type(epoch) is not int or type(step) is not int or min(epoch, step) < 1 or step > 2**53:
        raise ValueError(f"epoch, step: expected positive integers, got {epoch!r} and {step!r}")
    best = settings["best_score"]
    if type(best) is not float or not math.isfinite(best) or not isinstance(settings["identity"], dict):
        raise ValueError("best_score, identity: expected a finite float and a mapping")
    numbers = {"score", *BEST_EPOCH_FACTS}
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
