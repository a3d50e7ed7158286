"""Find a model's embedding tables: the modules that share each, their scales and the tied heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..nn import NGrammer
from ..nn.base import CompressedEmbedding
from .body_config import BODIES, body_of, method_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBED_ROWS = 64  # rows of which probe_scale compares input and output

Role = Literal["input", "head", "bag", "other"]


class UnsupportedModelError(ValueError):
    """The model's embedding cannot be replaced; the message tells the reason."""


@dataclass
class ModelTable:
    """An embedding table of a model and the modules that share it.

    Attributes:
        root: name of the first module, whose parameters the others share after the swap: an embedding, or a
            head whose table no embedding shares.
        embeddings: names of all embedding modules of the table, root first.
        heads: names of the output heads that are tied to it, or, without embeddings, of the heads over it.
        output_head: name of the model's output head, tied or not, or None; None for all but the input table.
        scales: constant factor of each embedding module's output, by name; empty on the meta device.
        weight: the table, (V, H).
        role: ``input`` (the input embedding and what is tied to it), ``head`` (an untied output head),
            ``bag`` (static embeddings), or ``other``.
        segments: number of equal segments of a row that are stored as rows of their own: in per-layer tables
            one for each layer, 1 in others.
    """

    root: str
    embeddings: list[str]
    heads: list[str]
    output_head: str | None
    scales: dict[str, float]
    weight: Tensor
    role: Role = "input"
    segments: int = 1

    @property
    def tied(self) -> bool:
        """Whether an output head shares the table with an embedding."""
        return bool(self.heads and self.embeddings)

    @property
    def rows(self) -> Tensor:
        """The rows that are compressed, (V * segments, H / segments), detached; a view of the table."""
        return self.weight.detach().view(len(self.weight) * self.segments, -1)


def find_table(model: PreTrainedModel) -> ModelTable:
    """Find the token-embedding table of a model and every module that shares it.

    Raises:
        UnsupportedModelError: the model is wrapped (PEFT, torch.compile), quantised by something else, or
            spread over devices; there is no input embedding, it is not a plain ``nn.Embedding``, it is
            compressed already, it normalises its rows, or a module of another type shares its weight.
    """
    check_model(model)
    module = input_embeddings(model)
    if isinstance(module, CompressedEmbedding):
        raise UnsupportedModelError(
            "the model's embedding is compressed already; decode it first: model.dequantize(), embkern export"
        )
    if not isinstance(module, nn.Embedding):
        raise UnsupportedModelError(
            f"the input embedding of {type(model).__name__} is {type(module).__name__}, expected nn.Embedding"
        )
    names = dict(model.named_modules(remove_duplicate=False))
    return table_at(model, next(name for name, each in names.items() if each is module))


def table_at(model: PreTrainedModel, name: str) -> ModelTable:
    """Return the table of the module ``name`` with all modules that share it.

    Raises:
        UnsupportedModelError: one of them cannot be replaced.
    """
    names: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    module = names[name]
    sharing: dict[str, Any] = {each: names[each] for each in _sharing(model, names, module)}
    embeddings = [each for each, found in sharing.items() if isinstance(found, nn.Embedding)]
    heads = [each for each, found in sharing.items() if type(found).forward is nn.Linear.forward]
    if others := sharing.keys() - set(embeddings) - set(heads):
        kinds = ", ".join(f"{each} ({type(sharing[each]).__name__})" for each in sorted(others))
        raise UnsupportedModelError(
            f"the embedding's weight is shared by modules that cannot be replaced: {kinds}"
        )
    if hasattr(module.weight, "__tensor_flatten__"):
        raise UnsupportedModelError(
            f"{name}: its table is quantised already ({type(module.weight).__name__}); load the model with "
            "dense embeddings (TorchAoConfig: include_input_output_embeddings=False)"
        )
    for each in embeddings:
        _check_embedding(each, sharing[each])
    own, head = input_or_none(model), output_or_none(model)
    ordered = embeddings or heads
    main = next((each for each in ordered if sharing[each] is own), None)
    root = main or next(each for each in ordered if sharing[each] is module)
    role: Role = "input" if main else "head" if any(sharing[each] is head for each in heads) else "other"
    embeddings.sort(key=lambda each: each != root)
    scales = {} if module.weight.is_meta else {each: probe_scale(sharing[each], each) for each in embeddings}
    output_head = (
        next((each for each, found in names.items() if found is head), None) if main and head else None
    )
    segments = _segments(model, module) if role == "other" else 1
    return ModelTable(root, embeddings, heads, output_head, scales, module.weight, role, segments)


def _segments(model: PreTrainedModel, module: nn.Module) -> int:
    """Return the number of layers that a row of a per-layer table has a segment for, 1 of other tables."""
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 1)
    width = layers * (getattr(config, "hidden_size_per_layer_input", None) or 0)
    return layers if isinstance(module, nn.Embedding) and module.embedding_dim == width else 1


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if a model is wrapped, quantised by something else, or on many devices."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model: expected a transformers PreTrainedModel, got {type(model).__name__}; unwrap it first "
            "(PEFT: merge_and_unload, torch.compile: the original module)"
        )
    body = body_of(model)
    if body is not None and method_of(body.quantization_config) not in BODIES:
        raise UnsupportedModelError(
            f"model: it is already quantised by {type(body).__name__}; compress the dense model instead, or "
            f"one whose linear layers are quantised by {' or '.join(BODIES)}"
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UnsupportedModelError(
            "device_map: the model is spread over several devices; compress it on one, save it, "
            "and load the compressed model with the device_map"
        )


def _check_embedding(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError if an embedding does more than looking up rows."""
    extra = [key for key, _ in module.named_parameters() if key != "weight"]
    if any(isinstance(each, NGrammer) for each in module.children()):
        raise UnsupportedModelError(
            f"{name} has an N-Grammer; compress the table first, and call enable_ngrammer then"
        )
    if extra:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has parameters besides its table ({', '.join(extra)}) "
            "that a compressed table cannot replace"
        )
    if getattr(module, "max_norm", None) is not None:
        raise UnsupportedModelError(
            f"{name} renormalises rows on lookup (max_norm), which a compressed table cannot"
        )


def _sharing(model: PreTrainedModel, names: dict[str, nn.Module], module: nn.Embedding) -> list[str]:
    """Return the names of the modules that hold the embedding's weight."""
    if not module.weight.is_meta:
        return [
            name for name, each in names.items() if any(p is module.weight for p in each._parameters.values())
        ]
    # A model on the meta device is not tied yet: its map tells which modules will be.
    root = next(f"{name}.weight" for name, each in names.items() if each is module)
    ties = model.all_tied_weights_keys
    root = ties.get(root, root)
    tied = [root, *(target for target, source in ties.items() if source == root)]
    return [name.removesuffix(".weight") for name in tied]


def input_embeddings(model: PreTrainedModel) -> nn.Module:
    """Return the model's input embedding, or raise UnsupportedModelError."""
    module = input_or_none(model)
    if module is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding (get_input_embeddings)")
    return module


def input_or_none(model: PreTrainedModel) -> nn.Module | None:
    """Return the model's input embedding, or None."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def output_or_none(model: PreTrainedModel) -> nn.Module | None:
    """Return the model's output head, or None."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def other_tables(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes, by name, of other embedding tables at least as large as the input embedding.

    embkern leaves them alone. Per-layer embeddings (``embed_tokens_per_layer`` of Gemma 3n and 4), for
    example, are larger than the main table.
    """
    main: Any = input_or_none(model)
    size = getattr(main, "num_embeddings", 0) * getattr(main, "embedding_dim", 0)
    return {
        name: module.weight.nbytes
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not main
        and module.weight.numel() >= size
        and module.weight is not getattr(main, "_parameters", {}).get("weight")
    }


@torch.no_grad()
def probe_scale(module: nn.Embedding, name: str = "embedding") -> float:
    """Return the constant by which an embedding multiplies its rows, 1.0 for a plain one.

    Raises:
        UnsupportedModelError: the output is not a constant multiple of the row (normalised embeddings).
    """
    weight = module.weight
    ids = torch.linspace(0, len(weight) - 1, min(_PROBED_ROWS, len(weight)), device=weight.device).long()
    rows = weight[ids].double()
    ids = ids[rows.abs().amax(1) > 0]
    if len(ids) == 0:
        return 1.0
    try:
        rows, output = weight[ids].double(), module(ids).double()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) does not look up rows by their ids, as a compressed table "
            f"does ({error})"
        ) from None
    if torch.equal(rows, output):
        return 1.0
    tolerance = 4 * torch.finfo(weight.dtype).eps
    scale = float((rows * output).sum() / rows.square().sum()) if output.shape == rows.shape else float("nan")
    if not torch.allclose(output, scale * rows, rtol=tolerance, atol=tolerance * float(output.abs().max())):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) does not return a constant multiple of its rows "
            "(it normalises them, or adds to them), as a compressed table does"
        )
    # The module's own constant is exact; the estimate has the rounding errors of the weights' dtype.
    for attribute in ("scalar_embed_scale", "embed_scale"):
        own = getattr(module, attribute, None)
        if own is not None and abs(float(own) - scale) <= tolerance * abs(scale):
            return float(own)
    return torch.tensor(scale, dtype=torch.float32).item()
