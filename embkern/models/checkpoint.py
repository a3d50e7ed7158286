"""The compressed table in a model's checkpoint: its stored form and size, and checks of what is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..io.mapped_table import DTYPES as FLOAT_DTYPES
from ..io.tensor_format import verify_checksums
from ..nn import KINDS
from ..nn.base import ADJUSTMENT, GUARD, CompressedEmbedding, CompressedHead
from ..ops.backends import DTYPES
from ..tables import Table
from .config import TableState
from .find_table import input_embeddings
from .swap import canonical_name, compressed_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a stored model: parameters, shared ones once, and the compressed table."""
    embedding = input_embeddings(model)
    if not isinstance(embedding, CompressedEmbedding):
        return sum(parameter.nbytes for parameter in model.parameters())
    own = {id(parameter) for parameter in embedding.parameters()}
    others = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in own)
    return others + stored_table(model).nbytes


def stored_table(model: PreTrainedModel) -> Table:
    """Return a compressed model's table in the dtype in which it is stored.

    Raises:
        ValueError: the model is not compressed by embkern, or was trained to values that overflow the dtype.
    """
    root = compressed_embedding(model)
    dtype = storage_dtype(root, model.hf_quantizer.quantization_config.table)
    table = root.table.to(dtype=dtype)
    for name, live in root.tensors().items():
        stored = table.tensors()[name]
        if dtype != root.dtype and not torch.equal(stored.isfinite(), live.isfinite()):
            raise ValueError(
                f"{name}: expected values in the range of the stored dtype {dtype}, got overflow"
            )
    return table


def storage_dtype(root: CompressedEmbedding, state: TableState) -> torch.dtype:
    """Return the dtype to save in: a packed table keeps the stored one unless the model's is narrower."""
    widened = torch.promote_types(root.dtype, state.stored_dtype) == root.dtype
    return state.stored_dtype if root.keeps_stored_dtype and widened else root.dtype


def is_whole(root: CompressedEmbedding, state: TableState) -> bool:
    """Return whether all tensors of the table are here: none is on meta, sharded or of another shape."""
    tensors = root.tensors()
    return all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values()) and all(
        list(tensor.shape) == state.shapes[name] for name, tensor in tensors.items()
    )


def with_guard(state_dict: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a state dict to save, in which the dense table's name has a tensor without values.

    A transformers that does not know embkern warns about the quantisation method and goes on. This tensor
    then stops it with a size mismatch. The table's own names would only be unexpected, and the dense table
    that the file lacks random.
    """
    root = compressed_embedding(model)
    name = next(name for name, module in model.named_modules() if module is root)
    dtype = storage_dtype(root, model.hf_quantizer.quantization_config.table)
    return {**state_dict, f"{name}.{GUARD}": torch.empty(0, dtype=dtype)}


def without_adjustments(
    state_dict: dict[str, Tensor], model: PreTrainedModel, *, keep: CompressedEmbedding | None = None
) -> dict[str, Tensor]:
    """Return a state dict without the adjustments of tables, except that of the module ``keep``."""
    dropped = tuple(
        f"{name}.{ADJUSTMENT}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (CompressedEmbedding, CompressedHead)) and module is not keep
    )
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(dropped)}


def ignore_guard(model: PreTrainedModel, root: str) -> None:
    """Let transformers load a checkpoint into a model without a report of its guard."""
    known: Any = model._keys_to_ignore_on_load_unexpected  # a set; in older releases a list or None
    guard = rf"(^|\.){re.escape(root.rpartition('.')[2])}\.{GUARD}$"
    model._keys_to_ignore_on_load_unexpected = (
        {*known, guard} if isinstance(known, set) else [*(known or ()), guard]
    )


def check_files(files: list[str], root: str, state: TableState) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a checkpoint, by name, without the guard.

    Args:
        files: paths of the checkpoint's files.
        root: name of the input embedding.
        state: description of the table.

    Raises:
        ValueError: the table's tensors are missing (transformers would only warn and initialise them at
            random), or differ from the description in shape or dtype.
    """
    leaf = root.rpartition(".")[2]
    layer, found = KINDS[state.kind], dict[str, list[int]]()
    stored = {key: each for path in files for key, each in _stored(path).items()}
    for key, (shape, dtype) in stored.items():
        for name in layer.tensor_names:
            if not f".{key}".endswith(f".{leaf}.{name}"):
                continue
            found[name] = shape
            # transformers would cast them silently.
            expected = layer.code_dtypes.get(name)
            if dtype != expected if expected else dtype not in DTYPES:
                raise ValueError(
                    "the checkpoint does not hold the compressed table its config describes: expected "
                    f"{expected or 'a floating-point dtype'} for {key}, got {dtype or 'an unknown dtype'}"
                )
    if found != state.shapes:
        raise ValueError(
            f"the checkpoint does not hold the compressed table its config describes: expected {leaf} with "
            f"shapes {state.shapes}, found {found or 'none'}"
        )
    return {
        key: shape
        for key, (shape, _) in stored.items()
        if not (shape == [0] and f".{key}".endswith(f".{leaf}.{GUARD}"))
    }


# Dtypes of a table's tensors by their names in safetensors files.
_STORED_DTYPES = {**FLOAT_DTYPES, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def _stored(path: str) -> dict[str, tuple[list[int], torch.dtype | None]]:
    """Return shape and dtype of the tensors in a checkpoint file, by name."""
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


def scale_of(state: TableState, name: str) -> float:
    """Return the saved scale of an embedding module; if all are equal, also of one under another name."""
    if name in state.scales:
        return float(state.scales[name])
    if len(distinct := set(state.scales.values())) == 1:
        return float(distinct.pop())
    raise ValueError(f"quantization_config.table.scales: no entry for {name}, only {sorted(state.scales)}")


def verify(root: CompressedEmbedding, state: TableState) -> None:
    """Raise ValueError if a loaded table differs from the saved one, or its tensors contradict each other.

    Floating-point tensors are verified unless the model's dtype is narrower than the stored one; a table that
    is not whole here is not verified.
    """
    if not is_whole(root, state):
        return
    tensors = root.tensors()
    if torch.promote_types(root.dtype, state.stored_dtype) == root.dtype:
        tensors = {n: t.to(state.stored_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    known = {name: value for name, value in state.checksums.items() if name in tensors}
    try:
        verify_checksums(tensors, known)
        root.table.validate()
    except ValueError as error:
        raise ValueError(f"the saved embedding is damaged: {error}") from None


def zero_missing_biases(model: PreTrainedModel, keys: set[str]) -> None:
    """Set the biases of compressed heads to zero that are missing in the checkpoint, as in a backbone's."""
    for head in model.modules():
        if not isinstance(head, CompressedHead) or head.bias is None:
            continue
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is head.bias]
        if not any(holds(keys, canonical_name(model, name)) for name in names):
            nn.init.zeros_(head.bias)


def holds(keys: set[str], name: str) -> bool:
    """Return whether a checkpoint has a tensor ``name``, under any prefix."""
    return any(f".{key}".endswith(f".{name}") for key in keys)
