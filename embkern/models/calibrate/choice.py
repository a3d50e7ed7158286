"""Which calibration a compression uses: a file, one on text, one on the model's own samples, or none."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...fidelity.sentences import Pooling, is_sentence_encoder, pooling_of
from ...methods import METHODS
from ...methods.calibration import Calibration
from ...recipe import Recipe
from ...text.frequencies import Source
from ...text.reading import read_texts
from .kinds import kind_of
from .on_samples import CalibrationTooLongError, self_calibrate_holding_out
from .on_text import calibrate_holding_out, check_calibration
from .windows import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
LONGEST_SECONDS = 600.0  # of a calibration that was not asked for
HELD_OUT_TOKENS, HELD_OUT_SAMPLES = 2048, 8  # to measure the divergence on
_OWN_SAMPLES = "pass calibrate=True (--calibrate) to take the model's own samples"
_GAIN = "a third to two thirds of the divergence, as measured at 16x (docs/results.md)"


class Choice(NamedTuple):
    """The calibration for a compression.

    Attributes:
        calibration: the calibration or None.
        phrase: says in the report what it is; None where the method takes no calibration.
        held_out: inputs that it did not see, to measure the divergence on; None where there are none.
    """

    calibration: Calibration | None = None
    phrase: str | None = None
    held_out: HeldOut | None = None


def choose_calibration(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    calibration: Calibration | str | os.PathLike | None = None,
    text: Source | Sequence[Source] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: Callable[[], Pooling] | None = None,
    progress: bool | None = None,
    hold_out: bool = False,
) -> Choice:
    """Return the calibration for the compression of a model.

    A calibration or a text that is given is used, or else the file that the recipe names. Without one,
    ``recipe.calibrate`` decides: True takes samples of the model itself, False none, and None takes them from
    causal language models, if that takes less than ten minutes; if they cannot be had, a line of the log says
    so.

    Args:
        model: the dense model.
        recipe: how its table will be compressed.
        calibration: a calibration or a file of one.
        text: sources of text, as ``read_texts`` takes them.
        tokenizer: the model's tokenizer, or None.
        pooling: returns that of a sentence encoder, if text is to be read; None reads the configuration of
            sentence-transformers beside the model.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        hold_out: whether to keep some inputs of a language model out of the calibration.

    Raises:
        ValueError: what is given does not fit the method, the model or each other, or the model cannot be
            calibrated as asked.
        FileNotFoundError: a file does not exist.
    """
    if calibration is None and text is None:
        calibration = recipe.calibration
    given = {"calibration": calibration, "calibrate_text": text, "calibrate": recipe.calibrate or None}
    names = [name for name, value in given.items() if value is not None]
    if names:
        recipe.check_calibrated(names[0])
    if not METHODS[recipe.method].calibrated:
        return Choice()
    if len(names) > 1 or (names and recipe.calibrate is False):
        both = ", ".join(names if recipe.calibrate is not False else [*names, "calibrate=False"])
        raise ValueError(f"calibration: expected one source, got {both}")
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            calibration = load_calibration(calibration, "calibration")
        check_calibration(calibration, model, tokenizer)
        return Choice(calibration, _described(calibration))
    if text is not None:
        if tokenizer is None:
            raise ValueError("calibrate_text: expected a tokenizer with it (the model has none)")
        sources = [text] if isinstance(text, (str, os.PathLike)) else text
        texts = itertools.chain.from_iterable(map(read_texts, sources))
        if pooling is None and is_sentence_encoder(name := getattr(model, "name_or_path", None)):
            pooling = functools.partial(pooling_of, name)
        found, unseen = calibrate_holding_out(
            model,
            tokenizer,
            texts,
            HELD_OUT_TOKENS if hold_out else 0,
            pooling=None if pooling is None else pooling(),
            progress=progress,
        )
        return Choice(found, _described(found), unseen)
    if recipe.calibrate is False:
        return Choice(None, "none, as asked for")
    if recipe.calibrate:
        return _on_samples(model, tokenizer, progress, hold_out, None)
    return _by_default(model, tokenizer, pooling is not None, progress, hold_out)


def load_calibration(path: str | os.PathLike, argument: str) -> Calibration:
    """Return the calibration in a file; an error begins with the name of the argument."""
    try:
        return Calibration.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{argument}: {str(error).removeprefix('path: ')}") from None


def _by_default(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    encodes: bool,
    progress: bool | None,
    hold_out: bool,
) -> Choice:
    try:
        kind = kind_of(model)
        if kind in ("causal", "masked") and not encodes:  # the hub is asked for nothing else
            encodes = is_sentence_encoder(getattr(model, "name_or_path", None))
        if encodes or kind != "causal":
            lower = "text (--calibrate-text)"
            if kind in ("encoder-decoder", "masked") and not encodes:
                lower += " or the model's own samples (--calibrate)"
            return Choice(None, f"none; {lower} would lower the error that the model sees")
        found = _on_samples(model, tokenizer, progress, hold_out, LONGEST_SECONDS)
        if found.calibration is None or found.calibration.differs_from_zero:
            return found
        phrase = "none (the model's outputs do not depend on its embedding)"
    except CalibrationTooLongError as error:
        minutes = f"{error.seconds / 60:.0f} minutes"
        phrase = f"none, as it would take {minutes}; {_OWN_SAMPLES}, or text, for {_GAIN}"
    except ValueError as error:  # no token to begin with, values that are not finite
        phrase = f"none ({error})"
    _log.warning("embkern: calibration: %s", phrase)
    return Choice(None, phrase)


def _on_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: bool | None,
    hold_out: bool,
    limit_seconds: float | None,
) -> Choice:
    samples = HELD_OUT_SAMPLES if hold_out else 0
    found, unseen = self_calibrate_holding_out(
        model, samples, tokenizer=tokenizer, progress=progress, limit_seconds=limit_seconds
    )
    return Choice(found, _described(found), unseen)


def _described(calibration: Calibration) -> str:
    sources = {run.source for run in calibration.facts.runs}
    read = "the model's own samples" if sources == {"samples"} else "text"
    return f"{calibration.tokens:,} tokens of {read if len(sources) == 1 else 'text and own samples'}"
