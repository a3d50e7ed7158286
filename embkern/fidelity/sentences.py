"""Fidelity of sentence embeddings: whether a compressed model finds the same sentences similar."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

Pooling = Literal["mean", "cls"]


class SentenceFidelity(BaseModel):
    """The similarity of the sentence embeddings of two models."""

    sentences: int
    mean_cosine: float = Field(description="mean cosine between a sentence's embedding before and after")
    spearman: float | None = Field(
        description="rank correlation of pairwise similarities before and after; null below 3 sentences"
    )


def read_sentences(path: str | os.PathLike, limit: int = 1000) -> list[str]:
    """Return the first ``limit`` non-empty lines of a UTF-8 text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text, or has no non-empty lines.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"text: expected a text file, found none at {path}")
    sentences: list[str] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    sentences.append(line.strip())
                    if len(sentences) == limit:
                        break
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 text ({error})") from None
    if not sentences:
        raise ValueError(f"text: expected sentences, one a line, got an empty file: {path}")
    return sentences


def pooling_of(source: str | os.PathLike | None) -> Pooling:
    """Return how a sentence-transformers model pools its tokens; mean without a pooling configuration.

    Args:
        source: a directory or a name on the hub; None for a model in memory.

    Raises:
        ValueError: the pooling is neither mean nor cls, or its configuration is damaged.
    """
    return _mode_of(_pooling_config(source))


def pooling_within(model: SentenceTransformer) -> Pooling:
    """Return how a ``SentenceTransformer`` pools its tokens; mean if none of its modules does.

    Raises:
        ValueError: the pooling is neither mean nor cls.
    """
    configs: list[dict[str, Any]] = [
        module.get_config_dict() for module in model if type(module).__name__ == "Pooling"
    ]
    return _mode_of(configs[0] if configs else {})


def _mode_of(config: dict[str, Any]) -> Pooling:
    """Return the pooling in a configuration of sentence-transformers."""
    # sentence-transformers 5 writes one key with the name of the mode, earlier versions a flag per mode.
    modes = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    mode = config.get("pooling_mode") or next((each for each in modes if each != "include_prompt"), "mean")
    known: dict[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if not isinstance(mode, str) or mode not in known:
        raise ValueError(
            f"pooling: expected mean or cls in the model's sentence-transformers configuration, got {mode!r}"
        )
    return known[mode]


def is_sentence_encoder(source: str | os.PathLike | None) -> bool:
    """Return whether a directory, or a name on the hub, has a pooling configuration of sentence-transformers.

    A model with an output head that lies there serves as a sentence encoder. What is neither a directory nor
    on the hub, such as the name of a directory that is gone, has none.

    Raises:
        ValueError: the configuration is damaged.
    """
    if not source or (not Path(source).is_dir() and str(source).startswith((".", "/", "~"))):
        return False
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return bool(_pooling_config(source))
    except (HfHubHTTPError, HFValidationError):
        return False


def _pooling_config(source: str | os.PathLike | None) -> dict[str, Any]:
    """Read ``1_Pooling/config.json``; an empty dict without one."""
    if source is None:
        return {}
    path = Path(source) / "1_Pooling" / "config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(os.fspath(source), "1_Pooling/config.json"))
        except EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pooling: {path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"pooling: {path} is damaged: expected an object, got {type(config).__name__}")
    return config


@torch.no_grad()
def embed_sentences(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: list[str],
    *,
    pooling: Pooling = "mean",
    batch_size: int = 32,
    max_length: int = 256,
) -> Tensor:
    """Return normalised embeddings (N, H): the backbone's last hidden state, pooled over the attention mask.

    Args:
        model: an encoder or decoder; its mode and the tokenizer's padding token are restored.
        tokenizer: the tokenizer of the model.
        sentences: N texts.
        pooling: mean over the tokens, or the first token (cls).
        batch_size: sentences in a forward pass.
        max_length: tokens after which a sentence is truncated.

    Raises:
        ValueError: the model is an encoder-decoder, or the tokenizer has ids that the model lacks.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("text: sentence embeddings need an encoder or decoder model, got an encoder-decoder")
    training, pad_token = model.training, tokenizer.pad_token
    if pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.eval()
    try:
        return _embed(model, tokenizer, sentences, pooling, batch_size, max_length)
    finally:
        model.train(training)
        tokenizer.pad_token = pad_token


def _embed(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: list[str],
    pooling: Pooling,
    batch_size: int,
    max_length: int,
) -> Tensor:
    backbone = model.base_model
    # Batches of similar length need less padding.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        batch = tokenizer(
            [sentences[i] for i in order[start : start + batch_size]],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        if int(batch["input_ids"].max()) >= model.config.get_text_config().vocab_size:
            raise ValueError("tokenizer: has ids beyond the model's vocabulary; it belongs to another model")
        hidden = backbone(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        embeddings.append(F.normalize(pooled.float(), dim=1))
    result = torch.cat(embeddings)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order, device=result.device), result)


def sentence_fidelity(before: Tensor, after: Tensor) -> SentenceFidelity:
    """Compare normalised embeddings (N, H) of the same sentences before and after compression."""
    from scipy.stats import spearmanr

    count = len(before)
    spearman = None
    if count >= 3:
        rows, columns = torch.triu_indices(count, count, offset=1)
        pairs = [(each @ each.t())[rows, columns].double().cpu().numpy() for each in (before, after)]
        spearman = float(spearmanr(*pairs).statistic)
    return SentenceFidelity(
        sentences=count, mean_cosine=float((before * after).sum(1).mean()), spearman=spearman
    )
