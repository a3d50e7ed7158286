"""Calibrate a causal language model without text, on samples of its own."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...methods.calibration import Calibration, CalibrationFacts
from ...text.counts import fingerprint
from ..find_table import find_table
from ..inference import evaluating, longest_input
from .kinds import kind_of
from .objectives import (
    CHUNK_VALUES,
    LanguageModel,
    NotFiniteError,
    first_bad_row,
    generator_of,
    sample,
)
from .on_text import run_of, weights_fingerprint
from .passes import not_finite, run_pass
from .windows import HeldOut, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STREAM = 1  # of the draws of the tokens; those of the labels have stream 0
_TIMED_STEPS = 8  # after the first, which reads the weights from the disk
_PASS_SHARE = 2.0  # the pass takes about as long as decoding token by token


class CalibrationTooLongError(RuntimeError):
    """The model's own samples would take longer than the limit.

    Attributes:
        seconds: the estimate.
        limit: the limit.
    """

    def __init__(self, seconds: float, limit: float) -> None:
        super().__init__(
            f"calibrate: expected at most {_minutes(limit)} for the model's own samples, got an estimate of "
            f"{_minutes(seconds)}; --calibrate self (limit_seconds=None) takes the time, text takes less"
        )
        self.seconds, self.limit = seconds, limit


def self_calibrate(
    model: PreTrainedModel,
    *,
    windows: int = 32,
    length: int = 256,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    limit_seconds: float | None = 600,
) -> Calibration:
    """Calibrate a causal language model on samples of its own, for want of text.

    The samples begin with the model's beginning-of-text token, or else its end-of-text token, and go on
    whatever tokens follow; every token is drawn from all of the model's probabilities, at temperature 1.
    ``calibrate`` then measures on them, with one difference: ``inputs`` are the predicted probabilities, the
    expected counts, which have less noise and no zeros.

    Args:
        model: a causal language model of transformers; it is as before afterwards.
        windows: number of samples.
        length: tokens of each, at least 2.
        seed: random seed of the samples and the labels, at least 0.
        tokenizer: the model's tokenizer; its beginning-of-text token is used if the model's config has none.
        progress: whether to show progress bars on stderr; None shows them on a terminal.
        checkpoint: as in ``calibrate``, for the pass over the samples.
        limit_seconds: longest time; None has no limit.

    Raises:
        ValueError: the model is no causal language model or has no token to begin with, it returns NaN, or an
            argument is out of range.
        CalibrationTooLongError: by its first steps, it would take longer than ``limit_seconds``.
        UnsupportedModelError: the model has no table that ``find_table`` finds.
    """
    found, _ = self_calibrate_holding_out(
        model, 0, windows=windows, length=length, seed=seed, tokenizer=tokenizer,
        progress=progress, checkpoint=checkpoint, limit_seconds=limit_seconds,
    )  # fmt: skip
    return found


@torch.inference_mode(False)  # a caller's inference mode would make tensors that cannot be changed
def self_calibrate_holding_out(
    model: PreTrainedModel,
    held_out: int,
    *,
    windows: int = 32,
    length: int = 256,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    limit_seconds: float | None = 600,
) -> tuple[Calibration, HeldOut | None]:
    """Return the result of ``self_calibrate``, and ``held_out`` further samples; None for none."""
    for name, value, least in (("windows", windows, 1), ("length", length, 2), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    table = find_table(model)
    kind = kind_of(model)
    if kind != "causal":
        raise ValueError(
            f"calibrate: expected a causal language model to sample from, got {type(model).__name__}; "
            "give text"
        )
    first = _first_token(model, tokenizer)
    length = min(length, longest_input(model))
    began = time.monotonic()

    def check_time(done: int, total: int, seconds: float) -> None:
        estimate = time.monotonic() - began + seconds / done * (total - done)
        if limit_seconds is not None and estimate > limit_seconds:
            raise CalibrationTooLongError(estimate, limit_seconds)

    samples = sample_windows(
        model,
        first,
        windows + held_out,
        length,
        seed,
        device=table.weight.device,
        progress=progress,
        check_time=check_time,
    )
    read = Windows(list(samples[:windows]))
    unseen = HeldOut(Windows(list(samples[windows:]))) if held_out else None
    facts = CalibrationFacts(
        architecture=type(model).__name__,
        kind=kind,
        weights=weights_fingerprint(model),
        tokenizer=None if tokenizer is None else fingerprint(tokenizer),
        runs=(run_of("samples", read, seed),),
    )
    found = run_pass(
        model,
        table,
        read,
        LanguageModel(model, read, seed),
        facts,
        progress=progress,
        checkpoint=checkpoint,
        on_progress=check_time,
    )
    if found.predictions is None:  # a head of another width than the table
        return found, unseen
    # Of the tokens that are read, all but the first of a window were predicted.
    inputs = found.predictions * ((length - 1) / length)
    inputs[first] += windows
    return dataclasses.replace(found, inputs=inputs), unseen


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    first: int,
    windows: int,
    length: int,
    seed: int,
    *,
    device: torch.device,
    progress: bool | None = None,
    check_time: Any = None,
) -> np.ndarray:
    """Return ids (windows, length) that are sampled from a causal model token by token, with its cache.

    Args:
        model: the model.
        first: the token that every window begins with.
        windows: number of windows; they are decoded together.
        length: tokens of each.
        seed: random seed; the draws of a window depend on the seed and its number alone.
        device: device of the ids.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        check_time: called with steps done, all steps with those that the pass will take, and seconds.
    """
    draws = np.stack([generator_of(seed, number, _STREAM).random(length) for number in range(windows)])
    uniform = torch.from_numpy(draws)
    ids = torch.full((windows, length), first, device=device)
    cached, cache = "past_key_values" in inspect.signature(model.forward).parameters, None
    bar = tqdm(
        desc="sample", total=windows * (length - 1), unit="token", unit_scale=True,
        disable=None if progress is None else not progress,
    )  # fmt: skip
    started = time.monotonic()
    with bar, evaluating(model):
        for step in range(1, length):
            if cached:
                output = model(input_ids=ids[:, step - 1 : step], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
            else:
                output = model(input_ids=ids[:, :step])
            try:
                ids[:, step] = _draw(output.logits[:, -1], uniform[:, step]).to(device)
            except NotFiniteError as error:
                raise ValueError(not_finite(model, "output", error.row)) from None
            bar.update(windows)
            if step == 1:
                started = time.monotonic()
            elif check_time is not None and (step == 1 + _TIMED_STEPS or step % 32 == 0):
                check_time(step - 1, round(_PASS_SHARE * (length - 1)), time.monotonic() - started)
    return ids.cpu().numpy()


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return a token (n,) per row of logits (n, V)."""
    rows, found = max(1, CHUNK_VALUES // logits.shape[-1]), []
    for start in range(0, len(logits), rows):
        probabilities, labels = sample(logits[start : start + rows], uniform[start : start + rows])
        if (row := first_bad_row(probabilities)) is not None:
            raise NotFiniteError(start + row)
        found.append(labels)
    return torch.cat(found)


def _first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the token that a text begins with: the model's, the tokenizer's, or else the end of text.

    Raises:
        ValueError: there is none, or it is beyond the table.
    """
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), model.config)
    sources = [
        *(getattr(config, "bos_token_id", None) for config in configs),
        getattr(tokenizer, "bos_token_id", None),
        *(getattr(config, "eos_token_id", None) for config in configs),
        getattr(tokenizer, "eos_token_id", None),
    ]
    found = next((each for each in sources if each not in (None, [])), None)
    if isinstance(found, (list, tuple)):  # several tokens end a text
        found = found[0]
    rows = model.get_input_embeddings().weight.shape[0]
    if found is None or not 0 <= found < rows:
        raise ValueError(
            "calibrate: expected a bos_token_id or eos_token_id below "
            f"{rows} in the config of {type(model).__name__}, to begin samples with, got {found}; give text"
        )
    return int(found)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
