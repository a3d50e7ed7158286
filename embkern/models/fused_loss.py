"""The training loss of a compressed language model straight from its hidden states, without logits."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn.base import CompressedHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 1e-2  # relative; 16-bit logits are rounded where the loss is computed from them


class FusedLoss:
    """The loss of a model without its logits, until ``remove``; ``enable_fused_loss`` makes it.

    While the model runs in training mode and is given labels, its head notes the hidden states and returns
    logits without columns, and the model's ``loss_function`` computes the loss from the noted states.
    """

    def __init__(self, model: PreTrainedModel, causal: bool) -> None:
        self.model, self.causal = model, causal
        self.original = model.loss_function
        self.always = False  # in evaluation mode, too
        self.states: Tensor | None = None
        self.head: CompressedHead | None = None
        model.loss_function = self.loss
        self.hooks = (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Let the model compute its loss from logits again."""
        for hook in self.hooks:
            hook.remove()
        self.model.loss_function = self.original

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        head = self.model.get_output_embeddings()
        if not (model.training or self.always) or not isinstance(head, CompressedHead):
            return
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        if {**given, **given.get("kwargs", {})}.get("labels") is not None:
            self.head = head
            head.forward = self._note  # type: ignore[method-assign]

    def _note(self, hidden: Tensor) -> Tensor:
        self.states = hidden
        return hidden[..., :0]

    def _end(self, *_: Any) -> None:
        if self.head is not None:
            del self.head.forward
        self.head = self.states = None

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss that transformers' function of these arguments would return for the logits."""
        if self.states is None or self.head is None:
            more: dict[str, Any] = {} if shift_labels is None else {"shift_labels": shift_labels}
            return self.original(
                logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index, **more, **kwargs,
            )  # fmt: skip
        if self.causal and shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = (labels if shift_labels is None else shift_labels).to(self.states.device)
        loss = self.head.loss(
            self.states.reshape(-1, self.states.shape[-1]),
            targets.reshape(-1),
            ignore_index=ignore_index,
            softcap=getattr(self.model.config.get_text_config(), "final_logit_softcapping", None),
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def enable_fused_loss(model: PreTrainedModel) -> FusedLoss:
    """Let a compressed language model compute its loss in training without (N, V) logits.

    From now on ``model(input_ids, labels=labels)`` in training mode returns the same loss, by
    ``packed_cross_entropy`` or ``low_rank_cross_entropy``, and logits of shape (``*``, 0). In evaluation
    mode, and without labels, nothing changes. A small batch is run both ways first: a model whose loss is not
    the cross-entropy of its head's logits, softcapped at most, is refused.

    Args:
        model: a masked or causal language model of transformers with a compressed head.

    Returns:
        A handle with ``remove()``.

    Raises:
        ValueError: the head is not compressed, or the model computes its loss in another way.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    name, head = type(model).__name__, model.get_output_embeddings()
    if not isinstance(head, CompressedHead):
        raise ValueError(f"model: expected {name} with a compressed tied head, got {type(head).__name__}")
    if model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
        raise ValueError(
            f"model: expected the loss_function of a language model, got {model.loss_function!r}"
        )
    ids = (torch.arange(12, device=model.device) * 7 % head.out_features).view(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    training = model.training
    model.eval()
    fused = FusedLoss(model, model.loss_function is ForCausalLMLoss)
    try:
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=labels).loss)
            fused.always = True
            found = float(model(input_ids=ids, labels=labels).loss)
        if not abs(found - expected) <= _TOLERANCE * abs(expected):
            raise ValueError(f"loss {found:.6g} without logits, {expected:.6g} with them")
    except (RuntimeError, ValueError, IndexError) as error:
        fused.remove()
        raise ValueError(
            f"model: expected the cross-entropy of the head's logits as loss; {name} does more ({error})"
        ) from None
    finally:
        fused.always = False
        model.train(training)
    return fused
