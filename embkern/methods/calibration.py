"""Calibration: how strongly a model's output depends on each direction and row of its embedding table."""

from __future__ import annotations

import dataclasses
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..io.errors import EmbkernWarning
from ..io.tensor_format import TensorFormat

FORMAT = TensorFormat(
    "embkern.calibration/1",
    "a calibration",
    required=("inputs", "input_moment"),
    optional=("predictions", "head_moment"),
    settings=("scored", "facts"),
    checked=("scored",),
)

Kind = Literal["causal", "masked", "encoder-decoder", "sentence", "classifier"]


class CalibrationRun(BaseModel):
    """What one pass over text read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["text", "samples"] = Field(description="text, or samples of the model itself")
    texts: str = Field(description="hash of the token ids that were read")
    tokens: int = Field(ge=1, description="number of tokens that were read")
    length: int = Field(ge=1, description="longest input, in tokens")
    seed: int = Field(description="random seed of the labels, masks and samples")
    pooling: str | None = Field(default=None, description="how the tokens of a sentence are pooled")


class CalibrationFacts(BaseModel):
    """The model that a calibration was measured on, and what it read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(description="class of the model; of a sentence encoder, without a head")
    kind: Kind = Field(description="what the model predicts, which decides how its output is compared")
    layers: int | None = Field(default=None, ge=0, description="number of layers; null if not in the config")
    weights: str = Field(description="hash of the model's weights")
    tokenizer: str | None = Field(description="hash of the tokenizer's vocabulary; null without a tokenizer")
    runs: tuple[CalibrationRun, ...] = Field(min_length=1, description="the passes whose sums were added")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sums over text that predict the KL divergence which errors in the rows of a table cause.

    To second order, the KL divergence per scored prediction between the outputs of a model and of the same
    model with rows ``x_i - e_i`` instead of ``x_i`` is::

        0.5 * sum_i f_i * e_i @ G @ e_i  +  0.5 * sum_i q_i * e_i @ S @ e_i

        f = inputs / inputs.sum(),  G = input_moment / scored       for the lookups of the input
        q = predictions / scored,   S = head_moment / scored        for an output head over the same rows

    The two sums leave out that some tokens are read and predicted where others are not. For a model that
    predicts no tokens, the KL divergence is that of its own output distribution.

    Attributes:
        inputs: (V,) float64 on the CPU, how often each token was read.
        input_moment: (H, H) float64, the sum of ``g g^T`` over the lookups, where g is the gradient with
            respect to the row of the table of the summed loss on labels that are sampled from the model.
        scored: number of predictions whose losses were summed.
        predictions: (V,) float64, the sum of the predicted probabilities; None without an output head over
            the rows of the table.
        head_moment: (H, H) float64, the sum of ``h h^T`` over the inputs of the head; None likewise.
        facts: the model and the text.

    Raises:
        ValueError: a shape does not fit the others, a value is not finite, a count is negative, a moment is
            not symmetric, or only one of ``predictions`` and ``head_moment`` is None.
        TypeError: a tensor is not float64.
    """

    inputs: Tensor
    input_moment: Tensor
    scored: int
    predictions: Tensor | None
    head_moment: Tensor | None
    facts: CalibrationFacts

    def __post_init__(self) -> None:
        if self.inputs.dim() != 1 or not len(self.inputs):
            raise ValueError(f"inputs: expected shape (V,) with V >= 1, got {tuple(self.inputs.shape)}")
        if self.input_moment.dim() != 2 or not len(self.input_moment):
            raise ValueError(
                f"input_moment: expected shape (H, H) with H >= 1, got {tuple(self.input_moment.shape)}"
            )
        if (self.predictions is None) != (self.head_moment is None):
            raise ValueError("predictions, head_moment: expected both or neither, got one")
        if type(self.scored) is not int or self.scored < 1:
            raise ValueError(f"scored: expected an integer of at least 1, got {self.scored!r}")
        V, H = self.num_embeddings, self.embedding_dim
        for name in ("inputs", "predictions"):
            counts = getattr(self, name)
            if counts is not None:
                _check_values(name, counts, (V,))
                if not (bool((counts >= 0).all()) and bool(counts.any())):
                    raise ValueError(f"{name}: expected values of at least 0 with one above, got others")
        for name in ("input_moment", "head_moment"):
            moment = getattr(self, name)
            if moment is not None:
                _check_values(name, moment, (H, H))
                asymmetry, largest = float((moment - moment.t()).abs().max()), float(moment.abs().max())
                if asymmetry > 1e-9 * largest or bool((moment.diagonal() < 0).any()):
                    raise ValueError(f"{name}: expected a sum of outer products x x^T, got another matrix")

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows of the table."""
        return len(self.inputs)

    @property
    def embedding_dim(self) -> int:
        """H, the width of the table."""
        return len(self.input_moment)

    @property
    def tokens(self) -> int:
        """Number of tokens that were read."""
        return sum(run.tokens for run in self.facts.runs)

    @property
    def on_text(self) -> bool:
        """Whether ``inputs`` are counts of text alone, not of samples of the model itself."""
        return all(run.source == "text" for run in self.facts.runs)

    @property
    def differs_from_zero(self) -> bool:
        """Whether some gradient is not zero, and some hidden state that enters the head, if there is one."""
        return bool(self.input_moment.any()) and (self.head_moment is None or bool(self.head_moment.any()))

    def __radd__(self, other: int) -> Calibration:
        """Return itself for 0, with which ``sum`` begins."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __add__(self, other: Calibration) -> Calibration:
        """Return the sum of two calibrations of one model.

        Raises:
            ValueError: they belong to different models, one has a head and the other has none, or a pass over
                the same text or samples with the same seed is in both.
        """
        if different := _different(self._table, other._table):
            raise ValueError(f"calibration: expected two of one model, got {different}")
        if (self.head_moment is None) != (other.head_moment is None):
            raise ValueError("calibration: expected two with an output head or two without, got one with it")
        self.check_addable(other.facts)
        facts = self.facts.model_copy(
            update={
                "layers": other.facts.layers if self.facts.layers is None else self.facts.layers,
                "tokenizer": self.facts.tokenizer or other.facts.tokenizer,
                "runs": self.facts.runs + other.facts.runs,
            }
        )
        return Calibration(
            self.inputs + other.inputs,
            self.input_moment + other.input_moment,
            self.scored + other.scored,
            _sum(self.predictions, other.predictions),
            _sum(self.head_moment, other.head_moment),
            facts,
        )

    def check_addable(self, facts: CalibrationFacts) -> None:
        """Raise ValueError unless a calibration with these facts can be added to this one."""
        ours, theirs = (_identity(each) | {"weights": each.weights} for each in (self.facts, facts))
        if different := _different(ours, theirs):
            raise ValueError(f"calibration: expected two of one model, got {different}")
        if twice := [run for run in self.facts.runs if run in facts.runs]:
            raise ValueError(
                "calibration: expected passes over different inputs, got twice one over "
                f"{twice[0].tokens:,} tokens of {twice[0].source} with seed {twice[0].seed}"
            )

    @property
    def _table(self) -> dict[str, str | int | None]:
        return {"table": f"{self.num_embeddings} x {self.embedding_dim}"}

    def of_rows(self, ids: Tensor) -> Calibration:
        """Return the calibration of a table of some of the rows, ids (n,) int64, alone."""
        predictions = None if self.predictions is None else self.predictions[ids]
        return dataclasses.replace(self, inputs=self.inputs[ids], predictions=predictions)

    def check_table(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless this is a calibration of a table of this shape (V, H)."""
        if (expected := (self.num_embeddings, self.embedding_dim)) != tuple(shape):
            raise ValueError(
                f"calibration: expected one of a {shape[0]} x {shape[1]} table, got one of "
                f"{expected[0]} x {expected[1]}"
            )

    def check_model(
        self,
        *,
        architecture: str,
        num_embeddings: int,
        embedding_dim: int,
        layers: int | None = None,
        tokenizer: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Raise ValueError if this is a calibration of another model; warn if the model was changed since.

        Args:
            architecture: class of the model.
            num_embeddings: V.
            embedding_dim: H.
            layers: number of its layers; None does not compare it.
            tokenizer: hash of the tokenizer's vocabulary; None does not compare it.
            weights: hash of the model's weights; None does not compare it.

        Warns:
            UserWarning: the weights differ from those that were calibrated.
        """
        expected = {
            "architecture": architecture,
            "table": f"{num_embeddings} x {embedding_dim}",
            "layers": layers,
            "tokenizer": tokenizer,
        }
        got = _identity(self.facts) | self._table
        if different := _different(expected, got):
            raise ValueError(f"calibration: expected one of this model, got another model's: {different}")
        if weights is not None and weights != self.facts.weights:
            warnings.warn(
                "calibration: the model's weights have changed since it was calibrated; "
                "calibrate it again for the best result",
                EmbkernWarning,
                stacklevel=2,
            )

    def summary(self) -> CalibrationSummary:
        """Return what ``embkern calibrate`` prints."""
        return CalibrationSummary(
            facts=self.facts,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            tokens=self.tokens,
            scored=self.scored,
            distinct=int(self.inputs.count_nonzero()),
            input_share=_first_share(self.input_moment),
            head_share=None if self.head_moment is None else _first_share(self.head_moment),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the calibration to one safetensors file; an existing file is replaced atomically."""
        tensors = {
            "inputs": self.inputs,
            "input_moment": self.input_moment,
            "predictions": self.predictions,
            "head_moment": self.head_moment,
        }
        FORMAT.save(
            path,
            # safetensors refuses tensors that share memory, such as inputs that are the predictions.
            {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None},
            scored=self.scored,
            facts=self.facts.model_dump(),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a calibration.
        """

        def build(tensors: dict[str, Any], settings: dict[str, Any]) -> Calibration:
            return cls(
                tensors["inputs"],
                tensors["input_moment"],
                settings["scored"],
                tensors.get("predictions"),
                tensors.get("head_moment"),
                _facts(settings["facts"]),
            )

        return FORMAT.load(path, build)


class CalibrationSummary(BaseModel):
    """A summary of a calibration, as ``embkern calibrate`` prints it."""

    facts: CalibrationFacts
    num_embeddings: int = Field(description="V")
    embedding_dim: int = Field(description="H")
    tokens: int = Field(description="number of tokens that were read")
    scored: int = Field(description="number of predictions whose losses were summed")
    distinct: int = Field(description="rows of the table that were read, or are expected to be")
    input_share: float = Field(description="share of the input's moment in its first direction")
    head_share: float | None = Field(description="likewise of the head's moment; null without a head")

    def rows(self) -> dict[str, str]:
        """Return the rows of the printed table by name."""
        sources = {"text": "text", "samples": "samples of the model itself"}
        read = ", ".join(dict.fromkeys(sources[run.source] for run in self.facts.runs))
        rows = {
            "model": f"{self.facts.architecture} ({self.facts.kind})",
            "table": f"{self.num_embeddings:,} x {self.embedding_dim:,}",
            "tokens": f"{self.tokens:,} ({read})",
            "distinct": f"{self.distinct:,} of {self.num_embeddings:,} rows",
            "predictions": f"{self.scored:,}",
            "input, first direction": f"{self.input_share:.1%} of the sensitivity",
        }
        if self.head_share is not None:
            rows["output head, first direction"] = f"{self.head_share:.1%} of the sensitivity"
        return rows


def _first_share(moment: Tensor) -> float:
    """Return the largest eigenvalue over the trace; 0 of a zero matrix."""
    trace = float(moment.trace())
    return float(torch.linalg.eigvalsh(moment)[-1]) / trace if trace else 0.0


def _facts(stored: Any) -> CalibrationFacts:
    try:
        return CalibrationFacts.model_validate(stored)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"facts: {'; '.join(problems)}") from None


def _check_values(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name}: expected float64, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got {tensor.device}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _identity(facts: CalibrationFacts) -> dict[str, str | int | None]:
    """Return what a calibration must have in common with a model, beside the shape of the table."""
    return {"architecture": facts.architecture, "layers": facts.layers, "tokenizer": facts.tokenizer}


def _different(expected: dict[str, str | int | None], got: dict[str, str | int | None]) -> str:
    """Return the entries that are known on both sides and differ, as words."""
    return ", ".join(
        f"{name} {got[name]} instead of {value}"
        for name, value in expected.items()
        if value is not None and got[name] is not None and value != got[name]
    )


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other
