"""Language models: their kind and limits, and a split into body and head that saves computation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.inference import language_kind
from ..nn import CompressedHead
from ..ops.reference.cross_entropy import LossOptions, dense_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .batches import Batch

Kind = Literal["masked", "causal"]

LOGITS_AT_ONCE = 1 << 24  # 64 MB in fp32
IGNORED = -100  # No target has this id.


def usable_device(name: str | torch.device | None) -> torch.device | None:
    """Return a device that can be used here.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: expected one that is there, got {str(name)!r} ({reason})") from error


# ---- what a model is -------------------------------------------------------------------------------------


def kind_of(model: PreTrainedModel) -> Kind:
    """Return whether a model is a masked or a causal language model, judged by its class.

    Raises:
        ValueError: it is neither: an encoder without a head, an encoder-decoder, a classifier.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model: {name} is an encoder-decoder; perplexity is of masked and causal language models"
        )
    kind = language_kind(model)
    if kind is None:
        raise ValueError(
            f"model: {name} has no language-model head, so it has no perplexity; expected a masked or causal "
            "language model, such as BertForMaskedLM or GPT2LMHeadModel"
        )
    return kind


def no_perplexity(model: PreTrainedModel) -> str | None:
    """Return why a model has no perplexity, or None for a language model."""
    try:
        kind_of(model)
    except ValueError as error:
        return str(error)
    return None


def check_causal(model: PreTrainedModel) -> None:
    """Raise ValueError if later tokens change earlier predictions: XLNet, or BERT with a causal head."""
    ids = torch.zeros(2, 6, dtype=torch.long, device=model.device)
    ids[1, 1:] = 1
    first, second = model(input_ids=ids).logits[:, 0]
    if not _same(first, second):
        raise ValueError(
            f"model: {type(model).__name__} attends to later tokens as it is configured; its loss is not a "
            "perplexity"
        )


# ---- body and head ---------------------------------------------------------------------------------------


class SplitModel:
    """A language model split into a body, which runs once, and a head, which runs on chosen hidden states.

    Attributes:
        body: the module whose last hidden state the head reads position by position; None if the model cannot
            be split, which is tested when the object is made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body, self._output = _body_of(model)
        if self.body is None:
            return
        probe = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
        hidden = self.body(input_ids=probe)[0][0]
        whole, split = model(input_ids=probe).logits[0], self.logits(hidden)
        if not _same(whole, split):
            self.body = None
            return
        self._without_logits = self._agrees(hidden, whole)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the hidden states of the scored positions, (n, H); their logits if there is no body."""
        output = self.model(**batch.inputs).logits if self.body is None else self.body(**batch.inputs)[0]
        return output.flatten(0, 1)[batch.positions]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of the result of ``hidden``."""
        if self.body is None:
            return hidden
        with _replaced_forward(self.body, lambda *_, **__: self._output(last_hidden_state=hidden[None])):
            return self.model(input_ids=hidden.new_zeros((1, len(hidden)), dtype=torch.long)).logits[0]

    def loss(self, hidden: Tensor, targets: Tensor) -> float:
        """Return ``F.cross_entropy(self.logits(hidden), targets, reduction="sum")``, without (n, V) logits.

        A head that the model applies to hidden states and a softcap, of which there is one at most, take part
        as they are; the logits of every other model are computed in blocks of positions.
        """
        if self.body is not None and self._without_logits:
            found = self._losses(hidden, targets)
            assert found is not None, "the head is of the type that was tested"
            return float(found.sum(dtype=torch.float64))
        rows = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        return sum(
            float(F.cross_entropy(self.logits(block).float(), wanted, reduction="sum"))
            for block, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        )

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        """Return the losses (n,) by the head alone, without logits; None where there is no way to do that."""
        head = self.model.get_output_embeddings()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if not (isinstance(head, CompressedHead) or type(head) is nn.Linear):
            return None
        seen: list[Tensor] = []

        def note(states: Tensor) -> Tensor:
            seen.append(states)
            return states[..., :0]  # What the model does with logits has nothing to do.

        assert self.body is not None, "callers ask"
        with (
            _replaced_forward(self.body, lambda *_, **__: self._output(last_hidden_state=hidden[None])),
            _replaced_forward(head, note),
        ):
            self.model(input_ids=hidden.new_zeros((1, len(hidden)), dtype=torch.long))
        if len(seen) != 1 or seen[0].shape[:-1] != (1, len(hidden)):
            return None
        if isinstance(head, CompressedHead):
            return head.loss(seen[0][0], targets, softcap=cap, reduction="none")
        options = LossOptions(IGNORED, 0.0, cap or 0.0)
        return dense_losses(seen[0][0], targets, head.weight, head.bias, options)

    def _agrees(self, hidden: Tensor, logits: Tensor) -> bool:
        """Return whether the losses without logits are those of the model's logits."""
        targets = logits.argmin(-1)
        try:
            found = self._losses(hidden, targets)
        except RuntimeError:  # The model does more with its logits than with none.
            return False
        return found is not None and _same(
            F.cross_entropy(logits.float(), targets, reduction="none"), found, logits.dtype
        )


def _same(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether two results of sums in a dtype, by default theirs, differ by rounding at most."""
    tolerance = 16 * torch.finfo(dtype or one.dtype).eps * float(one.abs().nan_to_num().max())
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)


def _body_of(model: PreTrainedModel) -> tuple[nn.Module | None, Any]:
    """Return the outermost module inside a model that returns a last hidden state, and its output's type."""
    finished: list[tuple[nn.Module | None, Any]] = [(None, None)]

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            finished.append((module, type(output)))

    hooks = [each.register_forward_hook(note) for each in model.modules() if each is not model]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return finished[-1]  # the outermost module finishes last


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a module run a function in place of its own forward."""
    own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module.__dict__.update(own)
