"""The transformers integration: swap a factorised table into a model, save it, load it like any other.

``EmbkernConfig`` and ``EmbkernQuantizer`` are registered with transformers when embkern is imported (or
when transformers is, if that comes later). Then::

    model = AutoModel.from_pretrained(dense_checkpoint, quantization_config=EmbkernConfig(ratio=5))
    model.save_pretrained("small"); AutoModel.from_pretrained("small"); model.dequantize()

work as for every quantiser of transformers' own. ``install`` does the same to a live model.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .factors import TENSORS, Factors, checksum, verify_checksums
from .layer import FactorizedEmbedding, FactorizedHead
from .model_table import ModelTable, UnsupportedModelError, find_table, input_embeddings
from .recipe import LMHead, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1


@dataclass
class TableState:
    """What a saved model's config says of its factors: enough to build the modules before weights come."""

    num_embeddings: int
    embedding_dim: int
    rank: int
    offset: bool
    activation: str | None
    scales: dict[str, float]
    head: str | None
    dtype: str
    checksums: dict[str, str] = field(default_factory=dict)


class EmbkernConfig(QuantizationConfigMixin):
    """Quantisation config of transformers for a compressed embedding table.

    Args:
        method, ratio, rank, lm_head, options: as in ``embkern.Recipe``.
        table: written by embkern when a model is compressed; not for callers.

    Raises:
        ValueError: a field is unknown, out of range, or damaged.
    """

    def __init__(
        self,
        method: str = "autoencoder",
        ratio: float | None = None,
        rank: int | None = None,
        lm_head: LMHead = "factorized",
        options: dict[str, Any] | None = None,
        table: dict[str, Any] | None = None,
        quant_method: str = "embkern",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        if quant_method != "embkern":
            raise ValueError(f"quantization_config: expected quant_method 'embkern', got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config.format_version: expected {FORMAT_VERSION}, got {format_version!r}; "
                "install the embkern that wrote the model, or a newer one"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown field(s) {', '.join(sorted(unknown))}")
        self.quant_method = quant_method
        self.format_version = format_version
        self.recipe = Recipe.parse(
            method=method, ratio=ratio, rank=rank, lm_head=lm_head, options=options or {}
        )
        self.table = None if table is None else _parse_state(table)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as in ``config.json``."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            **self.recipe.model_dump(),
            "table": None if self.table is None else dict(vars(self.table)),
        }


def _parse_state(table: dict[str, Any]) -> TableState:
    try:
        state = TableState(**table)
        for name in ("num_embeddings", "embedding_dim", "rank"):
            if type(getattr(state, name)) is not int or getattr(state, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(state, name)!r}")
        if state.rank > state.embedding_dim:
            raise ValueError(f"rank: expected at most {state.embedding_dim}, got {state.rank}")
        if state.head not in (None, "factorized", "dense"):
            raise ValueError(f"head: expected factorized, dense or null, got {state.head!r}")
        dtype = getattr(torch, str(state.dtype), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point torch dtype, got {state.dtype!r}")
        if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in state.scales.values()):
            raise ValueError(f"scales: expected finite numbers, got {state.scales!r}")
        if not set(state.checksums) <= set(TENSORS) or not all(map(str, state.checksums.values())):
            raise ValueError(f"checksums: expected them of {', '.join(TENSORS)}, got {state.checksums!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization_config.table is damaged: {error}") from error
    return state


def check_installable(table: ModelTable, recipe: Recipe) -> None:
    """Raise UnsupportedModelError if the recipe's factors could not serve the model's head.

    Called before a method runs, which may take minutes.
    """
    activation = recipe.options.get("activation")
    if activation is not None and table.tied and recipe.lm_head == "factorized":
        raise UnsupportedModelError(
            f"lm_head: a tied head cannot decode through activation {activation!r}; "
            "use lm_head='dense' or the linear autoencoder"
        )


def install(model: PreTrainedModel, table: ModelTable, factors: Factors, recipe: Recipe) -> None:
    """Replace a live model's table by factors, in place, and make the model save and load with them.

    Raises:
        UnsupportedModelError: a tied head is asked to decode through an activation. The model is unchanged.
    """
    check_installable(table, recipe)
    head = recipe.lm_head if table.tied else None if table.output_head is None else "dense"
    _own_config(model)
    config = EmbkernConfig(**recipe.model_dump())
    config.table = TableState(
        num_embeddings=factors.num_embeddings,
        embedding_dim=factors.embedding_dim,
        rank=factors.rank,
        offset=factors.offset is not None,
        activation=factors.activation,
        scales={_canonical(model, name): scale for name, scale in table.scales.items()},
        head=head,
        dtype=str(factors.dtype).removeprefix("torch."),
        checksums={name: checksum(tensor) for name, tensor in factors.tensors().items()},
    )
    quantizer = getattr(model, "hf_quantizer", None) or EmbkernQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config
    quantizer.original = _swap(model, table, factors.to(table.weight.device), head == "factorized")
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
    for module in _models_with_factors(model):
        module.hf_quantizer = quantizer
        module.quantization_method = quantizer.quantization_config.quant_method
        module.config.quantization_config = quantizer.quantization_config
        # transformers refuses .half(), .float() and Trainer while this is set; factors train like any.
        module.is_quantized = False


def _models_with_factors(model: PreTrainedModel) -> list[Any]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "all_tied_weights_keys")
        and any(isinstance(each, FactorizedEmbedding) for each in module.modules())
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


def _swap(model: PreTrainedModel, table: ModelTable, factors: Factors, factorize_heads: bool) -> _Original:
    heads = table.heads if factorize_heads else []
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in [*table.embeddings, *heads]}
    original = _Original(modules, {}, table)
    swapped: dict[int, FactorizedEmbedding] = {}
    for name in table.embeddings:
        dense = modules[name]
        layer = swapped.get(id(dense))
        if layer is None:
            layer = FactorizedEmbedding.from_factors(
                factors, padding_idx=dense.padding_idx, scale=table.scales[name]
            )
            _share(layer, next(iter(swapped.values()), layer))
            swapped[id(dense)] = layer
        model.set_submodule(name, _take_place(layer, dense))
    root = swapped[id(modules[table.root])]
    for parameter in root.parameters():
        parameter.requires_grad_(table.weight.requires_grad)
    for name in heads:
        head = FactorizedHead(root, modules[name].bias)
        model.set_submodule(name, _take_place(head, modules[name]))
    followers = [name for name in [*table.embeddings, *heads] if name != table.root]
    original.ties = _retie(model, table, followers)
    for dense in modules.values():  # the dense table is freed unless a dense head still holds it
        dense.weight = nn.Parameter(dense.weight.detach().to("meta"), requires_grad=False)
    table.weight = table.weight.detach().to("meta")
    return original


def _share(layer: FactorizedEmbedding, root: FactorizedEmbedding) -> None:
    layer.codes, layer.basis = root.codes, root.basis
    layer.register_parameter("offset", root.offset)


def _retie(
    model: PreTrainedModel, table: ModelTable, followers: list[str]
) -> dict[str, tuple[dict | None, dict | None]]:
    """Point the tie maps at the factors; returns what they were, per nested model."""
    stale = {f"{name}.weight" for name in [*table.embeddings, *table.heads]}
    tensors = [name for name, _ in model.get_submodule(table.root).named_parameters()]
    new = {f"{name}.{tensor}": f"{table.root}.{tensor}" for name in followers for tensor in tensors}
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
        module._tied_weights_keys = module.all_tied_weights_keys = {**kept, **own}
    return before


def _canonical(model: PreTrainedModel, name: str) -> str:
    """Name of a module without the base model's prefix, which differs between a model and its backbone."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


class EmbkernQuantizer(HfQuantizer):
    """Builds factorised modules for a saved model, or compresses a dense one after its weights are loaded."""

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
        if tuple(table.weight.shape) != (state.num_embeddings, state.embedding_dim):
            raise ValueError(
                f"quantization_config.table: describes {state.num_embeddings} x {state.embedding_dim}, "
                f"the model's config says {' x '.join(map(str, table.weight.shape))}"
            )
        if state.activation is not None and state.head != "dense" and table.tied:
            raise ValueError(
                f"{type(model).__name__} has a tied head, which cannot decode through the saved table's "
                f"activation {state.activation!r}; load the backbone, or export the model to dense"
            )
        if checkpoint_files:
            shapes = _check_files(checkpoint_files, table.root, state)
            keys = set(shapes)
            # A module that the class ties but the checkpoint holds densely was its own table when saved.
            table.embeddings = [
                name for name in table.embeddings if not _holds(keys, f"{_canonical(model, name)}.weight")
            ]
            # By its shape: architectures rename a head's weight on the way to the file.
            dense_shape = [state.num_embeddings, state.embedding_dim]
            if state.head == "dense" and table.tied and dense_shape not in shapes.values():
                raise ValueError(
                    f"the checkpoint does not hold {table.output_head}.weight, a dense head by its config"
                )
            self.checkpoint_keys = keys
        factors = _empty_factors(state, table.weight.dtype)
        table.scales = {name: _scale_of(state, _canonical(model, name)) for name in table.embeddings}
        self.original = _swap(model, table, factors, factorize_heads=state.head != "dense")
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            factors = _factorized(model).factors
            if not factors.codes.is_meta and str(factors.dtype).removeprefix("torch.") == config.table.dtype:
                verify_checksums(factors.tensors(), config.table.checksums, "the saved embedding")
            if self.checkpoint_keys is not None:
                _zero_missing_biases(model, self.checkpoint_keys)
                self.checkpoint_keys = None
            _adopt(model, self)
        else:
            table = find_table(model)
            check_installable(table, config.recipe)
            install(model, table, config.recipe.factorize(table.weight.detach()), config.recipe)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Bring the saved description up to date: the factors may have been trained since.

        transformers saves the live weights after this, whatever ``state_dict`` its caller passed.
        """
        root, state = _factorized(model), self.quantization_config.table
        state.dtype = str(root.codes.dtype).removeprefix("torch.")
        tensors = {name: tensor.detach() for name, tensor in root.named_parameters()}
        # Offloaded or sharded parameters are not whole here; without a checksum nothing is verified on load.
        whole = root.codes.shape == (root.num_embeddings, root.rank) and all(
            type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values()
        )
        state.checksums = {name: checksum(tensor) for name, tensor in tensors.items()} if whole else {}
        _keep_tie(model, state)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Decode the table, in the factors' dtype: transformers passes the config's, which may be stale."""
        assert self.original is not None, "a model with this quantizer was swapped by it"
        original, table, state = self.original, self.original.table, self.quantization_config.table
        root = _factorized(model)
        if root.codes.is_meta:
            raise ValueError(
                "model: its factors are offloaded; load it without a device_map to dequantize it"
            )
        weight = nn.Parameter(root.weight.detach(), requires_grad=root.codes.requires_grad)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        for nested in _models_with_factors(model):
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
            if isinstance(current, FactorizedHead) and current.bias is not None:
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
        """Factors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes, basis and offset train like any parameter."""
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
    """Set the flag that says the head is tied where it still shares the factors, and something cleared it."""
    if state.head == "factorized" and getattr(model.config, "tie_word_embeddings", None) is False:
        model.config.tie_word_embeddings = True


def _holds(keys: set[str], name: str) -> bool:
    """Whether a checkpoint has a name, with whatever prefix its model puts before it."""
    return any(f".{key}".endswith(f".{name}") for key in keys)


def _zero_missing_biases(model: PreTrainedModel, keys: set[str]) -> None:
    """Initialise the bias of a head that the checkpoint, saved from a backbone, does not have."""
    for head in model.modules():
        if not isinstance(head, FactorizedHead) or head.bias is None:
            continue
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is head.bias]
        if not any(_holds(keys, _canonical(model, name)) for name in names):
            nn.init.zeros_(head.bias)


def _factorized(model: PreTrainedModel) -> FactorizedEmbedding:
    module = input_embeddings(model)
    if not isinstance(module, FactorizedEmbedding):
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    return module


def _empty_factors(state: TableState, dtype: torch.dtype) -> Factors:
    empty: dict[str, Any] = {"device": "meta", "dtype": dtype}
    return Factors(
        torch.empty(state.num_embeddings, state.rank, **empty),
        torch.empty(state.rank, state.embedding_dim, **empty),
        torch.empty(state.embedding_dim, **empty) if state.offset else None,
        state.activation,
    )


def _scale_of(state: TableState, name: str) -> float:
    if name in state.scales:
        return float(state.scales[name])
    if len(distinct := set(state.scales.values())) == 1:
        return float(distinct.pop())
    raise ValueError(f"quantization_config.table.scales: no entry for {name}, only {sorted(state.scales)}")


def _check_files(files: list[str], root: str, state: TableState) -> dict[str, list[int]]:
    """Return the names and shapes in a checkpoint; raise if it lacks the factors.

    transformers would only log that they are missing and go on with random ones.
    """
    expected: dict[str, list[int]] = {
        "codes": [state.num_embeddings, state.rank],
        "basis": [state.rank, state.embedding_dim],
    }
    if state.offset:
        expected["offset"] = [state.embedding_dim]
    leaf = root.rpartition(".")[2]
    found: dict[str, list[int]] = {}
    shapes = {key: shape for path in files for key, shape in _shapes(path).items()}
    for key, shape in shapes.items():
        for name in TENSORS:
            if f".{key}".endswith(f".{leaf}.{name}"):
                found[name] = shape
    if found != expected:
        raise ValueError(
            f"the checkpoint does not hold the compressed table its config describes: expected {leaf} with "
            f"shapes {expected}, found {found or 'none'}"
        )
    return shapes


def _shapes(path: str) -> dict[str, list[int]]:
    """Names and shapes in a checkpoint file."""
    if not path.endswith(".safetensors"):
        return {key: list(each.shape) for key, each in torch.load(path, map_location="meta").items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
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


def resize_token_embeddings(model: PreTrainedModel, num_embeddings: int) -> FactorizedEmbedding:
    """Grow or shrink a compressed model's vocabulary, like ``model.resize_token_embeddings`` of a dense one.

    New tokens get the mean code, so that they decode to the mean row; new entries of a head's bias are zero.

    Raises:
        ValueError: ``num_embeddings`` is below 1, or the model is not compressed by embkern.
    """
    root = _factorized(model)
    if type(num_embeddings) is not int or num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected a positive integer, got {num_embeddings!r}")
    old = root.codes
    with torch.no_grad():
        added = max(0, num_embeddings - len(old))
        mean = old.double().mean(0, keepdim=True).to(old.dtype)
        resized = torch.cat([old[:num_embeddings], mean.expand(added, -1)])
    codes = nn.Parameter(resized, requires_grad=old.requires_grad)
    for module in model.modules():
        if not isinstance(module, (FactorizedEmbedding, FactorizedHead)) or module.codes is not old:
            continue
        module.codes = codes
        if isinstance(module, FactorizedEmbedding):
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
    model.hf_quantizer.quantization_config.table.num_embeddings = num_embeddings
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
