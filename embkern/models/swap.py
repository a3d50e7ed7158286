"""Replace a model's dense embedding modules and tied heads by compressed ones, and update its ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import KINDS, NGrammer, SegmentedEmbedding, layer_of
from ..nn.base import CompressedEmbedding
from ..nn.table_module import TableModule
from ..recipe import LMHead, Recipe
from ..tables import PackedTable, Table
from .config import TableState
from .find_table import ModelTable, UnsupportedModelError, input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_installable(table: ModelTable, recipe: Recipe) -> None:
    """Raise UnsupportedModelError if the model cannot use the recipe's result; for use before compressing."""
    activation = recipe.options.get("activation")
    if activation is not None and compressed_heads(table, recipe):
        raise UnsupportedModelError(
            f"lm_head: a {'tied ' * table.tied}head cannot decode through activation {activation!r}; "
            "use lm_head='dense' or the linear autoencoder"
        )


def compressed_heads(table: ModelTable, recipe: Recipe) -> list[str]:
    """Return the names of the heads that will use the compressed table."""
    return table.heads if not table.embeddings or recipe.compresses_head(table.tied) else []


def head_kind(table: ModelTable, recipe: Recipe) -> LMHead | None:
    """Return whether a head will use the compressed table or a dense one; None if no head belongs to it."""
    if compressed_heads(table, recipe):
        return "factorized"
    return "dense" if table.heads or table.output_head is not None else None


@dataclass
class DenseModules:
    """What the swap of a table replaced, for ``dequantize`` to put back.

    Attributes:
        modules: dense embeddings and heads by name, their weights on the meta device.
        ties: by nested model, its own ``_tied_weights_keys`` or None, and its ``all_tied_weights_keys``.
        table: the model's table before the swap, its weight on the meta device.
        trained: whether its weight required gradients.
    """

    modules: dict[str, Any]
    ties: dict[str, tuple[dict | None, dict | None]]
    table: ModelTable
    trained: bool


def swap(
    model: PreTrainedModel, table: ModelTable, compressed: Table, compress_heads: bool, table_name: str = ""
) -> DenseModules:
    """Replace the modules that share a table by modules over a compressed one, in place.

    Args:
        model: the model.
        table: where its table is; afterwards its weight is on the meta device.
        compressed: the compressed table, with the device and dtype of the model.
        compress_heads: whether to replace the heads; else those of a tied table keep it dense.
        table_name: name of the table in the model's config; empty for that of the input.

    Returns:
        The modules and ties that were replaced.
    """
    heads = table.heads if compress_heads else []
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in [*table.embeddings, *heads]}
    original = DenseModules(modules, {}, table, table.weight.requires_grad)
    swapped: dict[int, CompressedEmbedding] = {}
    for name in table.embeddings:
        dense = modules[name]
        layer = swapped.get(id(dense))
        if layer is None:
            layer = _embedding_over(compressed, table, dense.padding_idx, table.scales[name])
            layer.share(next(iter(swapped.values()), layer))
            swapped[id(dense)] = layer
        model.set_submodule(name, take_place(layer, dense))
    first = swapped[id(modules[table.root])] if swapped else _embedding_over(compressed, table)
    for layer in [first, *swapped.values()]:
        layer.adjust(None)  # an optimizer's steps are made for dense rows; unfreeze_table suits them
    for name in heads:
        model.set_submodule(name, take_place(first.head(modules[name].bias), modules[name]))
    for path in [*table.embeddings, *heads]:
        module: Any = model.get_submodule(path)
        module.table_name, module.leads = table_name, path == table.root
    followers = [name for name in [*table.embeddings, *heads] if name != table.root]
    original.ties = _retie(model, table, followers)
    for dense in modules.values():  # frees the dense table unless a dense head still holds it
        dense.weight = nn.Parameter(dense.weight.detach().to("meta"), requires_grad=False)
    table.weight = table.weight.detach().to("meta")
    return original


def _embedding_over(
    compressed: Table, table: ModelTable, padding_idx: int | None = None, scale: float = 1.0
) -> CompressedEmbedding:
    """Return an embedding over a compressed table, in place of a dense one or for heads alone."""
    if isinstance(compressed, PackedTable) and table.segments > 1:
        return SegmentedEmbedding(compressed, segments=table.segments, padding_idx=padding_idx, scale=scale)
    return layer_of(compressed).from_table(compressed, padding_idx=padding_idx, scale=scale)


def _retie(
    model: PreTrainedModel, table: ModelTable, followers: list[str]
) -> dict[str, tuple[dict | None, dict | None]]:
    """Replace the ties of the dense table by those of ``followers``; return the old ones by nested model."""
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
            for target, source in _ties_of(module).items()
            if inside + target not in stale and inside + source not in stale
        }
        own = {  # a nested model may be saved alone and needs the ties within it, by its own names
            target.removeprefix(inside): source.removeprefix(inside)
            for target, source in new.items()
            if target.startswith(inside) and source.startswith(inside)
        }
        module._tied_weights_keys = {**kept, **own}
        # transformers ties by this map while it loads, and finds parameters but no buffers.
        module.all_tied_weights_keys = {
            target: source for target, source in module._tied_weights_keys.items() if not _is_code(source)
        }
    return before


def _ties_of(module: Any) -> dict[str, str]:
    """Return the ties of a model, with those of codes of a table that was swapped before."""
    own = module.__dict__.get("_tied_weights_keys") or {}
    return {**module.all_tied_weights_keys, **{t: s for t, s in own.items() if _is_code(s)}}


def _is_code(name: str) -> bool:
    """Return whether the name of a tensor is that of a table's integers, which are buffers."""
    return any(name.rpartition(".")[2] in layer.code_names for layer in KINDS.values())


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def take_place(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return ``new`` in the training mode and with the hooks of ``old``.

    Gradient checkpointing, for example, registers a hook on the embedding.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def materialize_buffers(model: PreTrainedModel, path: str, module: nn.Module, weight: Tensor) -> None:
    """Initialise the buffers of a dense module from the meta device, such as an embedding's scale.

    Args:
        model: the model that will hold the module.
        path: the module's name in it.
        module: the dense module, whose weight is initialised.
        weight: that weight, whose device the buffers take.
    """
    if any(buffer.is_meta for buffer in module.buffers()):
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, torch.empty_like(buffer, device=weight.device))
        # The innermost model initialises its own classes, except the weight, which is marked as done.
        owners = [model.get_submodule(path.rsplit(".", i)[0]) for i in range(1, path.count(".") + 1)]
        owner: Any = next((each for each in owners if hasattr(each, "_init_weights")), model)
        with torch.no_grad():
            owner._init_weights(module)
    module.to(weight.device)


def untie_heads(model: PreTrainedModel, table: ModelTable) -> None:
    """Remove the ties between the embedding and heads that kept the dense table; their tensors now differ."""
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
    # The flag is for all ties of a model and stays while others remain: transformers finds in the checkpoint
    # that the embedding and the head differ, and does not tie them.
    if not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False


def restore_tie(model: PreTrainedModel) -> None:
    """Tie a model on the meta device whose config says that it is not, as PEFT leaves it after a merge."""
    model.config.tie_word_embeddings = True
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def keep_tie(model: PreTrainedModel, state: TableState) -> None:
    """Set ``tie_word_embeddings`` again if the head shares the table and another library cleared the flag."""
    if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
        model.config.tie_word_embeddings = True


def compressed_embedding(model: PreTrainedModel) -> CompressedEmbedding:
    """Return a model's compressed input embedding, or raise ValueError."""
    module = input_embeddings(model)
    if not isinstance(module, CompressedEmbedding):
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    return module


def table_modules(model: nn.Module) -> list[Any]:
    """Return a model's compressed embeddings and heads."""
    return [each for each in model.modules() if isinstance(each, TableModule)]


def table_roots(model: nn.Module) -> dict[str, Any]:
    """Return a module of each compressed table by the table's name, the leading one if it is here."""
    roots: dict[str, Any] = {}
    for module in table_modules(model):
        if module.leads or module.table_name not in roots:
            roots[module.table_name] = module
    return roots


def tables_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return the modules over each compressed table, the leading one first, by the name of that one.

    They are told apart by the tensors that they hold, which also works in a model that consists of models
    which were compressed one by one.
    """
    found: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TableModule):
            shared = getattr(module, module.tensor_names[0])
            found.setdefault(id(shared), []).append((name, module))
    ordered = [sorted(each, key=lambda named: not named[1].leads) for each in found.values()]
    return {each[0][0]: [module for _, module in each] for each in ordered}


def compressed_models(model: PreTrainedModel) -> list[Any]:
    """Return the model and its nested models that have a compressed table or an N-Grammer."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "all_tied_weights_keys")
        and any(isinstance(each, (TableModule, NGrammer)) for each in module.modules())
    ]


def canonical_name(model: PreTrainedModel, name: str) -> str:
    """Return a module's name without the base model's prefix, so that it is the same in the backbone."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def check_places(device_map: Any, sharing: list[str]) -> None:
    """Raise ValueError if modules that share the table are to be on the disk and elsewhere.

    accelerate reads a tensor from the disk for one module, and finds none for another that shares it.
    """
    if not isinstance(device_map, dict):
        return
    places = {}
    for name in sharing:
        known = [key for key in device_map if f"{name}.".startswith(f"{key}." if key else "")]
        if known:
            places[name] = str(device_map[max(known, key=len)])
    if "disk" in places.values() and len(set(places.values())) > 1:
        listed = ", ".join(f"{name!r}: {place!r}" for name, place in places.items())
        raise ValueError(
            f"device_map: expected one place for the modules that share the compressed table, got {listed}; "
            "put all of them on the disk, or none"
        )
