"""N-Grammers in models: the hooks that call them and tell them the preceding tokens, and their loading."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..io.tensor_format import verify_checksums
from ..nn import NGrammer
from ..nn.ngrammer import CHECKED, NO_TOKEN, shifted
from .checkpoint import stored_tensors
from .find_table import input_embeddings, input_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ngrammer"  # of the module in the embedding
PRECEDING = "preceding_ids"


def ngrammer_of(model: Any) -> NGrammer | None:
    """Return the N-Grammer of a model's input embedding, or None."""
    embedding = input_or_none(model)
    within = () if embedding is None else embedding.modules()  # an adapter wraps the embedding
    return next((each for each in within if isinstance(each, NGrammer)), None)


def build_ngrammer(model: PreTrainedModel, described: dict[str, Any], files: list[str] | None) -> None:
    """Attach an N-Grammer without values to a model that is being loaded.

    Raises:
        ValueError: the files do not hold its tensors, or the model has another vocabulary.
    """
    layer = NGrammer.from_description(described, device="meta")
    embedding: Any = input_embeddings(model)
    got = embedding.num_embeddings, embedding.embedding_dim
    if got != (layer.num_embeddings, layer.embedding_dim):
        raise ValueError(
            f"quantization_config.ngrammer: describes {layer.num_embeddings} x {layer.embedding_dim}, "
            f"the model has {got[0]} x {got[1]}"
        )
    if files:
        stored = {key: shape for path in files for key, (shape, _) in stored_tensors(path).items()}
        for name, tensor in layer.state_dict().items():
            end, shape = f".{NAME}.{name}", list(tensor.shape)
            if not any(f".{key}".endswith(end) and found == shape for key, found in stored.items()):
                raise ValueError(
                    "the checkpoint does not hold the N-Grammer its config describes: expected "
                    f"{NAME}.{name} of shape {shape}"
                )
    hook(model, layer)


def verify_ngrammer(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Raise ValueError if the integers of a loaded N-Grammer differ from the saved ones."""
    layer = ngrammer_of(model)
    assert layer is not None
    tensors = {name: getattr(layer, name) for name in CHECKED}
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    try:
        verify_checksums(tensors, described.get("checksums", {}))
        layer.validate()
    except ValueError as error:
        raise ValueError(f"the saved N-Grammer is damaged: {error}") from None


def hook(model: PreTrainedModel, layer: NGrammer) -> None:
    """Make a layer a submodule of the input embedding, and register the hooks that call it."""
    embedding: Any = input_embeddings(model)
    embedding.add_module(NAME, layer)
    embedding.register_forward_hook(_add, with_kwargs=True)
    outer = _path_to(model, embedding)
    for module in outer:
        module.register_forward_pre_hook(_take_preceding, with_kwargs=True)
        module.register_forward_hook(_forget, always_call=True)
        if hasattr(module, "prepare_inputs_for_generation"):
            module.prepare_inputs_for_generation = types.MethodType(_prepare_inputs, module)
    outer[-1].register_forward_pre_hook(_locate, with_kwargs=True)


def unhook(model: PreTrainedModel) -> None:
    """Remove the N-Grammer of the input embedding, and its hooks."""
    embedding: Any = input_embeddings(model)
    delattr(embedding, NAME)
    for module in (embedding, *_path_to(model, embedding)):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, each in hooks.items() if each in _HOOKS]:
                hooks.pop(key)
                for kind in ("hooks_with_kwargs", "hooks_always_called", "pre_hooks_with_kwargs"):
                    getattr(module, f"_forward_{kind}").pop(key, None)
        module.__dict__.pop("prepare_inputs_for_generation", None)


def _path_to(model: PreTrainedModel, embedding: nn.Module) -> list[Any]:
    """Return the model and the models in it that hold the embedding, the innermost last."""
    found = [
        module
        for module in model.modules()
        if hasattr(module, "all_tied_weights_keys") and any(each is embedding for each in module.modules())
    ]
    return sorted(found, key=lambda module: -sum(1 for _ in module.modules()))


def _prepare_inputs(self: Any, input_ids: Tensor, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Prepare the inputs of a step of ``generate`` as the class does, with all ids so far beside the last."""
    if inputs_embeds is not None:
        kwargs["inputs_embeds"] = inputs_embeds
    inputs: dict[str, Any] = type(self).prepare_inputs_for_generation(self, input_ids, **kwargs)
    if ngrammer_of(self) is not None and inputs.get("input_ids") is not None:
        mask = kwargs.get("attention_mask")
        inputs[PRECEDING] = _masked(input_ids, mask)
    return inputs


def _take_preceding(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note the ids that were passed as ``preceding_ids``, which the model's forward does not take."""
    if PRECEDING not in kwargs:
        return None
    given = {name: value for name, value in kwargs.items() if name != PRECEDING}
    layer = ngrammer_of(module)
    if layer is not None:
        layer.previous = kwargs[PRECEDING]
    return args, given


def _locate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Find the ids that precede each of those that the model is about to look up."""
    layer = ngrammer_of(module)
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    ids, preceding = given.get("input_ids"), None if layer is None else layer.previous
    if layer is None or ids is None:
        return
    length = ids.shape[-1]
    if preceding is not None and not (
        isinstance(preceding, Tensor)
        and preceding.shape[:-1] == ids.shape[:-1]
        and preceding.shape[-1] >= length
    ):
        shape = tuple(preceding.shape) if isinstance(preceding, Tensor) else preceding
        raise ValueError(
            f"{PRECEDING}: expected all ids so far, which end with input_ids of shape {tuple(ids.shape)}, "
            f"got {shape}"
        )
    whole = _masked(ids, given.get("attention_mask")) if preceding is None else preceding
    if whole.shape[-1] == length and _cached(given.get("past_key_values")):
        raise ValueError(
            f"{PRECEDING}: the N-Grammer needs the token before those in input_ids, which are in the cache; "
            f"pass all ids so far, model(ids[:, -n:], past_key_values=cache, {PRECEDING}=ids), and "
            "without prefill_chunk_size"
        )
    layer.previous = shifted(whole)[..., -length:]


def _cached(cache: Any) -> bool:
    """Return whether a cache has tokens."""
    return cache is not None and int(cache.get_seq_length()) > 0


def _masked(ids: Tensor, mask: Any) -> Tensor:
    """Return the ids with -1 where a mask of their shape is 0; other masks leave out none."""
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return ids.masked_fill(mask.to(ids.device) == 0, NO_TOKEN)
    return ids


def _add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Tensor:
    """Add to the rows that an embedding looked up."""
    ids: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["ids"]
    layer: NGrammer = module.ngrammer
    added: Tensor = layer(ids, rows, layer.previous)
    return added


def _forget(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forget the preceding ids at the end of a forward."""
    if (layer := ngrammer_of(module)) is not None:
        layer.previous = None


_HOOKS = (_add, _take_preceding, _locate, _forget)
