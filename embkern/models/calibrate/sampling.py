"""Sample inputs from a language model itself."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..inference import evaluating
from .objectives import (
    CHUNK_VALUES,
    NotFiniteError,
    first_bad_row,
    generator_of,
    mask_of,
    sample,
    shifted,
)
from .passes import LOGIT_BYTES, not_finite
from .windows import Windows, added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STREAM = 1  # of the draws of the tokens; those of the labels have stream 0
_TIMED_STEPS = 8  # after the first, which reads the weights from the disk
_PASS_SHARE = 2.0  # the pass takes about as long as decoding token by token
_PASS_ROUNDS = 3  # rounds that take about as long as the pass, with its gradients
ROUNDS = 8  # of a masked model; `python -m benchmarks masked_samples` compares numbers of them


class Beginning(NamedTuple):
    """What the samples of a model begin with.

    Attributes:
        token: the token before the first one that is sampled.
        source: ids that the encoder reads; None of a model without one.
    """

    token: int
    source: list[int] | None = None


def beginning_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Beginning:
    """Return what the samples of a model begin with.

    A text begins with the beginning-of-text token of the model, of the tokenizer, or else the end of text. A
    decoder begins as in training, while the encoder reads an empty text: the special tokens that the
    tokenizer adds to it, or the end of text alone.

    Raises:
        ValueError: there is no such token, or it is beyond the table.
    """
    if not model.config.is_encoder_decoder:
        return Beginning(_special(model, tokenizer, "bos_token_id", "eos_token_id"))
    token = int(shifted(model, torch.zeros(1, 1, dtype=torch.int64))[0, 0])
    source = [] if tokenizer is None else list(tokenizer("")["input_ids"])
    return Beginning(token, source or [_special(model, tokenizer, "eos_token_id")])


def _special(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *names: str) -> int:
    """Return the first of some special tokens that the model or its tokenizer has.

    Raises:
        ValueError: there is none, or it is beyond the table.
    """
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), model.config)
    sources = (getattr(each, name, None) for name in names for each in (*configs, tokenizer))
    found = next((each for each in sources if each not in (None, [])), None)
    if isinstance(found, (list, tuple)):  # several tokens end a text
        found = found[0]
    rows = model.get_input_embeddings().weight.shape[0]
    if found is None or not 0 <= found < rows:
        raise ValueError(
            f"calibrate: expected {' or '.join(names)} below {rows} in the config of "
            f"{type(model).__name__}, to begin samples with, got {found}; give text"
        )
    return int(found)


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    beginning: Beginning,
    windows: int,
    length: int,
    seed: int,
    *,
    device: torch.device,
    progress: bool | None = None,
    check_time: Any = None,
) -> np.ndarray:
    """Return ids (windows, length) that are sampled from a model token by token, with its cache.

    Args:
        model: the model.
        beginning: what every window begins with.
        windows: number of windows; they are decoded together.
        length: tokens of each.
        seed: random seed; the draws of a window depend on the seed and its number alone.
        device: device of the ids.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        check_time: called with steps done, all steps with those that the pass will take, and seconds.
    """
    draws = np.stack([generator_of(seed, number, _STREAM).random(length) for number in range(windows)])
    uniform = torch.from_numpy(draws)
    ids = torch.full((windows, length), beginning.token, device=device)
    cached, cache = "past_key_values" in inspect.signature(model.forward).parameters, None
    bar = tqdm(
        desc="sample", total=windows * (length - 1), unit="token", unit_scale=True,
        disable=None if progress is None else not progress,
    )  # fmt: skip
    started = time.monotonic()
    with bar, evaluating(model):
        name, source = "input_ids", dict[str, Any]()
        if beginning.source is not None:
            read = torch.tensor([beginning.source], device=device).expand(windows, -1)
            name, source = "decoder_input_ids", {"encoder_outputs": model.get_encoder()(input_ids=read)}
        for step in range(1, length):
            if cached:
                latest = {name: ids[:, step - 1 : step]}
                output = model(**latest, **source, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
            else:
                output = model(**{name: ids[:, :step]}, **source)
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


@torch.no_grad()
def resample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    length: int,
    seed: int,
    *,
    device: torch.device,
    rounds: int = ROUNDS,
    progress: bool | None = None,
    check_time: Any = None,
) -> Windows:
    """Return inputs that a masked language model fills in itself, from masks alone.

    In round r of R, counted from 0, a share of ``1 - r / R`` of the tokens is masked and drawn from the
    predictions, at temperature 1: a few sweeps of Gibbs sampling by blocks.

    Args:
        model: the model.
        tokenizer: its tokenizer, whose special tokens begin and end every window.
        windows: number of windows.
        length: tokens of each, special ones included.
        seed: random seed; the draws of a window depend on the seed and its number alone.
        device: device of the ids.
        rounds: number of rounds.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        check_time: called with steps done, all steps with those that the pass will take, and seconds.

    Raises:
        ValueError: the tokenizer has no mask token, or the model returns NaN.
    """
    mask, (before, after) = mask_of(tokenizer), added_tokens(tokenizer)
    inner = max(1, length - len(before) - len(after))
    ids = torch.tensor([[*before, *[mask] * inner, *after]], device=device).repeat(windows, 1)
    size = max(1, LOGIT_BYTES // (4 * model.get_input_embeddings().weight.shape[0] * ids.shape[1]))
    generators = [generator_of(seed, number, _STREAM) for number in range(windows)]
    starts, began = range(0, windows, size), time.monotonic()
    bar = tqdm(
        desc="sample", total=rounds * windows * inner, unit="token", unit_scale=True,
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar, evaluating(model):
        for number in range(rounds):
            chosen = max(1, round((1 - number / rounds) * inner))
            for step, start in enumerate(starts):
                own = generators[start : start + size]
                order = np.stack([len(before) + each.permutation(inner)[:chosen] for each in own])
                uniform = torch.from_numpy(np.stack([each.random(chosen) for each in own])).flatten()
                part, places = ids[start : start + size], torch.from_numpy(order).to(device)
                part.scatter_(1, places, mask)
                logits = model(input_ids=part).logits
                masked = logits.gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2])).flatten(0, 1)
                try:
                    drawn = _draw(masked, uniform)
                except NotFiniteError as error:
                    raise ValueError(not_finite(model, "output", start + error.row // chosen)) from None
                part.scatter_(1, places, drawn.view(places.shape).to(device))
                bar.update(len(own) * inner)
                if check_time is not None:
                    done, total = number * len(starts) + step + 1, len(starts) * (rounds + _PASS_ROUNDS)
                    check_time(done, total, time.monotonic() - began)
    return Windows(list(ids.cpu().numpy()), len(before), len(after))


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return a token (n,) per row of logits (n, V)."""
    rows, found = max(1, CHUNK_VALUES // logits.shape[-1]), []
    for start in range(0, len(logits), rows):
        probabilities, labels = sample(logits[start : start + rows], uniform[start : start + rows])
        if (row := first_bad_row(probabilities)) is not None:
            raise NotFiniteError(start + row)
        found.append(labels)
    return torch.cat(found)
