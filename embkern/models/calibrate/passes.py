"""The pass over all inputs: forward, labels sampled from the model, gradients of the looked-up rows."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...methods.calibration import Calibration, CalibrationFacts
from ..find_table import ModelTable
from .objectives import (
    CHUNK_VALUES,
    LanguageModel,
    Loss,
    NotFiniteError,
    Objective,
    Scored,
    first_bad_row,
    sample,
    with_float64,
)
from .recording import Recording, recorded
from .sums import Checkpoint, Sums
from .windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_BYTES = 1 << 26  # of a batch, in fp32, or one window; two tensors of this size exist at a time
BATCH_TOKENS = 1024  # of a model without a head over the vocabulary

OnProgress = Callable[[int, int, float], None]


@torch.inference_mode(False)  # a caller's inference mode would forbid gradients
def run_pass(
    model: PreTrainedModel,
    table: ModelTable,
    windows: Windows,
    objective: LanguageModel | Objective,
    facts: CalibrationFacts,
    *,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Return the calibration of a model on some inputs.

    Args:
        model: the model; it is as before afterwards.
        table: its table.
        windows: the inputs.
        objective: what the model predicts.
        facts: the facts of the result.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        checkpoint: file of partial sums, from which an interrupted run is resumed.
        on_progress: called with batches done, all batches, and seconds in this process.
    """
    V, H = table.weight.shape
    language = isinstance(objective, LanguageModel)
    head = _measured_head(model, table) if language else None
    size = LOGIT_BYTES // (4 * V) if language else BATCH_TOKENS
    if facts.kind == "classifier" and model.config.pad_token_id is None:
        size = 1  # decoders find the last token of each text of a batch by its padding
    batches = windows.batches(size)
    identity = {
        **facts.model_dump(mode="json"),
        "dtype": str(table.weight.dtype),
        "device": table.weight.device.type,
        "batch": size,
    }
    saved = Checkpoint(checkpoint, identity)
    sums = saved.load(Sums.empty(V, H, head=head is not None))
    device = table.weight.device
    began, already = time.monotonic(), sums.batches
    bar = tqdm(
        desc="calibrate",
        total=windows.tokens,
        initial=sum(len(windows.ids[number]) for number in itertools.chain(*batches[:already])),
        unit="token",
        unit_scale=True,
        disable=None if progress is None else not progress,
    )
    with bar, recorded(model, table, head) as recording:
        for numbers in batches[already:]:
            recording.clear()
            try:
                if isinstance(objective, LanguageModel):
                    loss = _language_loss(objective(numbers, device), len(numbers), recording, sums)
                else:
                    loss = objective(numbers, device)
            except NotFiniteError as error:
                raise ValueError(not_finite(model, "output", numbers[error.row])) from None
            _add_gradients(loss, recording, sums)
            if not math.isfinite(float(sums.input_moment.trace())):
                raise ValueError(not_finite(model, "gradient", numbers[0]))
            sums.scored += loss.scored
            sums.batches += 1
            del loss
            bar.update(sum(len(windows.ids[number]) for number in numbers))
            if on_progress is not None:
                on_progress(sums.batches - already, len(batches) - already, time.monotonic() - began)
            saved.save_if_due(sums)
    result = Calibration(
        sums.inputs, _symmetric(sums.input_moment), sums.scored, sums.predictions,
        None if sums.head_moment is None else _symmetric(sums.head_moment), facts,
    )  # fmt: skip
    saved.remove()
    return result


def _measured_head(model: PreTrainedModel, table: ModelTable) -> nn.Module | None:
    """Return the output head if it has a row per row of the table, of the same width."""
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return head if weight is not None and weight.shape == table.weight.shape else None


def _language_loss(scored: Scored, count: int, recording: Recording, sums: Sums) -> Loss:
    """Sample a label at each scored position; add to the sums of the head.

    Args:
        scored: the logits of a batch, of which those at the scored positions count.
        count: number of windows in the batch.
        recording: has the input and the output of the head, if it is measured.
        sums: ``predictions`` and ``head_moment`` grow.
    """
    flat = scored.logits.flatten(0, -2)
    positions, draws = scored.positions.to(flat.device), scored.draws
    hidden: Tensor | None = None
    slope: Tensor | None = None
    if sums.predictions is not None:
        if not recording.heads:
            raise ValueError("model: expected its forward to call the output head, got logits without it")
        hidden, output = recording.heads[-1]
        hidden, slope = hidden.flatten(0, -2), _slope(output, scored.logits)
    gradient = torch.zeros_like(flat)
    predictions, weights = torch.zeros(flat.shape[-1], dtype=torch.float64), list[Tensor]()
    rows = max(1, CHUNK_VALUES // flat.shape[-1])
    for start in range(0, len(positions), rows):
        some = positions[start : start + rows]
        probabilities, labels = sample(flat.detach()[some], draws[start : start + rows])
        if (row := first_bad_row(probabilities)) is not None:
            raise NotFiniteError((start + row) * count // len(positions))
        gradient[some] = probabilities.to(gradient.dtype)
        gradient[some, labels] -= 1
        if hidden is not None:
            predictions += probabilities.sum(0).cpu().double()
            if slope is not None:
                weights.append((probabilities * slope[some].square()).sum(1))
    if hidden is not None and sums.predictions is not None and sums.head_moment is not None:
        inputs = with_float64(hidden[positions.to(hidden.device)]).double()
        if weights:
            inputs = inputs * torch.cat(weights).to(inputs.device).double().sqrt()[:, None]
        sums.predictions += predictions
        sums.head_moment += (inputs.t() @ inputs).cpu()
    return Loss([scored.logits], [gradient.view_as(scored.logits)], len(positions))


def _slope(output: Tensor, logits: Tensor) -> Tensor | None:
    """Return the derivative of each logit by the head's output, (n, V); None where they are the same.

    Some models scale the head's output or cap it, ``cap * tanh(output / cap)``. An error in the head's output
    counts by this factor, so that the head's input at a position counts by the root of the factor's mean
    square, weighted by the probabilities.
    """
    if output.shape != logits.shape:
        raise ValueError(
            f"model: expected one logit per output of the head, got {tuple(logits.shape)} logits of "
            f"{tuple(output.shape)}"
        )
    if output is logits or torch.equal(output.detach().to(logits.dtype), logits.detach()):
        return None
    (slope,) = torch.autograd.grad(logits, output, torch.ones_like(logits), retain_graph=True)
    return slope.flatten(0, -2)


def _add_gradients(loss: Loss, recording: Recording, sums: Sums) -> None:
    """Add the gradients of the looked-up rows, and how often each was read."""
    gradients = torch.autograd.grad(
        loss.outputs, [rows for _, rows, _ in recording.lookups], loss.gradients, allow_unused=True
    )
    for (ids, _, scale), gradient in zip(recording.lookups, gradients, strict=True):
        sums.inputs += torch.bincount(ids.flatten().cpu(), minlength=len(sums.inputs)).double()
        if gradient is not None:
            rows = scale * with_float64(gradient.flatten(0, -2)).double()
            sums.input_moment += (rows.t() @ rows).cpu()


def _symmetric(moment: Tensor) -> Tensor:
    return (moment + moment.t()) / 2


def not_finite(model: PreTrainedModel, what: str, number: int) -> str:
    """Return the message for an output or gradient of a window that is NaN or infinite."""
    hint = "; float16 overflows, use bfloat16 or float32" if model.dtype == torch.float16 else ""
    return (
        f"model: expected finite values, got NaN or infinity in the {what} of {type(model).__name__} "
        f"in window {number}{hint}"
    )
