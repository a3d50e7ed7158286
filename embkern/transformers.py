"""The transformers integration: swap a compressed table into a model, save it, load it like any other.

``EmbkernConfig`` and ``EmbkernQuantizer`` are registered with transformers when embkern is imported (or
when transformers is, if that comes later). Then::

    model = AutoModel.from_pretrained(dense_checkpoint, quantization_config=EmbkernConfig(ratio=5))
    model.save_pretrained("small"); AutoModel.from_pretrained("small"); model.dequantize()

work as for every quantiser of transformers' own. ``install`` does the same to a live model.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .frequencies import vocabulary_prior
from .layer import KINDS, CompressedEmbedding, CompressedHead, Table, layer_of
from .methods import METHODS
from .model_table import ModelTable, UnsupportedModelError, find_table, input_embeddings
from .ops.backends import DTYPES
from .recipe import DEFAULT_METHOD, LMHead, Recipe
from .resizing import resized
from .table_file import DTYPES as FLOAT_DTYPES
from .tensor_file import checksum, verify_checksums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 2
_VERSIONS = (1, 2)  # that are read; the first has no checksum of the description


@dataclass
class TableState:
    """What a saved model's config says of its table: enough to build the modules before weights come.

    Attributes:
        kind: ``factors`` or ``packed``.
        shapes: of the table's tensors.
        settings: what the table is made of besides its tensors.
        scales: constant factor of each embedding module's output.
        head: ``factorized`` (over the same table), ``dense``, or None.
        dtype: of the stored floating-point tensors.
        checksums: of the stored tensors.
    """

    kind: str
    shapes: dict[str, list[int]]
    settings: dict[str, Any]
    scales: dict[str, float]
    head: str | None
    dtype: str
    checksums: dict[str, str] = field(default_factory=dict)

    def describe(self, table: Table) -> None:
        """Describe a table as it is stored."""
        self.shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
        self.dtype = _dtype_name(table.dtype)
        self.checksums = {name: checksum(tensor) for name, tensor in table.tensors().items()}

    @property
    def stored_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return getattr(torch, self.dtype)

    def skeleton(self, dtype: torch.dtype) -> Table:
        """Return the table without its data, on the meta device."""
        layer = KINDS[self.kind]
        tensors: dict[str, Any] = {
            name: torch.empty(shape, dtype=layer.code_dtypes.get(name, dtype), device="meta")
            for name, shape in self.shapes.items()
        }
        return layer.table_type(**tensors, **self.settings)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class EmbkernConfig(QuantizationConfigMixin):
    """Quantisation config of transformers for a compressed embedding table.

    Args:
        method, ratio, rank, lm_head, options: as in ``embkern.Recipe``. A model that is compressed while it
            is loaded has no tokenizer at hand: methods that weigh rows by how often tokens are read go by
            the order of the ids. ``embkern.compress`` counts text.
        table, checksum: written by embkern when a model is compressed; not for callers.

    Raises:
        ValueError: a field is unknown, out of range, or damaged.
    """

    def __init__(
        self,
        method: str = DEFAULT_METHOD,
        ratio: float | None = None,
        rank: int | None = None,
        lm_head: LMHead = "factorized",
        options: dict[str, Any] | None = None,
        table: dict[str, Any] | None = None,
        quant_method: str = "embkern",
        format_version: int = FORMAT_VERSION,
        checksum: str | None = None,
        **unknown: Any,
    ) -> None:
        if quant_method != "embkern":
            raise ValueError(f"quantization_config: expected quant_method 'embkern', got {quant_method!r}")
        if type(format_version) is not int or format_version not in _VERSIONS:
            raise ValueError(
                f"quantization_config.format_version: expected {' or '.join(map(str, _VERSIONS))}, "
                f"got {format_version!r}; install the embkern that wrote the model, or a newer one"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown field(s) {', '.join(sorted(unknown))}")
        self.quant_method = quant_method
        self.format_version = FORMAT_VERSION  # it is saved as
        self.recipe = Recipe.parse(
            method=method, ratio=ratio, rank=rank, lm_head=lm_head, options=options or {}
        )
        self.table = None if table is None else _parse_state(table)
        if table is not None and (checksum is not None or format_version > 1):
            described = {
                "method": method,
                "ratio": ratio,
                "rank": rank,
                "lm_head": lm_head,
                "options": options,
            }
            if (got := _checksum_of({**described, "table": table})) != checksum:
                raise ValueError(
                    f"quantization_config was changed after it was saved (expected {checksum}, got {got}); "
                    "config.json is damaged or edited"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as in ``config.json``."""
        described = {
            **self.recipe.model_dump(),
            "table": None if self.table is None else asdict(self.table),
        }
        form = {"quant_method": self.quant_method, "format_version": self.format_version, **described}
        return form if self.table is None else {**form, "checksum": _checksum_of(described)}


def check_config(directory: str | os.PathLike) -> None:
    """Raise ValueError if what a model directory's config says of a compressed table is damaged.

    transformers prints a config before anyone parses it, and fails there at what it does not expect.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("quantization_config") if isinstance(described, dict) else None
        if isinstance(described, dict) and described.get("quant_method") == "embkern":
            EmbkernConfig(**described)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: nested too deep") from error


def _checksum_of(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, default=str)
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _parse_state(table: dict[str, Any]) -> TableState:
    try:
        state = TableState(**(_of_first_models(**table) if "rank" in table else table))
        if state.head not in (None, "factorized", "dense"):
            raise ValueError(f"head: expected factorized, dense or null, got {state.head!r}")
        dtype = next((each for each in DTYPES if _dtype_name(each) == state.dtype), None)
        if dtype is None:
            known = ", ".join(map(_dtype_name, DTYPES))
            raise ValueError(f"dtype: expected a floating-point torch dtype ({known}), got {state.dtype!r}")
        if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in state.scales.values()):
            raise ValueError(f"scales: expected finite numbers, got {state.scales!r}")
        if state.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {state.kind!r}")
        for name, shape in state.shapes.items():
            if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f"shapes: expected positive integers, got {shape} of {name}")
            if len(shape) > 2 or math.prod(shape) >= 2**60:
                raise ValueError(f"shapes: expected those of a vector or a matrix, got {shape} of {name}")
        texts = all(type(value) is str for value in state.checksums.values())
        if not set(state.checksums) <= set(state.shapes) or not texts:
            raise ValueError(
                f"checksums: expected them of {', '.join(state.shapes)}, got {state.checksums!r}"
            )
        state.skeleton(dtype)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"quantization_config.table is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError("quantization_config.table is damaged: nested too deep") from error
    return state


def _of_first_models(
    num_embeddings: int, embedding_dim: int, rank: int, offset: bool, activation: str | None, **common: Any
) -> dict[str, Any]:
    """Return the fields of TableState for a config from before there were kinds of tables."""
    shapes = {"codes": [num_embeddings, rank], "basis": [rank, embedding_dim]}
    if offset:
        shapes["offset"] = [embedding_dim]
    return {"kind": "factors", "shapes": shapes, "settings": {"activation": activation}, **common}


def check_installable(table: ModelTable, recipe: Recipe) -> None:
    """Raise UnsupportedModelError if the recipe's result could not serve the model.

    Called before a method runs, which may take minutes.
    """
    if not METHODS[recipe.method].installable:
        known = ", ".join(name for name, method in METHODS.items() if method.installable)
        raise UnsupportedModelError(
            f"method: {recipe.method!r} makes tables to compare with, which no model can hold; "
            f"expected one of {known}"
        )
    activation = recipe.options.get("activation")
    if activation is not None and table.tied and recipe.lm_head == "factorized":
        raise UnsupportedModelError(
            f"lm_head: a tied head cannot decode through activation {activation!r}; "
            "use lm_head='dense' or the linear autoencoder"
        )


def install(model: PreTrainedModel, table: ModelTable, compressed: Table, recipe: Recipe) -> None:
    """Replace a live model's table by a compressed one, in place, and make the model save and load with it.

    Floating-point tensors take the dtype of the model; what is saved of a packed table keeps the dtype it has
    here.

    Raises:
        UnsupportedModelError: a tied head is asked to decode through an activation. The model is unchanged.
    """
    check_installable(table, recipe)
    head = recipe.lm_head if table.tied else None if table.output_head is None else "dense"
    _own_config(model)
    config = EmbkernConfig(**recipe.model_dump())
    layer = layer_of(compressed)
    scales = {_canonical(model, name): scale for name, scale in table.scales.items()}
    config.table = TableState(layer.kind, {}, layer.settings(compressed), scales, head, "")
    config.table.describe(compressed)
    quantizer = getattr(model, "hf_quantizer", None) or EmbkernQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config
    live = compressed.to(device=table.weight.device, dtype=table.weight.dtype)
    quantizer.original = _swap(model, table, live, head == "factorized")
    _adopt(model, quantizer)


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a config of its own: what is written into it must not reach a model that shares it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) in copies:
            module.config = copies[id(config)]


def _adopt(model: PreTrainedModel, quantizer: EmbkernQuantizer) -> None:
    """Make the model, and nested ones that may be saved alone, save through the quantizer."""
    for module in _compressed_models(model):
        module.hf_quantizer = quantizer
        module.quantization_method = quantizer.quantization_config.quant_method
        module.config.quantization_config = quantizer.quantization_config
        # transformers refuses .half(), .float() and Trainer while this is set; parameters train like any.
        module.is_quantized = False


def _compressed_models(model: PreTrainedModel) -> list[Any]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "all_tied_weights_keys")
        and any(isinstance(each, CompressedEmbedding) for each in module.modules())
    ]


@dataclass
class _Original:
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


def _take_place(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return ``new`` in the mode and with the hooks of ``old``."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def _swap(model: PreTrainedModel, table: ModelTable, compressed: Table, compress_heads: bool) -> _Original:
    heads = table.heads if compress_heads else []
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in [*table.embeddings, *heads]}
    original = _Original(modules, {}, table)
    swapped: dict[int, CompressedEmbedding] = {}
    for name in table.embeddings:
        dense = modules[name]
        layer = swapped.get(id(dense))
        if layer is None:
            kind = layer_of(compressed)
            layer = kind.from_table(compressed, padding_idx=dense.padding_idx, scale=table.scales[name])
            layer.share(next(iter(swapped.values()), layer))
            swapped[id(dense)] = layer
        model.set_submodule(name, _take_place(layer, dense))
    root = swapped[id(modules[table.root])]
    for parameter in root.parameters():
        parameter.requires_grad_(table.weight.requires_grad)
    for name in heads:
        model.set_submodule(name, _take_place(root.head(modules[name].bias), modules[name]))
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


def _canonical(model: PreTrainedModel, name: str) -> str:
    """Name of a module without the base model's prefix, which differs between a model and its backbone."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


class EmbkernQuantizer(HfQuantizer):
    """Builds the modules of a saved model, or compresses a dense one after its weights are loaded."""

    requires_calibration = False
    original: _Original | None = None
    checkpoint_keys: set[str] | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, dtype: Any = None, **_: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            return model
        state = self.quantization_config.table
        if state is None:
            raise ValueError("quantization_config.table: expected what embkern saved, got nothing")
        if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
            _restore_tie(model)
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
            shapes = _check_files(checkpoint_files, table.root, state)
            keys = set(shapes)
            # A module that the class ties but the checkpoint holds densely was its own table when saved.
            table.embeddings = [
                name for name in table.embeddings if not _holds(keys, f"{_canonical(model, name)}.weight")
            ]
            # By its shape: architectures rename a head's weight on the way to the file.
            if state.head == "dense" and table.tied and dense_shape not in shapes.values():
                raise ValueError(
                    f"the checkpoint does not hold {table.output_head}.weight, a dense head by its config"
                )
            self.checkpoint_keys = keys
        table.scales = {name: _scale_of(state, _canonical(model, name)) for name in table.embeddings}
        self.original = _swap(model, table, skeleton, compress_heads=state.head != "dense")
        for follower in _over_the_table(model):
            if follower is not _compressed(model):
                follower.drop_codes()
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            root = _compressed(model)
            for follower in _over_the_table(model):
                follower.share_codes(root)
            _verify(root, config.table)
            if self.checkpoint_keys is not None:
                _zero_missing_biases(model, self.checkpoint_keys)
                self.checkpoint_keys = None
            _adopt(model, self)
        else:
            table = find_table(model)
            check_installable(table, config.recipe)
            weight = table.weight.detach()
            counts = vocabulary_prior(None, len(weight))  # no tokenizer is at hand
            install(model, table, config.recipe.factorize(weight, counts), config.recipe)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """Bring the saved description up to date, as the table may have been trained since, and cast it.

        transformers saves the live weights after this, whatever ``state_dict`` its caller passed.
        """
        root, state = _compressed(model), self.quantization_config.table
        _keep_tie(model, state)
        # Offloaded or sharded parameters are not whole here; without a checksum nothing is verified on load.
        if not _is_whole(root, state):
            state.dtype, state.checksums = _dtype_name(_storage_dtype(root, state)), {}
            return None, {}
        stored = stored_table(model)
        state.describe(stored)
        if stored.dtype == root.dtype:
            return None, {}
        state_dict = model.state_dict()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, (CompressedEmbedding, CompressedHead)):
                for tensor, value in stored.tensors().items():
                    if getattr(module, tensor) is getattr(
                        root, tensor
                    ):  # one tensor, as transformers ties it
                        state_dict[f"{name}.{tensor}"] = value
        return state_dict, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Decode the table, in its own dtype: transformers passes the config's, which may be stale."""
        assert self.original is not None, "a model with this quantizer was swapped by it"
        original, table, state = self.original, self.original.table, self.quantization_config.table
        root = _compressed(model)
        if any(tensor.is_meta for tensor in root.tensors().values()):
            raise ValueError("model: its table is offloaded; load it without a device_map to dequantize it")
        trained = any(parameter.requires_grad for parameter in root.parameters())
        weight = nn.Parameter(root.weight.detach(), requires_grad=trained)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        for nested in _compressed_models(model):
            if nested is not model:  # transformers takes them from the model itself
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
            _materialize_buffers(model, name, dense, weight)
            model.set_submodule(name, _take_place(dense, current))
        for prefix, (instance_ties, all_ties) in original.ties.items():
            module = model.get_submodule(prefix)
            module.__dict__.pop("_tied_weights_keys", None)
            if instance_ties is not None:
                module._tied_weights_keys = instance_ties
            module.all_tied_weights_keys = all_ties
        _keep_tie(model, state)
        if table.tied and state.head == "dense":
            _untie_heads(model, table)
        self.original = None
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """The table's tensors are ordinary parameters and buffers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors train like any parameter, and of a packed table what is not codes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer may train the compressed model without an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The lookup traces under torch.compile without graph breaks."""
        return True


def _restore_tie(model: PreTrainedModel) -> None:
    """Tie a skeleton again whose flag was cleared: merging an adapter does, as it looks at dense weights."""
    model.config.tie_word_embeddings = True
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def _keep_tie(model: PreTrainedModel, state: TableState) -> None:
    """Set the flag that says the head is tied where it still shares the table, and something cleared it."""
    if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
        model.config.tie_word_embeddings = True


def _holds(keys: set[str], name: str) -> bool:
    """Whether a checkpoint has a name, with whatever prefix its model puts before it."""
    return any(f".{key}".endswith(f".{name}") for key in keys)


def _zero_missing_biases(model: PreTrainedModel, keys: set[str]) -> None:
    """Initialise the bias of a head that the checkpoint, saved from a backbone, does not have."""
    for head in model.modules():
        if not isinstance(head, CompressedHead) or head.bias is None:
            continue
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is head.bias]
        if not any(_holds(keys, _canonical(model, name)) for name in names):
            nn.init.zeros_(head.bias)


def _compressed(model: PreTrainedModel) -> CompressedEmbedding:
    module = input_embeddings(model)
    if not isinstance(module, CompressedEmbedding):
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    return module


def _over_the_table(model: PreTrainedModel) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, (CompressedEmbedding, CompressedHead))]


def _is_whole(root: CompressedEmbedding, state: TableState) -> bool:
    tensors = root.tensors()
    return all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values()) and all(
        list(tensor.shape) == state.shapes[name] for name, tensor in tensors.items()
    )


def _storage_dtype(root: CompressedEmbedding, state: TableState) -> torch.dtype:
    """Return the dtype to save in: a packed table keeps the one it has on disk while the model's is wider."""
    widened = torch.promote_types(root.dtype, state.stored_dtype) == root.dtype
    return state.stored_dtype if root.keeps_stored_dtype and widened else root.dtype


def stored_table(model: PreTrainedModel) -> Table:
    """Return a compressed model's table as it is stored: floating-point tensors in the dtype on disk.

    Raises:
        ValueError: the model is not compressed by embkern, or was trained to values beyond that dtype.
    """
    root = _compressed(model)
    dtype = _storage_dtype(root, model.hf_quantizer.quantization_config.table)
    table = root.table.to(dtype=dtype)
    for name, live in root.tensors().items():
        stored = table.tensors()[name]
        if dtype != root.dtype and not torch.equal(stored.isfinite(), live.isfinite()):
            raise ValueError(f"{name}: expected values within {dtype}, in which they are stored, got beyond")
    return table


def _verify(root: CompressedEmbedding, state: TableState) -> None:
    """Raise ValueError if a loaded table is not the one that was saved, or cannot be decoded."""
    if not _is_whole(root, state):
        return
    tensors = root.tensors()
    if torch.promote_types(root.dtype, state.stored_dtype) == root.dtype:  # else the cast lost digits
        tensors = {n: t.to(state.stored_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    known = {name: value for name, value in state.checksums.items() if name in tensors}
    try:
        verify_checksums(tensors, known)
        _ = root.table
    except ValueError as error:
        raise ValueError(f"the saved embedding is damaged: {error}") from error


def _scale_of(state: TableState, name: str) -> float:
    if name in state.scales:
        return float(state.scales[name])
    if len(distinct := set(state.scales.values())) == 1:
        return float(distinct.pop())
    raise ValueError(f"quantization_config.table.scales: no entry for {name}, only {sorted(state.scales)}")


def _check_files(files: list[str], root: str, state: TableState) -> dict[str, list[int]]:
    """Return the names and shapes in a checkpoint; raise if it lacks the table's tensors.

    transformers would only log that they are missing and go on with random ones.
    """
    leaf = root.rpartition(".")[2]
    layer, found = KINDS[state.kind], dict[str, list[int]]()
    stored = {key: each for path in files for key, each in _stored(path).items()}
    for key, (shape, dtype) in stored.items():
        for name in layer.tensor_names:
            if not f".{key}".endswith(f".{leaf}.{name}"):
                continue
            found[name] = shape
            # transformers would cast them without a word.
            expected = layer.code_dtypes.get(name)
            if dtype != expected if expected else dtype not in DTYPES:
                raise ValueError(
                    f"the checkpoint does not hold the compressed table its config describes: {key} is of "
                    f"{dtype or 'a dtype that torch does not know'}, expected {expected or 'floating point'}"
                )
    if found != state.shapes:
        raise ValueError(
            f"the checkpoint does not hold the compressed table its config describes: expected {leaf} with "
            f"shapes {state.shapes}, found {found or 'none'}"
        )
    return {key: shape for key, (shape, _) in stored.items()}


# Of safetensors' names for dtypes, those of a table's tensors.
_STORED_DTYPES = {**FLOAT_DTYPES, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def _stored(path: str) -> dict[str, tuple[list[int], torch.dtype | None]]:
    """Names, shapes and dtypes in a checkpoint file."""
    if not path.endswith(".safetensors"):
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return {key: (list(each.shape), each.dtype) for key, each in tensors.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: (list(each.get_shape()), _STORED_DTYPES.get(each.get_dtype()))
                for key, each in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _materialize_buffers(model: PreTrainedModel, path: str, module: nn.Module, weight: Tensor) -> None:
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


def _untie_heads(model: PreTrainedModel, table: ModelTable) -> None:
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


def resize_token_embeddings(model: PreTrainedModel, num_embeddings: int) -> CompressedEmbedding:
    """Grow or shrink a compressed model's vocabulary, like ``model.resize_token_embeddings`` of a dense one.

    New tokens decode to the mean row: of factors exactly, and their codes train. Of a packed table they get
    the record that comes nearest to it; codes are frozen, so that training moves such a row along its
    direction and, through basis and offset, with all others. New entries of a head's bias are zero.

    Raises:
        ValueError: ``num_embeddings`` is below 1, or the model is not compressed by embkern.
    """
    root = _compressed(model)
    if type(num_embeddings) is not int or num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected a positive integer, got {num_embeddings!r}")
    added = max(0, num_embeddings - root.num_embeddings)
    before = {name: getattr(root, name) for name in root.tensors()}
    with torch.no_grad():
        table = resized(root.table, num_embeddings)
        root.replace(table)
    for module in _over_the_table(model):
        for name, old in before.items():
            if getattr(module, name) is old:
                setattr(module, name, getattr(root, name))
        if isinstance(module, CompressedEmbedding):
            module.num_embeddings = num_embeddings
            if module.padding_idx is not None and module.padding_idx >= num_embeddings:
                module.padding_idx = None
        else:
            module.out_features = num_embeddings
            if module.bias is not None:
                bias = nn.functional.pad(module.bias.detach()[:num_embeddings], (0, added))
                _replace_parameter(
                    model, module.bias, nn.Parameter(bias, requires_grad=module.bias.requires_grad)
                )
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):  # its own table: transformers knows how to resize it
        model.set_output_embeddings(model._get_resized_lm_head(head, num_embeddings))
    if hasattr(model, "_resize_final_logits_bias"):
        model._resize_final_logits_bias(num_embeddings)
    model.config.get_text_config().vocab_size = num_embeddings
    if hasattr(model, "vocab_size"):
        model.vocab_size = num_embeddings
    shapes = {name: list(tensor.shape) for name, tensor in table.tensors().items()}
    model.hf_quantizer.quantization_config.table.shapes = shapes
    for dense in model.hf_quantizer.original.modules.values():  # what dequantize will bring back
        setattr(
            dense, "num_embeddings" if isinstance(dense, nn.Embedding) else "out_features", num_embeddings
        )
    return root


def _replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, name, new)


register_quantization_config("embkern")(EmbkernConfig)
register_quantizer("embkern")(EmbkernQuantizer)
