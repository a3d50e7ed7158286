"""The quantizer of transformers that saves and loads models with compressed tables.

``embkern._registration`` registers ``EmbkernConfig`` and ``EmbkernQuantizer`` with transformers. Then::

    model = AutoModel.from_pretrained(dense_checkpoint, quantization_config=EmbkernConfig(ratio=5))
    model.save_pretrained("small"); AutoModel.from_pretrained("small"); model.dequantize()

work as with the quantizers of transformers itself. ``install`` does the same to a live model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..nn import kind_of
from ..nn.base import CompressedHead
from ..nn.table_module import TableModule
from ..recipe import Recipe
from ..tables import Table
from .body_config import QUANT_METHOD, body_of
from .calibrate.choice import choose_calibration
from .checkpoint import (
    check_files,
    holds,
    ignore_guard,
    is_whole,
    scale_of,
    storage_dtype,
    stored_form,
    verify,
    with_guards,
    without_adjustments,
    zero_missing_biases,
)
from .config import EmbkernConfig, TableState, dtype_name
from .find_table import ModelTable, find_table
from .ngrammer_hooks import build_ngrammer, ngrammer_of, verify_ngrammer
from .plan import calibration_serves, check_unseen, plan_tables, tokens_read
from .quantized_body import BodyQuantizer
from .select_tables import table_named
from .shared_tensors import link, of_owners, without_shared_changes
from .static_embeddings import install_bag
from .swap import (
    DenseModules,
    canonical_name,
    check_installable,
    check_places,
    compressed_heads,
    compressed_models,
    head_kind,
    keep_tie,
    materialize_buffers,
    restore_tie,
    swap,
    table_modules,
    table_roots,
    take_place,
    untie_heads,
)
from .table_parts import CORE_OF

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install(
    model: PreTrainedModel,
    table: ModelTable,
    compressed: Table,
    recipe: Recipe,
    *,
    source: str | None = None,
) -> None:
    """Replace a live model's table by a compressed one, in place, so that it is saved with the model.

    Floating-point tensors are cast to the dtype of the model; a packed table is saved in its own dtype.
    Tables that were installed before stay.

    Args:
        model: the model.
        table: what ``find_table``, ``find_tables`` or ``find_bag`` returned for it.
        compressed: the compressed rows of the table.
        recipe: the recipe of the model's compression.
        source: checksum of the dense table, if rows that the compressed one lacks were kept in a file.

    Raises:
        UnsupportedModelError: a head cannot decode through the table's activation. The model is unchanged.
    """
    check_installable(table, recipe)
    if table.role == "bag":
        install_bag(model, compressed)
        return
    own_config(model)
    config = EmbkernConfig(**recipe.model_dump())
    quantizer = _quantizer_of(model, config)
    before = quantizer.quantization_config
    config.table, config.named_tables = before.table, dict(before.named_tables)
    config.ngrammer = before.ngrammer
    kind, head = kind_of(compressed), head_kind(table, recipe)
    scales = {canonical_name(model, name): scale for name, scale in table.scales.items()}
    settings = kind.settings(compressed)
    state = TableState(kind.name, {}, settings, scales, head, "", segments=table.segments, source=source)
    state.describe(compressed)
    if name := "" if table.role == "input" else canonical_name(model, table.root):
        config.named_tables[name] = state
    else:
        config.table = state
    quantizer.quantization_config = config
    live = compressed.to(device=table.weight.device, dtype=table.weight.dtype)
    quantizer.originals.append(swap(model, table, live, bool(compressed_heads(table, recipe)), name))
    if (owner := compressed.facts.get(CORE_OF)) is not None:
        state.shares = {"core_2": model.get_submodule(owner).table_name}
        link(model, config.states)
    adopt(model, quantizer)


def describe_ngrammer(model: PreTrainedModel, described: dict[str, Any] | None) -> None:
    """Note in a model's config that it has an N-Grammer, or none, so that it is saved and loaded with it."""
    own_config(model)
    # A recipe has a size, also that of a model whose tables are dense.
    quantizer = _quantizer_of(model, EmbkernConfig(ratio=1.0))
    quantizer.quantization_config.ngrammer = described
    if described is None and not quantizer.quantization_config.states:
        part_from(model)
    else:
        adopt(model, quantizer)


def _quantizer_of(model: PreTrainedModel, config: EmbkernConfig) -> EmbkernQuantizer:
    """Return the quantizer of a model, or a new one with ``config``, which gets the quantised body."""
    body, quantizer = body_of(model), getattr(model, "hf_quantizer", None)
    config.body = None if body is None else body.quantization_config
    if isinstance(quantizer, EmbkernQuantizer):
        return quantizer
    return EmbkernQuantizer(config, pre_quantized=False, body=body)


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
        module.config.quantization_config = quantizer.quantization_config
        quantizer.mark(module)


def part_from(model: PreTrainedModel, *, but: PreTrainedModel | None = None) -> None:
    """Detach the quantizer from the model and from nested models, except one."""
    for module in model.modules():
        if module is not but and hasattr(module, "all_tied_weights_keys"):
            for owner, attribute in (
                (module, "hf_quantizer"),
                (module, "quantization_method"),
                (module.config, "quantization_config"),
            ):
                owner.__dict__.pop(attribute, None)


class EmbkernQuantizer(BodyQuantizer):
    """Builds the modules of a saved model, or compresses a dense one after its weights are loaded.

    Attributes:
        originals: the dense modules that were replaced, of each table.
        checkpoint_keys: names of the tensors in the checkpoint that is being loaded.
        keeps_adjustment: whether the model is saved with its adjustments apart from the stored tables, so
            that training resumes with the same bits; else the tables are saved with the changes.
    """

    requires_calibration = False
    checkpoint_keys: set[str] | None = None
    keeps_adjustment = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.originals: list[DenseModules] = []

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: Any = None,
        device_map: Any = None,
        **others: Any,
    ) -> PreTrainedModel:
        of_loading = {
            "checkpoint_files": checkpoint_files,
            "dtype": dtype,
            "device_map": device_map,
            **others,
        }
        self.prepare_body(model, **of_loading)
        if not self.stored:
            return model
        states, ngrammer = self.quantization_config.states, self.quantization_config.ngrammer
        if not states and ngrammer is None:
            raise ValueError("quantization_config.table: expected what embkern saved, got nothing")
        for name, state in states.items():
            self._build(model, name, state, checkpoint_files, device_map)
        link(model, states)
        roots = table_roots(model)
        for module in table_modules(model):
            if module is not roots[module.table_name]:
                module.drop_codes()
        if ngrammer is not None:
            build_ngrammer(model, ngrammer, checkpoint_files)
        return model

    def _build(
        self,
        model: PreTrainedModel,
        name: str,
        state: TableState,
        checkpoint_files: list[str] | None,
        device_map: Any,
    ) -> None:
        """Replace the modules of a table by those over the compressed one that ``state`` describes.

        A named table of which the model has no module, such as that of a head in a backbone, is left out.
        """
        skeleton = state.skeleton(torch.float32)
        V, H = skeleton.num_embeddings // state.segments, skeleton.embedding_dim * state.segments
        dense_shape = [V, H]
        untied = getattr(model.config, "tie_word_embeddings", None) is False
        if not name and state.head == "factorized" and untied:
            restore_tie(model)
        table = table_named(model, name, (V, H)) if name else find_table(model)
        if table is None:
            return
        table.segments = state.segments
        skeleton = state.skeleton(table.weight.dtype)
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
            ignore_guard(model, table.root)
            shapes = check_files(model, checkpoint_files, table.root, state)
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
        check_places(device_map, sharing)
        self.originals.append(swap(model, table, skeleton, state.head != "dense", name))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        config = self.quantization_config
        self.finish_body(model, **others)
        if self.stored:
            link(model, config.states)
            roots = table_roots(model)
            for root in roots.values():
                root.cast_to_held()
            for module in table_modules(model):
                module.share_codes(roots[module.table_name])
            for name, root in roots.items():
                verify(root, config.states[name])
            if self.checkpoint_keys is not None:
                zero_missing_biases(model, self.checkpoint_keys)
                self.checkpoint_keys = None
            if config.ngrammer is not None:
                verify_ngrammer(model, config.ngrammer)
            adopt(model, self)
        else:
            plans = plan_tables(model, config.recipe)
            # There is no tokenizer here, so that only the model itself can tell how often tokens are read.
            recipe, given = config.recipe, config.recipe.calibration is not None
            check_unseen(plans, known=given)
            serves = calibration_serves(plans, asked=given or bool(recipe.calibrate))
            calibration = choose_calibration(model, recipe).calibration if serves else None
            for plan in plans:
                read = tokens_read(None, calibration, model)
                compressed = plan.compress(plan.knowledge(None, calibration, read))
                install(model, plan.table, compressed, recipe)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        """Update the description of the tables, which may have been trained, and return tensors to save.

        Returns:
            A state dict, which has each table with its changes in the stored dtype, and the metadata of the
            body's tensors.
        """
        roots, states = table_roots(model), self.quantization_config.states
        if (layer := ngrammer_of(model)) is not None:
            self.quantization_config.ngrammer = layer.description()
        if "" in roots:
            keep_tie(model, states[""])
        state_dict = with_guards(model.state_dict(), model)
        if self.keeps_adjustment:
            kept = without_adjustments(state_dict, model, keep=roots.values())
            return self.with_body(without_shared_changes(kept, model), model)
        saved = of_owners({n: _saved_tensors(root, states[n]) for n, root in roots.items()}, states)
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, TableModule):
                for tensor, value in saved[module.table_name].items():
                    if getattr(module, tensor) is getattr(roots[module.table_name], tensor):  # tied
                        state_dict[f"{path}.{tensor}"] = value
        return self.with_body(without_adjustments(state_dict, model), model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put the dense modules back with the decoded tables, in the dtype of the live ones.

        ``dtype`` is the config's, which may be out of date, and is ignored.
        """
        if self.quantization_config.ngrammer is not None:
            raise ValueError(
                "model: its N-Grammer has no place in a dense model; disable_ngrammer(model) removes it"
            )
        assert self.originals, "the quantizer is attached to models whose modules it replaced"
        for root in table_roots(model).values():
            if any(tensor.is_meta for tensor in root.tensors().values()):
                raise ValueError(
                    "model: its table is offloaded; load it without a device_map to dequantize it"
                )
        part_from(model, but=model)  # transformers detaches it from the model itself
        for original in reversed(self.originals):
            self._put_back(model, original)
        self.originals = []
        return model

    def _put_back(self, model: PreTrainedModel, original: DenseModules) -> None:
        """Put the dense modules of a table back, and the ties that the model had before."""
        table, root = original.table, model.get_submodule(original.table.root)
        state = self.quantization_config.states[root.table_name]
        weight = nn.Parameter(root.weight.detach().clone(), requires_grad=original.trained)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
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
        if table.role == "input":
            keep_tie(model, state)
        if table.tied and state.head == "dense":
            untie_heads(model, table)


def _saved_tensors(root: TableModule, state: TableState) -> dict[str, Tensor]:
    """Return the tensors of a table, with its changes, as they are saved, and describe them in ``state``."""
    if is_whole(root, state):
        stored = stored_form(root, state)
        state.describe(stored)
        return stored.tensors()
    # Offloaded or sharded tensors have no checksums, and are not verified when they are loaded.
    state.dtype, state.checksums = dtype_name(storage_dtype(root, state)), {}
    return root.tensors()


# These replace what the registration at the import of embkern or torch left for them.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = EmbkernConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = EmbkernQuantizer
