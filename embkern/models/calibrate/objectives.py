"""The loss of each kind of model on labels that are sampled from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...fidelity.sentences import Pooling
from .windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK_VALUES = 1 << 21  # probabilities at a time: 8 MB in fp32, and 16 MB for their sums in float64


class NotFiniteError(ArithmeticError):
    """An output of the model is NaN or infinite; ``row`` is its place in the batch."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


class Loss(NamedTuple):
    """The gradient of the summed loss of a batch.

    Attributes:
        outputs: outputs of the model.
        gradients: the gradient of the loss with respect to each.
        scored: number of predictions whose losses were summed.
    """

    outputs: list[Tensor]
    gradients: list[Tensor]
    scored: int


class Scored(NamedTuple):
    """Logits over the vocabulary, with the positions whose loss counts.

    Attributes:
        logits: (..., V).
        positions: (n,) positions in the flattened logits.
        draws: (n,) float64, uniform in [0, 1), one per position.
    """

    logits: Tensor
    positions: Tensor
    draws: Tensor


def generator_of(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of a window, which depends on nothing but the seed and the window's number."""
    return np.random.default_rng((seed, number, stream))


# ---- language models -------------------------------------------------------------------------------------


@dataclass
class LanguageModel:
    """Causal, masked and encoder-decoder language models: inputs, and the positions that are scored.

    Attributes:
        model: the model.
        windows: the inputs.
        seed: random seed of masks and labels.
        mask: id of the mask token, for a masked language model.
    """

    model: PreTrainedModel
    windows: Windows
    seed: int
    mask: int | None = None

    def __call__(self, numbers: Sequence[int], device: torch.device) -> Scored:
        """Run the model on some of the windows, which have one length."""
        ids, positions, draws = [], [], []
        for row, number in enumerate(numbers):
            generator = generator_of(self.seed, number)
            own, places = self.windows.scored(number, self.mask, generator)
            ids.append(own)
            positions.append(row * len(own) + places)
            draws.append(generator.random(len(places)))
        batch = torch.from_numpy(np.stack(ids)).to(device)
        inputs = {"input_ids": batch}
        if self.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = shifted(self.model, batch)
        logits = getattr(self.model(**inputs), "logits", None)
        if logits is None:
            raise ValueError(f"model: expected logits over the vocabulary, got none of {_name(self.model)}")
        return Scored(
            logits, torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(draws))
        )


def shifted(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the inputs of a decoder that is to predict ``labels``."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError(
            f"model: expected a decoder_start_token_id in the config of {_name(model)}, got none"
        )
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)


def sample(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (n, C), in fp32 or wider, and a label (n,) drawn from each row of them.

    A label is the first class at which the cumulative probability exceeds the draw. A row with a logit that
    is NaN or +inf has NaN probabilities.

    Args:
        logits: (n, C).
        draws: (n,) float64, uniform in [0, 1).
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    total = with_float64(probabilities).cumsum(-1, dtype=torch.float64)
    wanted = draws.to(total.device)[:, None] * total[:, -1:]
    labels = torch.searchsorted(total, wanted, right=True).clamp_max(logits.shape[-1] - 1)
    return probabilities, labels.squeeze(1).to(logits.device)


def with_float64(tensor: Tensor) -> Tensor:
    """Return a tensor on its device, or on the CPU if its device has no float64."""
    return tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()


def first_bad_row(probabilities: Tensor) -> int | None:
    """Return the first row that is not finite; softmax spreads a NaN over its row."""
    bad = ~torch.isfinite(probabilities[:, 0])
    return int(torch.nonzero(bad)[0]) if bool(bad.any()) else None


# ---- models without a head over the vocabulary -----------------------------------------------------------

Objective = Callable[[Sequence[int], torch.device], Loss]


def sentence_objective(model: PreTrainedModel, windows: Windows, seed: int, pooling: Pooling) -> Objective:
    """The pooled, normalised embedding e of each text, as the mean of a normal distribution of variance 1.

    Its loss is ``z @ e`` with a standard normal z: the gradient's expected square is the Fisher information.
    """
    body = model.base_model

    def objective(numbers: Sequence[int], device: torch.device) -> Loss:
        hidden = body(**_inputs(windows, numbers, device)).last_hidden_state
        pooled = hidden[:, 0] if pooling == "cls" else hidden.mean(1)
        embedding = F.normalize(pooled, dim=1)
        _check_finite(embedding)
        return Loss([embedding], [_normal(embedding, numbers, seed)], len(numbers))

    return objective


def classifier_objective(model: PreTrainedModel, windows: Windows, seed: int) -> Objective:
    """The logits of a classifier of sequences or tokens, of a regression, or of the ends of an answer."""
    name = type(model).__name__

    def objective(numbers: Sequence[int], device: torch.device) -> Loss:
        output: Any = model(**_inputs(windows, numbers, device))
        if name.endswith("ForQuestionAnswering"):
            logits = [output.start_logits, output.end_logits]
        else:
            logits = [output.logits]
        for each in logits:
            _check_finite(each)
        if _is_regression(model):
            return Loss(logits, [_normal(logits[0], numbers, seed)], len(numbers))
        gradients = [
            _sampled(each, numbers, seed, stream, getattr(model.config, "problem_type", None))
            for stream, each in enumerate(logits)
        ]
        tokens = name.endswith("ForTokenClassification")
        return Loss(logits, gradients, len(numbers) * (logits[0].shape[1] if tokens else 1))

    return objective


def _is_regression(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification") and (
        model.config.problem_type == "regression"
        or (model.config.problem_type is None and model.config.num_labels == 1)
    )


def _sampled(logits: Tensor, numbers: Sequence[int], seed: int, stream: int, problem: str | None) -> Tensor:
    """Return the gradient of the loss of sampled labels, (B, C) or (B, T, C)."""
    shape = logits.shape if problem == "multi_label_classification" else logits.shape[:-1]
    draws = np.stack([generator_of(seed, number, stream).random(shape[1:]) for number in numbers])
    uniform = torch.from_numpy(draws).to(logits.device)
    flat = logits.detach()
    if problem == "multi_label_classification":
        probabilities = flat.float().sigmoid() if flat.dtype != torch.float64 else flat.sigmoid()
        return (probabilities - (uniform < probabilities).to(probabilities.dtype)).to(logits.dtype)
    gradient, labels = sample(flat.flatten(0, -2), uniform.flatten())
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient.view(logits.shape).to(logits.dtype)


def _normal(like: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Return standard normal draws of a tensor's shape, (B, ...)."""
    draws = [generator_of(seed, number).standard_normal(tuple(like.shape[1:])) for number in numbers]
    return torch.from_numpy(np.stack(draws)).to(like.device, like.dtype)


def _inputs(windows: Windows, numbers: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.stack([windows.ids[number] for number in numbers])).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_finite(output: Tensor) -> None:
    finite = torch.isfinite(output.detach()).flatten(1).all(1)
    if not bool(finite.all()):
        raise NotFiniteError(int(torch.nonzero(~finite)[0]))


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def mask_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the mask token.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: expected a mask token, which a masked language model fills in, got none")
    return tokenizer.mask_token_id
