"""``calibrate``: the metric in which a model sees its embedding table, measured on text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...fidelity.sentences import Pooling, is_sentence_encoder, pooling_of, pooling_within
from ...methods.calibration import Calibration, CalibrationFacts, CalibrationRun, Kind
from ...text.counts import fingerprint
from ..body_config import plain_parts
from ..find_table import UnsupportedModelError, find_table
from ..inference import longest_input
from ..static_embeddings import encoder_of, is_sentence_transformer, is_static
from .kinds import kind_of
from .objectives import LanguageModel, Objective, classifier_objective, mask_of, sentence_objective
from .passes import run_pass
from .windows import HeldOut, Windows, sentences, windows_of_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HASHED_VALUES = 1 << 16  # of each parameter, at most


def calibrate(
    model: PreTrainedModel | SentenceTransformer,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int = 16384,
    length: int = 256,
    seed: int = 0,
    pooling: Pooling | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> Calibration:
    """Measure how a model's output depends on its token-embedding table, in one pass over some text.

    The sums of a ``Calibration``: of ``g g^T`` over the looked-up rows, where g is the gradient of a loss on
    labels that are sampled from the model, and of ``h h^T`` over the inputs of the output head. By the class
    of the model, the loss is

    - causal language models: the cross entropy at every position of windows of the text;
    - masked language models: that of 15 % of the tokens, which are masked;
    - encoder-decoders: that of every position of the decoder, which reads the encoder's window again;
    - classifiers: that of their labels; for a regression, ``z @ logits`` with a standard normal z;
    - models without a head: ``z @ e``, with the pooled and normalised embedding e of each text.

    The model's dtype is that of the pass; the sums are float64. The draws of a window depend on the seed and
    its number alone.

    Args:
        model: a model of transformers, or a ``SentenceTransformer`` over one; it is as before afterwards.
        tokenizer: the model's tokenizer.
        texts: texts such as ``read_texts`` returns, of the kind that the model will read. They are read
            once, to the end; what is measured is spread evenly over them.
        tokens: number of tokens to measure on, at least 1.
        length: longest input in tokens.
        seed: random seed of the labels and the masks, at least 0.
        pooling: mean over the tokens, or the first token (cls), of a sentence encoder, whose head, if it has
            one, is not used then. None reads a sentence-transformers configuration beside a model without a
            head; mean without one.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        checkpoint: file of partial sums, written every 20 seconds, from which an interrupted run is resumed,
            with the same result. It is removed when the run is complete.

    Raises:
        ValueError: there is too little text, the tokenizer is another model's, an argument is out of range,
            the model returns NaN or has no output that is known, or the checkpoint is another run's; the
            message names it.
        TypeError: ``texts`` is a single string, or ``tokenizer`` is no tokenizer.
        UnsupportedModelError: the model has no table that ``find_table`` finds.
        OSError: the checkpoint cannot be written.

    Source: Fisher information of the row errors, as Amari's natural gradient has it; second-order
    expansions of the KL divergence, e.g. Martens 2020, arXiv 1412.1193.
    """
    found, _ = calibrate_holding_out(
        model, tokenizer, texts, 0,
        tokens=tokens, length=length, seed=seed, pooling=pooling, progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
    return found


def calibrate_holding_out(
    model: PreTrainedModel | SentenceTransformer,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    held_out: int,
    *,
    tokens: int = 16384,
    length: int = 256,
    seed: int = 0,
    pooling: Pooling | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    check: Callable[[CalibrationFacts], None] | None = None,
) -> tuple[Calibration, HeldOut | None]:
    """Return the result of ``calibrate``, and inputs of some ``held_out`` tokens that it did not see.

    The latter are those of a language model that is no encoder-decoder, and at most a ninth of all inputs.
    ``check`` is called with the facts before the pass.
    """
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if is_static(model):
        raise UnsupportedModelError(
            "calibrate: expected a model whose output depends on its table through layers, got static "
            "embeddings, which are the output"
        )
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected that of the model, got {type(tokenizer).__name__}")
    if is_sentence_transformer(model):
        pooling = pooling or pooling_within(model)
        model = encoder_of(model)
    table = find_table(model)
    kind = kind_of(model) if pooling is None else "sentence"
    if kind == "sentence" and model.config.is_encoder_decoder:
        raise ValueError(f"pooling: expected an encoder or a decoder, got {type(model).__name__}")
    length = min(length, longest_input(model))
    measured = kind in ("causal", "masked")  # what is held out serves to measure these alone
    read = {"tokens": tokens + held_out * measured, "length": length, "V": len(table.weight)}
    unseen: HeldOut | None = None
    objective: LanguageModel | Objective
    if kind in ("sentence", "classifier"):
        windows = sentences(texts, tokenizer, **read)
        if kind == "sentence":
            pooling = pooling or _own_pooling(model)
            objective = sentence_objective(model, windows, seed, pooling)
        else:
            objective = classifier_objective(model, windows, seed)
    else:
        mask = mask_of(tokenizer) if kind == "masked" else None
        windows = windows_of_text(texts, tokenizer, **read)
        if held_out and measured:
            windows, rest = windows.hold_out(held_out)
            unseen = None if rest is None else HeldOut(rest, mask, seed)
        objective = LanguageModel(model, windows, seed, mask)
    facts = facts_of(model, kind, tokenizer, run_of("text", windows, seed, pooling))
    if check is not None:
        check(facts)
    found = run_pass(model, table, windows, objective, facts, progress=progress, checkpoint=checkpoint)
    return found, unseen


def facts_of(
    model: PreTrainedModel, kind: Kind, tokenizer: PreTrainedTokenizerBase | None, run: CalibrationRun
) -> CalibrationFacts:
    """Return the facts of a calibration in one pass."""
    return CalibrationFacts(
        kind=kind,
        tokenizer=None if tokenizer is None else fingerprint(tokenizer),
        runs=(run,),
        **_identity(model, kind),
    )


def _identity(model: PreTrainedModel, kind: Kind) -> dict[str, Any]:
    """Return what a calibration of a model, and a model that is calibrated, have in common.

    A sentence encoder is the same with and without a head or the pooler that the head reads: the class that
    sentence-transformers loads may lack what the class in the config has.
    """
    body = model.base_model if kind == "sentence" else model
    return {
        "architecture": type(body).__name__,
        "layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "weights": weights_fingerprint(body, without="pooler." if kind == "sentence" else None),
    }


def run_of(
    source: Literal["text", "samples"], windows: Windows, seed: int, pooling: str | None = None
) -> CalibrationRun:
    """Return the facts of a pass over some windows."""
    return CalibrationRun(
        source=source,
        texts=windows.fingerprint,
        tokens=windows.tokens,
        length=windows.length,
        seed=seed,
        pooling=pooling,
    )


def _own_pooling(model: PreTrainedModel) -> Pooling:
    """Return the pooling of the folder or the name that a model was loaded from."""
    name = getattr(model, "name_or_path", None)
    return pooling_of(name) if is_sentence_encoder(name) else "mean"


def check_calibration(
    calibration: Calibration, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise ValueError if a calibration is another model's; warn if the weights have changed since.

    Args:
        calibration: the calibration.
        model: the model, not compressed yet.
        tokenizer: its tokenizer; None does not compare it.

    Warns:
        UserWarning: the model was trained after it was calibrated.
    """
    V, H = find_table(model).weight.shape
    calibration.check_model(
        num_embeddings=V,
        embedding_dim=H,
        tokenizer=None if tokenizer is None else fingerprint(tokenizer),
        **_identity(model, calibration.facts.kind),
    )


def weights_fingerprint(model: PreTrainedModel, *, without: str | None = None) -> str:
    """Return a hash of a model's weights in bfloat16; of a large parameter, of values spread evenly over it.

    It is the same for a checkpoint that was loaded in bfloat16 or in a wider dtype.

    Args:
        model: the model.
        without: parameters whose names begin so are left out.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda each: each[0]):
        if without is not None and name.startswith(without):
            continue
        flat = plain_parts(parameter.detach())[0].flatten()
        some = flat[:: max(1, flat.numel() // _HASHED_VALUES)].to(torch.bfloat16).cpu()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + some.view(torch.int16).numpy().tobytes())
    return f"sha256:{found.hexdigest()[:32]}"
