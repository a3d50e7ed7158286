"""Fisher weights: the sensitivity of a model's loss to the rows and entries of its token-embedding table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .find_table import find_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # transformers' label of a token that is not part of the loss


def fisher_row_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int = 128,
    mask_share: float = 0.15,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """Diagonal Fisher information of the input embeddings, summed per row: (V,), float64, on the CPU.

    ``weight[v] = mean over texts of (d loss / d table[v]).square().sum()``, one backward per text. A row that
    occurs in no text has weight 0; add a constant (``weight + 0.01 * weight.mean()``) so that such rows are
    not neglected. Gradients through a tied head are not included. The loss is

    - for a masked language model, the cross entropy of ``mask_share`` of the tokens (at least one);
    - for another model with a head, its own loss with the text as ``labels``;
    - for a model without a head, ``z @ e`` for a standard normal z and the mean-pooled, normalised hidden
      states e: the expected square of its gradient is the Fisher information of a normal distribution with
      mean e.

    For FWSVD: ``direction(table, rank, row_weight=weight, cosine_weight=0, mse_weight=1)``.

    Args:
        model: a model of transformers; it is unchanged afterwards.
        tokenizer: the model's tokenizer.
        texts: a few hundred typical texts.
        max_length: tokens per text; longer texts are truncated.
        mask_share: share of the tokens that are masked for a masked language model.
        seed: random seed of the masks and of z.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: no text has a token with a loss, an id is beyond the table, or the model has a head but
            returns no loss.
        UnsupportedModelError: the model has no table that ``find_table`` finds.

    Source: Hsu et al. 2022, arXiv 2207.00112.
    """
    total, count = torch.zeros(len(find_table(model).weight), dtype=torch.float64), 0
    settings: dict[str, Any] = {
        "max_length": max_length,
        "mask_share": mask_share,
        "seed": seed,
        "progress": progress,
    }
    for gradient in _gradients(model, tokenizer, texts, **settings):
        total.index_add_(0, gradient.ids, gradient.rows.square().sum(1))
        count += 1
    return total / _checked(count)


def fisher_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int | None = None,
    head: bool = False,
    max_length: int = 128,
    mask_share: float = 0.15,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """Diagonal Fisher information of the table, entry by entry: (V, H), fp32, on the CPU.

    ``weight = mean over texts of (d loss / d table).square()``, one backward per text, with the losses of
    ``fisher_row_weights``, to which it adds up: ``weight.sum(1)``. Texts are read one at a time. The sums
    take 4 bytes for each value of the table; a text adds the gradients of the rows that it reads, and with
    ``head`` twice the table. For ``tfwsvd`` and ``fwsvd``.

    Args:
        model: a model of transformers; it is unchanged afterwards.
        tokenizer: the model's tokenizer.
        texts: typical texts; ``read_texts`` streams them from files.
        tokens: stop after the text with which so many tokens are read; None reads all texts.
        head: whether gradients through a tied output head count, too. Then every row has a weight: a
            compressed table that serves the head as well is fitted to both uses.
        max_length: tokens per text; longer texts are truncated.
        mask_share: share of the tokens that are masked for a masked language model.
        seed: random seed of the masks and of z.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: no text has a token with a loss, an id is beyond the table, the model has a head but
            returns no loss, or with ``head``, no output head shares the table.
        UnsupportedModelError: the model has no table that ``find_table`` finds.

    Source: the weights of Hua et al. 2022, arXiv 2211.09718.
    """
    table = find_table(model)
    if head and not table.tied:
        raise ValueError("head: expected a model whose output head shares the table, got one that does not")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    total, count, read = torch.zeros(table.weight.shape), 0, 0
    settings: dict[str, Any] = {
        "max_length": max_length,
        "mask_share": mask_share,
        "seed": seed,
        "progress": progress,
    }
    # Closed at once after the last text, so that the model has no hooks any more.
    with contextlib.closing(_gradients(model, tokenizer, texts, head=head, **settings)) as gradients:
        for gradient in gradients:
            if gradient.of_head is None:
                total.index_add_(0, gradient.ids, gradient.rows.square().float())
            else:
                whole = gradient.of_head.index_add_(0, gradient.ids, gradient.rows.float())
                total.addcmul_(whole, whole)
            count, read = count + 1, read + gradient.tokens
            if tokens is not None and read >= tokens:
                break
    return total / _checked(count)


def _checked(count: int) -> int:
    """Return the number of texts with a loss; raise ValueError if it is 0."""
    if not count:
        raise ValueError("texts: expected at least one with a token to take a loss of, got none")
    return count


class _Gradient(NamedTuple):
    """The gradient of the loss of one text with respect to a table.

    Attributes:
        ids: the rows that it reads, (n,), each once.
        rows: their gradients, (n, H) float64, summed over all lookups.
        of_head: the gradient through the tied head, (V, H) fp32, or None.
        tokens: number of tokens of the text.
    """

    ids: Tensor
    rows: Tensor
    of_head: Tensor | None
    tokens: int


def _gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int,
    mask_share: float,
    seed: int,
    progress: bool | None,
    head: bool = False,
) -> Generator[_Gradient, None, None]:
    """Yield the gradient of each text that has a loss."""
    table = find_table(model)
    weight: Any = table.weight
    loss_of = _loss_of(model, tokenizer, mask_share, torch.Generator().manual_seed(seed))
    lookups: list[tuple[Tensor, Tensor, float]] = []  # ids, rows and scale of each one in a forward pass

    def recording(scale: float) -> Callable[..., Tensor]:
        def hook(_: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = output.detach().requires_grad_()
            lookups.append((arguments[0], rows, scale))
            return rows

        return hook

    training, trained = model.training, weight.requires_grad
    handles = [
        model.get_submodule(name).register_forward_hook(recording(table.scales.get(name, 1.0)))
        for name in table.embeddings
    ]
    try:
        model.eval()
        weight.requires_grad_(trained or head)
        for text in tqdm(texts, "fisher", unit="text", disable=None if progress is None else not progress):
            batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            ids = batch["input_ids"]
            if ids.numel() and int(ids.max()) >= len(weight):
                raise ValueError(
                    f"tokenizer: expected ids below {len(weight)}, the rows of the table, "
                    f"got {int(ids.max())}; does it belong to the model?"
                )
            lookups.clear()
            with torch.inference_mode(False), torch.enable_grad():
                loss = loss_of(batch.to(model.device))
                if loss is None:
                    continue
                sources = [*(rows for _, rows, _ in lookups), *([weight] if head else [])]
                gradients = list(torch.autograd.grad(loss, sources, allow_unused=True))
            of_head = gradients.pop() if head else None
            distinct, rows = _by_row(lookups, gradients)
            yield _Gradient(distinct, rows, None if of_head is None else of_head.float().cpu(), ids.numel())
    finally:
        model.train(training)
        weight.requires_grad_(trained)
        for handle in handles:
            handle.remove()


def _by_row(
    lookups: list[tuple[Tensor, Tensor, float]], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return the ids that were looked up, (n,), each once, and their gradients, (n, H), on the CPU."""
    found = [
        (ids.flatten(), scale * gradient.flatten(0, -2).double())
        for (ids, _, scale), gradient in zip(lookups, gradients, strict=True)
        if gradient is not None
    ]
    ids, gradient = (torch.cat(each).cpu() for each in zip(*found, strict=True))
    distinct, place = ids.unique(return_inverse=True)
    return distinct, gradient.new_zeros(len(distinct), gradient.shape[1]).index_add_(0, place, gradient)


def _loss_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_share: float, generator: torch.Generator
) -> Callable[[Any], Tensor | None]:
    """Return a function from a tokenised text to its loss, or to None where no token has a loss."""

    def masked(batch: Any) -> Tensor | None:
        ids = batch["input_ids"]
        special = tokenizer.get_special_tokens_mask(ids[0].tolist(), already_has_special_tokens=True)
        places = torch.nonzero(torch.tensor(special) == 0).flatten()
        if not len(places):
            return None
        order = torch.randperm(len(places), generator=generator)
        chosen = places[order[: max(1, round(mask_share * len(places)))]].to(ids.device)
        labels = torch.full_like(ids, IGNORED)
        labels[0, chosen] = ids[0, chosen]
        batch["input_ids"] = ids.index_fill(1, chosen, tokenizer.mask_token_id)
        return _own_loss(model(**batch, labels=labels))

    def own(batch: Any) -> Tensor | None:
        ids = batch["input_ids"]
        if ids.shape[1] < 2:  # a causal model has no next token to predict
            return None
        return _own_loss(model(**batch, labels=ids))

    def headless(batch: Any) -> Tensor | None:
        if not batch["input_ids"].shape[1]:
            return None
        hidden = model(**batch).last_hidden_state
        pooled = F.normalize(hidden.float().mean(1), dim=1)
        return (torch.randn(pooled.shape, generator=generator).to(pooled.device) * pooled).sum()

    if model.get_output_embeddings() is None:
        return headless
    return masked if "MaskedLM" in type(model).__name__ and tokenizer.mask_token_id is not None else own


def _own_loss(output: Any) -> Tensor:
    if getattr(output, "loss", None) is None:
        raise ValueError(
            "model: expected a loss of its head for labels, got none; use its class for masked or causal LM"
        )
    return output.loss
