"""The quantizer of transformers that saves and loads models with a compressed table.

``EmbkernConfig`` and ``EmbkernQuantizer`` are registered with transformers when embkern is imported, or when
transformers is, if that comes later. Then::

    model = AutoModel.from_pretrained(dense_checkpoint, quantization_config=EmbkernConfig(ratio=5))
    model.save_pretrained("small"); AutoModel.from_pretrained("small"); model.dequantize()

work as with the quantizers of transformers itself. ``install`` does the same to a live model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..nn import layer_of
from ..nn.base import CompressedEmbedding, CompressedHead
from ..recipe import Recipe
from ..tables import Table
from ..text.prior import vocabulary_prior
from .calibrate.choice import choose_calibration
from .checkpoint import (
    check_files,
    holds,
    is_whole,
    scale_of,
    storage_dtype,
    stored_table,
    verify,
    zero_missing_biases,
)
from .config import EmbkernConfig, TableState, dtype_name
from .find_table import ModelTable, find_table
from .swap import (
    DenseModules,
    canonical_name,
    check_installable,
    compressed_embedding,
    compressed_models,
    keep_tie,
    materialize_buffers,
    modules_of_table,
    restore_tie,
    swap,
    take_place,
    untie_heads,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install(model: PreTrainedModel, table: ModelTable, compressed: Table, recipe: Recipe) -> None:
    """Replace a live model's table by a compressed one, in place, so that it is saved with the model.

    Floating-point tensors are cast to the dtype of the model; a packed table is saved in its own dtype.

    Args:
        model: the model.
        table: what ``find_table`` returned for it.
        compressed: the compressed table.
        recipe: the recipe that made it.

    Raises:
        UnsupportedModelError: a tied head cannot decode through the table's activation. The model is
            unchanged.
    """
    check_installable(table, recipe)
    head = recipe.lm_head if table.tied else None if table.output_head is None else "dense"
    own_config(model)
    config = EmbkernConfig(**recipe.model_dump())
    layer = layer_of(compressed)
    scales = {canonical_name(model, name): scale for name, scale in table.scales.items()}
    config.table = TableState(layer.kind, {}, layer.settings(compressed), scales, head, "")
    config.table.describe(compressed)
    quantizer = getattr(model, "hf_quantizer", None) or EmbkernQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config
    live = compressed.to(device=table.weight.device, dtype=table.weight.dtype)
    quantizer.original = swap(model, table, live, head == "factorized")
    adopt(model, quantizer)


def own_config(model: PreTrainedModel) -> None:
    """Copy the model's config, which another model may share, before it is changed."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) in copies:
            module.config = copies[id(config)]


def adopt(model: PreTrainedModel, quantizer: EmbkernQuantizer) -> None:
    """Attach the quantizer to the model and to nested models, which may be saved alone."""
    for module in compressed_models(model):
        module.hf_quantizer = quantizer
        module.quantization_method = quantizer.quantization_config.quant_method
        module.config.quantization_config = quantizer.quantization_config
        # While this is True, transformers refuses .half(), .float() and Trainer, which all work here.
        module.is_quantized = False


class EmbkernQuantizer(HfQuantizer):
    """Builds the modules of a saved model, or compresses a dense one after its weights are loaded.

    Attributes:
        original: the dense modules that were replaced.
        checkpoint_keys: names of the tensors in the checkpoint that is being loaded.
    """

    requires_calibration = False
    original: DenseModules | None = None
    checkpoint_keys: set[str] | None = None

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: Any = None,
        device_map: Any = None,
        **_: Any,
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            return model
        state = self.quantization_config.table
        if state is None:
            raise ValueError("quantization_config.table: expected what embkern saved, got nothing")
        if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
            restore_tie(model)
        table = find_table(model)
        skeleton = state.skeleton(table.weight.dtype)
        dense_shape = [skeleton.num_embeddings, skeleton.embedding_dim]
        if list(table.weight.shape) != dense_shape:
            raise ValueError(
                f"quantization_config.table: describes {' x '.join(map(str, dense_shape))}, "
                f"the model's config says {' x '.join(map(str, table.weight.shape))}"
            )
        activation = state.settings.get("activation")
        if activation is not None and state.head != "dense" and table.tied:
            raise ValueError(
                f"{type(model).__name__} has a tied head, which cannot decode through the saved table's "
                f"activation {activation!r}; load the backbone, or export the model to dense"
            )
        if checkpoint_files:
            shapes = check_files(checkpoint_files, table.root, state)
            keys = set(shapes)
            # An embedding that the class ties, but that is dense in the checkpoint, was not tied when saved.
            table.embeddings = [
                name for name in table.embeddings if not holds(keys, f"{canonical_name(model, name)}.weight")
            ]
            # The head is found by its shape, as architectures rename its weight when saving.
            if state.head == "dense" and table.tied and dense_shape not in shapes.values():
                raise ValueError(
                    f"the checkpoint does not hold {table.output_head}.weight, a dense head by its config"
                )
            self.checkpoint_keys = keys
        table.scales = {name: scale_of(state, canonical_name(model, name)) for name in table.embeddings}
        sharing = table.embeddings if state.head == "dense" else [*table.embeddings, *table.heads]
        _check_places(device_map, sharing)
        self.original = swap(model, table, skeleton, compress_heads=state.head != "dense")
        for follower in modules_of_table(model):
            if follower is not compressed_embedding(model):
                follower.drop_codes()
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            root = compressed_embedding(model)
            root.cast_to_held()
            for follower in modules_of_table(model):
                follower.share_codes(root)
            verify(root, config.table)
            if self.checkpoint_keys is not None:
                zero_missing_biases(model, self.checkpoint_keys)
                self.checkpoint_keys = None
            adopt(model, self)
        else:
            table = find_table(model)
            check_installable(table, config.recipe)
            weight = table.weight.detach()
            # There is no tokenizer here, so that only the model itself can tell how often tokens are read.
            calibration = choose_calibration(model, config.recipe)[0]
            counts = None if calibration else vocabulary_prior(None, len(weight))
            compressed = config.recipe.factorize(weight, counts, calibration=calibration, tied=table.tied)
            install(model, table, compressed, config.recipe)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """Update the description of the table, which may have been trained, and return tensors to save.

        Returns:
            A state dict with the table in its stored dtypes, or None where the live ones are the same; then
            transformers saves the live weights. The second value is the metadata, which is empty.
        """
        root, state = compressed_embedding(model), self.quantization_config.table
        keep_tie(model, state)
        # Offloaded or sharded tensors have no checksums, and are not verified when they are loaded.
        if not is_whole(root, state):
            state.dtype, state.checksums = dtype_name(storage_dtype(root, state)), {}
            return None, {}
        stored = stored_table(model)
        state.describe(stored)
        live = root.tensors()
        if all(tensor.dtype == live[name].dtype for name, tensor in stored.tensors().items()):
            return None, {}
        state_dict = model.state_dict()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, (CompressedEmbedding, CompressedHead)):
                for tensor, value in stored.tensors().items():
                    if getattr(module, tensor) is getattr(root, tensor):  # tied
                        state_dict[f"{name}.{tensor}"] = value
        return state_dict, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put the dense modules back with the decoded table, in the dtype of the live one.

        ``dtype`` is the config's, which may be out of date, and is ignored.
        """
        assert self.original is not None, "the quantizer is attached to models whose modules it replaced"
        original, table, state = self.original, self.original.table, self.quantization_config.table
        root = compressed_embedding(model)
        if any(tensor.is_meta for tensor in root.tensors().values()):
            raise ValueError("model: its table is offloaded; load it without a device_map to dequantize it")
        trained = any(parameter.requires_grad for parameter in root.parameters())
        weight = nn.Parameter(root.weight.detach(), requires_grad=trained)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        for nested in compressed_models(model):
            if nested is not model:  # transformers removes them from the model itself
                for owner, attribute in (
                    (nested, "hf_quantizer"),
                    (nested, "quantization_method"),
                    (nested.config, "quantization_config"),
                ):
                    owner.__dict__.pop(attribute, None)
        for name, dense in original.modules.items():
            current = model.get_submodule(name)
            dense.weight = weight
            if isinstance(current, CompressedHead) and current.bias is not None:
                dense.bias = current.bias
            materialize_buffers(model, name, dense, weight)
            model.set_submodule(name, take_place(dense, current))
        for prefix, (instance_ties, all_ties) in original.ties.items():
            module = model.get_submodule(prefix)
            module.__dict__.pop("_tied_weights_keys", None)
            if instance_ties is not None:
                module._tied_weights_keys = instance_ties
            module.all_tied_weights_keys = all_ties
        keep_tie(model, state)
        if table.tied and state.head == "dense":
            untie_heads(model, table)
        self.original = None
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: the table's tensors are ordinary parameters and buffers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: all floating-point tensors of a compressed table are trainable."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: Trainer may train the compressed model without an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile traces the lookup without graph breaks."""
        return True


def _check_places(device_map: Any, sharing: list[str]) -> None:
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


register_quantization_config("embkern")(EmbkernConfig)
register_quantizer("embkern")(EmbkernQuantizer)
