"""The compressed table in a model's checkpoint: what is stored, and checks of what is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..io.mapped_table import DTYPES as FLOAT_DTYPES
from ..io.tensor_format import verify_checksums
from ..nn import KINDS
from ..nn.base import CompressedEmbedding, CompressedHead
from ..ops.backends import DTYPES
from ..tables import Table
from .config import TableState
from .find_table import input_embeddings
from .swap import canonical_name, compressed_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, a shared one counted once, and of a compressed table, as a file holds them."""
    embedding = input_embeddings(model)
    if not isinstance(embedding, CompressedEmbedding):
        return sum(parameter.nbytes for parameter in model.parameters())
    own = {id(parameter) for parameter in embedding.parameters()}
    others = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in own)
    return others + stored_table(model).nbytes


def holds(keys: set[str], name: str) -> bool:
    """Whether a checkpoint has a name, with whatever prefix its model puts before it."""
    return any(f".{key}".endswith(f".{name}") for key in keys)


def zero_missing_biases(model: PreTrainedModel, keys: set[str]) -> None:
    """Initialise the bias of a head that the checkpoint, saved from a backbone, does not have."""
    for head in model.modules():
        if not isinstance(head, CompressedHead) or head.bias is None:
            continue
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is head.bias]
        if not any(holds(keys, canonical_name(model, name)) for name in names):
            nn.init.zeros_(head.bias)


def is_whole(root: CompressedEmbedding, state: TableState) -> bool:
    tensors = root.tensors()
    return all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values()) and all(
        list(tensor.shape) == state.shapes[name] for name, tensor in tensors.items()
    )


def storage_dtype(root: CompressedEmbedding, state: TableState) -> torch.dtype:
    """Return the dtype to save in: a packed table keeps the one it has on disk while the model's is wider."""
    widened = torch.promote_types(root.dtype, state.stored_dtype) == root.dtype
    return state.stored_dtype if root.keeps_stored_dtype and widened else root.dtype


def stored_table(model: PreTrainedModel) -> Table:
    """Return a compressed model's table as it is stored: floating-point tensors in the dtype on disk.

    Raises:
        ValueError: the model is not compressed by embkern, or was trained to values beyond that dtype.
    """
    root = compressed_embedding(model)
    dtype = storage_dtype(root, model.hf_quantizer.quantization_config.table)
    table = root.table.to(dtype=dtype)
    for name, live in root.tensors().items():
        stored = table.tensors()[name]
        if dtype != root.dtype and not torch.equal(stored.isfinite(), live.isfinite()):
            raise ValueError(f"{name}: expected values within {dtype}, in which they are stored, got beyond")
    return table


def verify(root: CompressedEmbedding, state: TableState) -> None:
    """Raise ValueError if a loaded table is not the one that was saved, or cannot be decoded."""
    if not is_whole(root, state):
        return
    tensors = root.tensors()
    if torch.promote_types(root.dtype, state.stored_dtype) == root.dtype:  # else the cast lost digits
        tensors = {n: t.to(state.stored_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    known = {name: value for name, value in state.checksums.items() if name in tensors}
    try:
        verify_checksums(tensors, known)
        root.table.validate()
    except ValueError as error:
        raise ValueError(f"the saved embedding is damaged: {error}") from error


def scale_of(state: TableState, name: str) -> float:
    if name in state.scales:
        return float(state.scales[name])
    if len(distinct := set(state.scales.values())) == 1:
        return float(distinct.pop())
    raise ValueError(f"quantization_config.table.scales: no entry for {name}, only {sorted(state.scales)}")


def check_files(files: list[str], root: str, state: TableState) -> dict[str, list[int]]:
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
