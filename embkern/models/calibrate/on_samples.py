"""Calibrate a language model without text, on samples of its own."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ...methods.calibration import Calibration, CalibrationFacts
from ..find_table import find_table
from ..inference import longest_input
from .kinds import kind_of
from .objectives import LanguageModel, mask_of
from .on_text import facts_of, run_of
from .passes import run_pass
from .sampling import beginning_of, resample_windows, sample_windows
from .windows import HeldOut, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOLD_FROM = 20.0  # seconds


class CalibrationTooLongError(RuntimeError):
    """The model's own samples would take longer than the limit.

    Attributes:
        seconds: the estimate.
        limit: the limit.
    """

    def __init__(self, seconds: float, limit: float) -> None:
        super().__init__(
            f"calibrate: expected at most {_minutes(limit)} for the model's own samples, got an estimate of "
            f"{_minutes(seconds)}; limit_seconds=None takes the time, text takes less"
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
    """Calibrate a language model on samples of its own, for want of text.

    The samples of a causal model begin with its beginning-of-text token, or else its end-of-text token, and
    go on whatever tokens follow; every token is drawn from all of the model's probabilities, at temperature
    1. ``calibrate`` then measures on them, with one difference: ``inputs`` are the predicted probabilities,
    the expected counts, which have less noise and no zeros.

    The decoder of an encoder-decoder is sampled in the same way, while its encoder reads an empty text. Then
    both read the samples, as in ``calibrate``, and ``inputs`` are counts.

    A masked language model fills in windows of masks in eight rounds: in each, fewer of the tokens are masked
    anew, and drawn from what it predicts at them. Then ``calibrate`` measures on the result.

    Args:
        model: a language model of transformers; it is as before afterwards.
        windows: number of samples.
        length: tokens of each, at least 2.
        seed: random seed of the samples and the labels, at least 0.
        tokenizer: the model's tokenizer; its special tokens are used where the model's config has none, and
            those that it adds to a text. A masked language model needs it.
        progress: whether to show progress bars on stderr; None shows them on a terminal. Unless it is False,
            a line says how long it will take by the first steps, if that is 20 seconds or more.
        checkpoint: as in ``calibrate``, for the pass over the samples.
        limit_seconds: longest time; None has no limit.

    Raises:
        ValueError: the model is no language model, has no token to begin with or no mask token, it returns
            NaN, or an argument is out of range.
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
    check: Callable[[CalibrationFacts], None] | None = None,
) -> tuple[Calibration, HeldOut | None]:
    """Return the result of ``self_calibrate``, and ``held_out`` further samples.

    The latter are None for none, and for an encoder-decoder. ``check`` is called with the facts before the
    pass.
    """
    for name, value, least in (("windows", windows, 1), ("length", length, 2), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    table = find_table(model)
    kind = kind_of(model)
    if kind not in ("causal", "encoder-decoder", "masked"):
        raise ValueError(
            f"calibrate: expected a language model to sample from, got {type(model).__name__}; give text"
        )
    if kind == "encoder-decoder":
        held_out = 0
    length = min(length, longest_input(model))
    began, told = time.monotonic(), progress is False

    def check_time(done: int, total: int, seconds: float) -> None:
        nonlocal told
        estimate = time.monotonic() - began + seconds / done * (total - done)
        if limit_seconds is not None and estimate > limit_seconds:
            raise CalibrationTooLongError(estimate, limit_seconds)
        if not told and estimate >= _TOLD_FROM:
            line = f"embkern: calibrating on the model's own samples takes about {_minutes(estimate)}"
            tqdm.write(line, file=sys.stderr)
        told = True

    settings: dict[str, Any] = {
        "device": table.weight.device, "progress": progress, "check_time": check_time
    }  # fmt: skip
    count, mask, first = windows + held_out, None, None
    if kind == "masked":
        if tokenizer is None:
            raise ValueError(
                "tokenizer: expected the masked language model's, to sample from it, got None; "
                "embkern.compress takes one, EmbkernConfig a calibration"
            )
        mask = mask_of(tokenizer)
        samples = resample_windows(model, tokenizer, count, length, seed, **settings)
    else:
        beginning = beginning_of(model, tokenizer)
        skipped = int(kind != "causal")  # what a decoder begins with is not one of its tokens
        first = None if skipped else beginning.token
        ids = sample_windows(model, beginning, count, length + skipped, seed, **settings)[:, skipped:]
        samples = Windows(list(ids))
    read = dataclasses.replace(samples, ids=samples.ids[:windows])
    rest = dataclasses.replace(samples, ids=samples.ids[windows:])
    unseen = HeldOut(rest, mask, seed) if held_out else None
    facts = facts_of(model, kind, tokenizer, run_of("samples", read, seed))
    if check is not None:
        check(facts)
    found = run_pass(
        model,
        table,
        read,
        LanguageModel(model, read, seed, mask),
        facts,
        progress=progress,
        checkpoint=checkpoint,
        on_progress=check_time,
    )
    if first is None or found.predictions is None:  # the latter: a head of another width than the table
        return found, unseen
    # Of the tokens that are read, all but the first of a window were predicted.
    inputs = found.predictions * ((length - 1) / length)
    inputs[first] += windows
    return dataclasses.replace(found, inputs=inputs), unseen


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
