"""Swap a model's dense embedding modules and tied heads for compressed ones, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import layer_of
from ..nn.base import CompressedEmbedding, CompressedHead
from ..recipe import Recipe
from ..tables import Table
from .config import TableState
from .find_table import ModelTable, UnsupportedModelError, input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_installable(table: ModelTable, recipe: Recipe) -> None:
    """Raise UnsupportedModelError if the recipe's result could not serve the model.

    Called before a method runs, which may take minutes.
    """
    activation = recipe.options.get("activation")
    if activation is not None and table.tied and recipe.lm_head == "factorized":
        raise UnsupportedModelError(
            f"lm_head: a tied head cannot decode through activation {activation!r}; "
            "use lm_head='dense' or the linear autoencoder"
        )


def compressed_models(model: PreTrainedModel) -> list[Any]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "all_tied_weights_keys")
        and any(isinstance(each, CompressedEmbedding) for each in module.modules())
    ]


@dataclass
class DenseModules:
    """The dense modules and tie maps that a swap took out, weights freed; ``dequantize`` puts them back."""

    modules: dict[str, Any]  # nn.Embedding or nn.Linear
    ties: dict[str, tuple[dict | None, dict | None]]
    table: ModelTable


# A module's hooks are moved to what replaces it: gradient checkpointing registers one on the embedding.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def take_place(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return ``new`` in the mode and with the hooks of ``old``."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def swap(model: PreTrainedModel, table: ModelTable, compressed: Table, compress_heads: bool) -> DenseModules:
    heads = table.heads if compress_heads else []
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in [*table.embeddings, *heads]}
    original = DenseModules(modules, {}, table)
    swapped: dict[int, CompressedEmbedding] = {}
    for name in table.embeddings:
        dense = modules[name]
        layer = swapped.get(id(dense))
        if layer is None:
            kind = layer_of(compressed)
            layer = kind.from_table(compressed, padding_idx=dense.padding_idx, scale=table.scales[name])
            layer.share(next(iter(swapped.values()), layer))
            swapped[id(dense)] = layer
        model.set_submodule(name, take_place(layer, dense))
    root = swapped[id(modules[table.root])]
    for parameter in root.parameters():
        parameter.requires_grad_(table.weight.requires_grad)
    for name in heads:
        model.set_submodule(name, take_place(root.head(modules[name].bias), modules[name]))
    followers = [name for name in [*table.embeddings, *heads] if name != table.root]
    original.ties = _retie(model, table, followers)
    for dense in modules.values():  # the dense table is freed unless a dense head still holds it
        dense.weight = nn.Parameter(dense.weight.detach().to("meta"), requires_grad=False)
    table.weight = table.weight.detach().to("meta")
    return original


def _retie(
    model: PreTrainedModel, table: ModelTable, followers: list[str]
) -> dict[str, tuple[dict | None, dict | None]]:
    """Point the tie maps at the table's tensors; returns what they were, per nested model."""
    stale = {f"{name}.weight" for name in [*table.embeddings, *table.heads]}
    root = model.get_submodule(table.root)
    tensors = [*root._parameters, *root._buffers]
    new = {
        f"{name}.{tensor}": f"{table.root}.{tensor}"
        for name in followers
        for tensor in tensors
        if getattr(root, tensor) is not None
    }
    before: dict[str, tuple[dict | None, dict | None]] = {}
    for prefix, module in model.named_modules():
        if not hasattr(module, "all_tied_weights_keys"):
            continue
        before[prefix] = (module.__dict__.get("_tied_weights_keys"), module.all_tied_weights_keys)
        inside = f"{prefix}." if prefix else ""
        kept = {
            target: source
            for target, source in module.all_tied_weights_keys.items()
            if inside + target not in stale and inside + source not in stale
        }
        own = {  # a nested model may be saved alone: it knows the ties that lie within it, by its own names
            target.removeprefix(inside): source.removeprefix(inside)
            for target, source in new.items()
            if target.startswith(inside) and source.startswith(inside)
        }
        module._tied_weights_keys = {**kept, **own}
        # transformers ties by this map while it loads, and looks for parameters alone.
        codes = {target for target, source in own.items() if source.rpartition(".")[2] in root._buffers}
        module.all_tied_weights_keys = {
            target: source for target, source in module._tied_weights_keys.items() if target not in codes
        }
    return before


def canonical_name(model: PreTrainedModel, name: str) -> str:
    """Name of a module without the base model's prefix, which differs between a model and its backbone."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def restore_tie(model: PreTrainedModel) -> None:
    """Tie a skeleton again whose flag was cleared: merging an adapter does, as it looks at dense weights."""
    model.config.tie_word_embeddings = True
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def keep_tie(model: PreTrainedModel, state: TableState) -> None:
    """Set the flag that says the head is tied where it still shares the table, and something cleared it."""
    if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
        model.config.tie_word_embeddings = True


def compressed_embedding(model: PreTrainedModel) -> CompressedEmbedding:
    module = input_embeddings(model)
    if not isinstance(module, CompressedEmbedding):
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    return module


def modules_of_table(model: PreTrainedModel) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, (CompressedEmbedding, CompressedHead))]


def materialize_buffers(model: PreTrainedModel, path: str, module: nn.Module, weight: Tensor) -> None:
    """Give a dense module that was built on the meta device its buffers (an embedding's scale)."""
    if any(buffer.is_meta for buffer in module.buffers()):
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, torch.empty_like(buffer, device=weight.device))
        # The innermost model knows its embedding's class; the weight is left alone, marked as initialised.
        owners = [model.get_submodule(path.rsplit(".", i)[0]) for i in range(1, path.count(".") + 1)]
        owner: Any = next((each for each in owners if hasattr(each, "_init_weights")), model)
        with torch.no_grad():
            owner._init_weights(module)
    module.to(weight.device)


def untie_heads(model: PreTrainedModel, table: ModelTable) -> None:
    """The head kept the original table and the embedding did not: they are two tensors from now on."""
    heads = {f"{head}.weight" for head in table.heads}
    for prefix, module in model.named_modules():
        if not getattr(module, "all_tied_weights_keys", None):
            continue
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute) or {}
            kept = {
                t: s
                for t, s in ties.items()
                if not {f"{prefix}.{t}".lstrip("."), f"{prefix}.{s}".lstrip(".")} & heads
            }
            setattr(module, attribute, kept)
    # The flag covers every tie of a model. Where others remain it stays: transformers finds both tensors in
    # the checkpoint, sees that they differ, and leaves the head alone.
    if not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
