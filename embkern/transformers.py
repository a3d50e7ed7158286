"""The transformers integration: swap a factorised table into a model, save it, load it like any other.

``EmbkernConfig`` and ``EmbkernQuantizer`` are registered with transformers when embkern is imported (or
when transformers is, if that comes later). Then::

    model = AutoModel.from_pretrained(dense_checkpoint, quantization_config=EmbkernConfig(ratio=5))
    model.save_pretrained("small"); AutoModel.from_pretrained("small"); model.dequantize()

work as for every quantiser of transformers' own. ``install`` does the same to a live model.
"""

from __future__ import annotations

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
from .model_table import ModelTable, UnsupportedModelError, find_table, input_embeddings, probe_scale
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
            if not isinstance(getattr(state, name), int) or getattr(state, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(state, name)!r}")
        if state.rank > state.embedding_dim:
            raise ValueError(f"rank: expected at most {state.embedding_dim}, got {state.rank}")
        if state.head not in (None, "factorized", "dense"):
            raise ValueError(f"head: expected factorized, dense or null, got {state.head!r}")
        if not isinstance(getattr(torch, str(state.dtype), None), torch.dtype):
            raise ValueError(f"dtype: expected a torch dtype, got {state.dtype!r}")
        if not all(isinstance(scale, (int, float)) for scale in state.scales.values()):
            raise ValueError(f"scales: expected numbers, got {state.scales!r}")
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization_config.table is damaged: {error}") from error
    return state


def install(model: PreTrainedModel, table: ModelTable, factors: Factors, recipe: Recipe) -> None:
    """Replace a live model's table by factors, in place, and make the model save and load with them.

    Raises:
        UnsupportedModelError: an embedding normalises its rows, the model is spread over several devices, or
            a tied head is asked to decode through an activation. The model is then unchanged.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UnsupportedModelError(
            "device_map: the model is spread over several devices; compress it on one, save it, "
            "and load the compressed model with the device_map"
        )
    scales = {name: probe_scale(model.get_submodule(name), name) for name in table.embeddings}
    head = _head_kind(table, recipe.lm_head)
    if head == "factorized" and factors.activation is not None:
        raise UnsupportedModelError(
            f"lm_head: a tied head cannot decode through activation {factors.activation!r}; "
            "use lm_head='dense' or the linear autoencoder"
        )
    config = EmbkernConfig(**recipe.model_dump())
    config.table = TableState(
        num_embeddings=factors.num_embeddings,
        embedding_dim=factors.embedding_dim,
        rank=factors.rank,
        offset=factors.offset is not None,
        activation=factors.activation,
        scales={_canonical(model, name): scale for name, scale in scales.items()},
        head=head,
        dtype=str(factors.dtype).removeprefix("torch."),
        checksums={name: checksum(tensor) for name, tensor in factors.tensors().items()},
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, EmbkernQuantizer):
        quantizer = EmbkernQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config
    quantizer.original = _swap(model, table, factors.to(table.weight.device), scales, head == "factorized")
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    _allow_training(model)


def _head_kind(table: ModelTable, lm_head: LMHead) -> str | None:
    if table.tied:
        return lm_head
    return None if table.output_head is None else "dense"


def _allow_training(model: PreTrainedModel) -> None:
    # transformers refuses .half(), .float() and Trainer while this is set; factors are ordinary parameters.
    model.is_quantized = False


@dataclass
class _Original:
    """The dense modules and tie maps that a swap took out, weights freed; ``dequantize`` puts them back."""

    modules: dict[str, Any]  # nn.Embedding or nn.Linear
    ties: dict[str, tuple[dict | None, dict | None]]
    table: ModelTable


def _swap(
    model: PreTrainedModel,
    table: ModelTable,
    factors: Factors,
    scales: dict[str, float],
    factorize_heads: bool,
) -> _Original:
    heads = table.heads if factorize_heads else []
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in [*table.embeddings, *heads]}
    original = _Original(modules, {}, table)
    swapped: dict[int, FactorizedEmbedding] = {}
    for name in table.embeddings:
        dense = original.modules[name]
        layer = swapped.get(id(dense))
        if layer is None:
            layer = FactorizedEmbedding.from_factors(
                factors, padding_idx=dense.padding_idx, scale=scales[name]
            ).train(dense.training)
            _share(layer, next(iter(swapped.values()), layer))
            swapped[id(dense)] = layer
        model.set_submodule(name, layer)
    root = swapped[id(original.modules[table.root])]
    for parameter in (root.codes, root.basis, root.offset):
        if parameter is not None:
            parameter.requires_grad_(table.weight.requires_grad)
    for name in heads:
        dense = original.modules[name]
        model.set_submodule(name, FactorizedHead(root, dense.bias).train(dense.training))
    followers = [name for name in [*table.embeddings, *heads] if name != table.root]
    original.ties = _retie(model, table, followers)
    for dense in original.modules.values():  # the dense table is freed unless a dense head still holds it
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
        if module is model:
            kept = {
                target: source
                for target, source in module.all_tied_weights_keys.items()
                if target not in stale and source not in stale
            }
            module._tied_weights_keys = module.all_tied_weights_keys = {**kept, **new}
        else:  # the outermost model knows all ties by their full names
            module._tied_weights_keys = module.all_tied_weights_keys = {}
    return before


def _canonical(model: PreTrainedModel, name: str) -> str:
    """Name of a module without the base model's prefix, which differs between a model and its backbone."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


class EmbkernQuantizer(HfQuantizer):
    """Builds factorised modules for a saved model, or compresses a dense one after its weights are loaded."""

    requires_calibration = False
    original: _Original | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, dtype: Any = None, **_: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            return model
        state = self.quantization_config.table
        if state is None:
            raise ValueError("quantization_config.table: expected what embkern saved, got nothing")
        table = find_table(model)
        if tuple(table.weight.shape) != (state.num_embeddings, state.embedding_dim):
            raise ValueError(
                f"quantization_config.table: describes {state.num_embeddings} x {state.embedding_dim}, "
                f"the model's config says {' x '.join(map(str, table.weight.shape))}"
            )
        if state.head == "factorized" and table.output_head and not table.tied:
            table.heads = [table.output_head]  # merging an adapter clears tie_word_embeddings
        if checkpoint_files:
            keys = _check_files(checkpoint_files, table.root, state)
            # A module that the class ties but the checkpoint holds densely was its own table when saved.
            own = {
                name
                for name in table.embeddings
                if any(f".{key}".endswith(f".{_canonical(model, name)}.weight") for key in keys)
            }
            table.embeddings = [name for name in table.embeddings if name not in own]
        factors = _empty_factors(state, table.weight.dtype)
        scales = {name: _scale_of(state, _canonical(model, name)) for name in table.embeddings}
        self.original = _swap(model, table, factors, scales, factorize_heads=state.head != "dense")
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            factors = _factorized(model).factors
            if not factors.codes.is_meta and str(factors.dtype).removeprefix("torch.") == config.table.dtype:
                verify_checksums(factors.tensors(), config.table.checksums, "the saved embedding")
            _allow_training(model)
        else:
            table = find_table(model)
            install(model, table, config.recipe.factorize(table.weight.detach()), config.recipe)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Bring the saved description up to date: the factors may have been trained since."""
        factors, state = _factorized(model).factors, self.quantization_config.table
        state.dtype = str(factors.dtype).removeprefix("torch.")
        # Offloaded or sharded parameters are not whole here; without a checksum nothing is verified on load.
        whole = all(type(tensor) is Tensor and not tensor.is_meta for tensor in factors.tensors().values())
        state.checksums = {n: checksum(t) for n, t in factors.tensors().items()} if whole else {}
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        assert self.original is not None, "a model with this quantizer was swapped by it"
        original, table = self.original, self.original.table
        root = _factorized(model)
        with torch.no_grad():
            weight = nn.Parameter(
                root.weight.to(dtype or root.codes.dtype), requires_grad=root.codes.requires_grad
            )
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        for name, dense in original.modules.items():
            current = model.get_submodule(name)
            dense.weight = weight
            if isinstance(current, FactorizedHead) and current.bias is not None:
                dense.bias = current.bias
            _materialize_buffers(model, dense, weight)
            model.set_submodule(name, dense.train(current.training))
        for prefix, (instance_ties, all_ties) in original.ties.items():
            module = model.get_submodule(prefix)
            module.__dict__.pop("_tied_weights_keys", None)
            if instance_ties is not None:
                module._tied_weights_keys = instance_ties
            module.all_tied_weights_keys = all_ties
        if table.tied and self.quantization_config.table.head == "dense":
            _untie_heads(model, table)
        self.original = None
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """The factors are ordinary parameters: every way of saving works."""
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


def _check_files(files: list[str], root: str, state: TableState) -> set[str]:
    """Return the names in a checkpoint; raise if it lacks the factors.

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
    keys: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                keys.update(file.keys())
                for key in file.keys():  # noqa: SIM118
                    for name in TENSORS:
                        if f".{key}".endswith(f".{leaf}.{name}"):
                            found[name] = list(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if found != expected:
        raise ValueError(
            f"the checkpoint does not hold the compressed table its config describes: expected {leaf} with "
            f"shapes {expected}, found {found or 'none'}"
        )
    return keys


def _materialize_buffers(model: PreTrainedModel, module: nn.Module, weight: Tensor) -> None:
    """Give a dense module that was built on the meta device its buffers (an embedding's scale)."""
    if any(buffer.is_meta for buffer in module.buffers()):
        for name, buffer in list(module.named_buffers()):
            setattr(module, name, torch.empty_like(buffer, device=weight.device))
        with torch.no_grad():
            model._init_weights(module)  # leaves the weight alone: it is marked as initialised
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
    if num_embeddings < 1:
        raise ValueError(f"num_embeddings: expected at least 1, got {num_embeddings}")
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
