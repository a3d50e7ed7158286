"""The sums of a calibration, and the checkpoint that holds those of a part of its batches."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...io.atomic import check_writable
from ...io.tensor_format import TensorFormat

FORMAT = TensorFormat(
    "embkern.calibrating/1",
    "a part of a calibration",
    required=("inputs", "input_moment"),
    optional=("predictions", "head_moment"),
    settings=("identity", "scored", "batches"),
    checked=("scored", "batches"),
)
SAVED_EVERY = 20.0  # seconds


@dataclass
class Sums:
    """The tensors of a ``Calibration``, of the first ``batches`` batches."""

    inputs: Tensor
    input_moment: Tensor
    predictions: Tensor | None
    head_moment: Tensor | None
    scored: int = 0
    batches: int = 0

    @classmethod
    def empty(cls, V: int, H: int, *, head: bool) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(zeros(V), zeros(H, H), zeros(V) if head else None, zeros(H, H) if head else None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        found = {name: getattr(self, name) for name in (*FORMAT.required, *FORMAT.optional)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Checkpoint:
    """The file of the partial sums of one run; nothing is written without a path.

    Args:
        path: the file, or None.
        identity: everything that the sums depend on.
        seconds: least time between two writes.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike | None, identity: dict[str, Any], seconds: float | None = None
    ) -> None:
        if path is not None:
            check_writable(path, "checkpoint")
        self.path, self.identity = path, identity
        self.seconds = SAVED_EVERY if seconds is None else seconds
        self.last_saved = time.monotonic()

    def load(self, empty: Sums) -> Sums:
        """Return the sums in the file, or ``empty`` without a file.

        Raises:
            ValueError: the file is damaged, or belongs to another run.
        """
        if self.path is None or not Path(self.path).exists():
            return empty
        return read_checkpoint(self.path, self.identity, empty)

    def save_if_due(self, sums: Sums) -> None:
        """Write the sums if ``seconds`` have passed."""
        if self.path is not None and time.monotonic() - self.last_saved >= self.seconds:
            FORMAT.save(
                self.path, sums.tensors(), identity=self.identity, scored=sums.scored, batches=sums.batches
            )
            self.last_saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file once the run is complete."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike, identity: dict[str, Any], like: Sums) -> Sums:
    """Read the partial sums of the run with this identity.

    Args:
        path: the file.
        identity: what the checkpoint must have in common with the run.
        like: sums whose tensors have the same names, shapes and dtypes.

    Raises:
        ValueError: the file is damaged, or belongs to another run.
    """

    def shapes(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def build(tensors: dict[str, Any], settings: dict[str, Any]) -> tuple[Sums, dict[str, Any]]:
        if not isinstance(settings["identity"], dict) or min(settings["scored"], settings["batches"]) < 1:
            raise ValueError("identity, scored, batches: expected a mapping and positive integers")
        if settings["identity"] == identity and shapes(tensors) != shapes(like.tensors()):
            raise ValueError("expected the shapes of the run's sums, got others")
        sums = Sums(
            tensors["inputs"],
            tensors["input_moment"],
            tensors.get("predictions"),
            tensors.get("head_moment"),
            settings["scored"],
            settings["batches"],
        )
        return sums, settings["identity"]

    try:
        sums, saved = FORMAT.load(path, build)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"checkpoint: {error}; delete it to start anew") from None
    if saved != identity:
        ours, theirs = _flat(identity), _flat(saved)
        different = [name for name in {**ours, **theirs} if ours.get(name, ...) != theirs.get(name, ...)]
        raise ValueError(
            f"checkpoint: {path} belongs to another run (different {', '.join(different)}); "
            "delete it or name another file"
        )
    return sums


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with the fields of its only pass beside its own."""
    runs = identity.get("runs")
    run = runs[0] if isinstance(runs, list) and len(runs) == 1 and isinstance(runs[0], dict) else {}
    return {**{name: value for name, value in identity.items() if name != "runs"}, **run}
