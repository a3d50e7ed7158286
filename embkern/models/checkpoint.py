"""Compressed tables in a model's checkpoint: their stored form and size, and checks of what is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..io.mapped_table import DTYPES as FLOAT_DTYPES
from ..io.tensor_format import verify_checksums
from ..nn import KINDS, NGrammer
from ..nn.base import CompressedHead
from ..nn.table_module import ADJUSTMENT, GUARD, TableModule
from ..ops.backends import DTYPES
from ..tables import Table
from .body_config import is_compressed, plain_parts
from .config import TableState
from .static_embeddings import is_static
from .swap import canonical_name, compressed_embedding, table_modules, table_roots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a stored model: parameters, shared ones once, and the compressed tables."""
    tables = stored_tables(model)
    own = {id(each) for module in table_modules(model) for each in module.parameters()}
    own -= {id(getattr(module, "bias", None)) for module in table_modules(model)}
    own -= {
        id(each) for module in model.modules() if isinstance(module, NGrammer) for each in module.parameters()
    }
    others = (
        each
        for parameter in model.parameters()
        if id(parameter) not in own
        for each in plain_parts(parameter)
    )
    of_tables = sum(table.nbytes for table in tables.values()) - _shared_bytes(model, tables)
    return sum(each.nbytes for each in others) + of_tables


def _shared_bytes(model: PreTrainedModel, tables: dict[str, Table]) -> int:
    """Return the bytes of tensors of tables that are those of another table."""
    states = model.hf_quantizer.quantization_config.states if is_compressed(model) else {}
    return sum(
        tables[name].tensors()[each].nbytes
        for name, state in states.items()
        if name in tables
        for each in state.shares
    )


def stored_tables(model: PreTrainedModel) -> dict[str, Table]:
    """Return a model's compressed tables in the dtypes in which they are stored, by name.

    Raises:
        ValueError: the model was trained to values that overflow a dtype.
    """
    roots = table_roots(model)
    if is_static(model):
        return {name: root.stored_table() for name, root in roots.items()}
    states = model.hf_quantizer.quantization_config.states if roots else {}
    return {name: stored_form(root, states[name]) for name, root in roots.items()}


def stored_table(model: PreTrainedModel) -> Table:
    """Return the table of a compressed model's input in the dtype in which it is stored.

    Raises:
        ValueError: the model's input is not compressed by embkern, or was trained to values that overflow the
            dtype.
    """
    return stored_form(compressed_embedding(model), model.hf_quantizer.quantization_config.table)


def stored_form(root: TableModule, state: TableState) -> Table:
    """Return the table of a module in the dtype in which it is stored.

    Raises:
        ValueError: it was trained to values that overflow the dtype.
    """
    dtype = storage_dtype(root, state)
    table = root.table.to(dtype=dtype)
    for name, live in root.tensors().items():
        stored = table.tensors()[name]
        if dtype != root.dtype and not torch.equal(stored.isfinite(), live.isfinite()):
            raise ValueError(
                f"{name}: expected values in the range of the stored dtype {dtype}, got overflow"
            )
    return table


def storage_dtype(root: TableModule, state: TableState) -> torch.dtype:
    """Return the dtype to save in: a packed table keeps the stored one unless the model's is narrower."""
    widened = torch.promote_types(root.dtype, state.stored_dtype) == root.dtype
    return state.stored_dtype if root.keeps_stored_dtype and widened else root.dtype


def is_whole(root: TableModule, state: TableState) -> bool:
    """Return whether all tensors of the table are here: none is on meta, sharded or of another shape."""
    tensors = root.tensors()
    return all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors.values()) and all(
        list(tensor.shape) == state.shapes[name] for name, tensor in tensors.items()
    )


def with_guards(state_dict: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a state dict to save, in which the name of each dense table has a tensor without values.

    A transformers that does not know embkern warns about the quantisation method and goes on. These tensors
    then stop it with a size mismatch. The tables' own names would only be unexpected, and the dense tables
    that the file lacks random.
    """
    roots = {id(root): name for name, root in table_roots(model).items()}
    states, guards = model.hf_quantizer.quantization_config.states, {}
    for path, module in model.named_modules():
        if (name := roots.get(id(module))) is not None:
            guards[f"{path}.{GUARD}"] = torch.empty(0, dtype=storage_dtype(module, states[name]))
    return {**state_dict, **guards}


def without_adjustments(
    state_dict: dict[str, Tensor], model: PreTrainedModel, *, keep: Collection[TableModule] = ()
) -> dict[str, Tensor]:
    """Return a state dict without the adjustments of tables, except those of the modules ``keep``."""
    dropped = tuple(
        f"{name}.{ADJUSTMENT}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TableModule) and module not in keep
    )
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(dropped)}


def ignore_guard(model: PreTrainedModel, root: str) -> None:
    """Let transformers load a checkpoint into a model without a report of a table's guard."""
    known: Any = model._keys_to_ignore_on_load_unexpected  # a set; in older releases a list or None
    guard = rf"(^|\.){re.escape(root.rpartition('.')[2])}\.{GUARD}$"
    model._keys_to_ignore_on_load_unexpected = (
        {*known, guard} if isinstance(known, set) else [*(known or ()), guard]
    )


def check_files(model: nn.Module, files: list[str], root: str, state: TableState) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a checkpoint, by name, without the guards.

    Args:
        model: the model that is loaded.
        files: paths of the checkpoint's files.
        root: name of the table's first module.
        state: description of the table.

    Raises:
        ValueError: the table's tensors are missing (transformers would only warn and initialise them at
            random), or differ from the description in shape or dtype.
    """
    layer, found = KINDS[state.kind], dict[str, list[int]]()
    stored = {key: each for path in files for key, each in stored_tensors(path).items()}
    owner = _owner(model, stored, root, state)
    for key, (shape, dtype) in stored.items():
        for name in layer.tensor_names:
            if key != f"{owner}.{name}":
                continue
            found[name] = shape
            # transformers would cast them silently.
            expected = layer.code_dtype(name, tuple(shape))
            known = (expected, layer.held_dtype(name, expected)) if expected else DTYPES
            if dtype not in known:
                raise ValueError(
                    "the checkpoint does not hold the compressed table its config describes: expected "
                    f"{expected or 'a floating-point dtype'} for {key}, got {dtype or 'an unknown dtype'}"
                )
    if found != {name: shape for name, shape in state.shapes.items() if name not in state.shares}:
        raise ValueError(
            f"the checkpoint does not hold the compressed table its config describes: expected "
            f"{root.rpartition('.')[2]} with shapes {state.shapes}, found {found or 'none'}"
        )
    return {
        key: shape
        for key, (shape, _) in stored.items()
        if not (shape == [0] and f".{key}".endswith(f".{GUARD}"))
    }


def _owner(model: nn.Module, stored: dict[str, Any], root: str, state: TableState) -> str | None:
    """Return the name by which a checkpoint calls a table's first module.

    Checkpoints of other architectures nest it under other prefixes, so that the longest end of ``root`` that
    is found decides. A head whose name the architecture changes in files, so that no module of the model has
    the name there, is found by its shapes.
    """
    names = KINDS[state.kind].tensor_names
    owners: dict[str, dict[str, list[int]]] = {}
    for key, (shape, _) in stored.items():
        owner, _, tensor = key.rpartition(".")
        if tensor in names:
            owners.setdefault(owner, {})[tensor] = shape
    parts = root.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if found := [owner for owner in owners if f".{owner}".endswith(f".{end}")]:
            return found[-1]
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    renamed = {owner: shapes for owner, shapes in owners.items() if owner.rpartition(".")[2] not in known}
    return next((owner for owner, shapes in renamed.items() if shapes == state.shapes), None)


# Dtypes of a table's tensors by their names in safetensors files.
_STORED_DTYPES = {
    **FLOAT_DTYPES,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def stored_tensors(path: str) -> dict[str, tuple[list[int], torch.dtype | None]]:
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


def verify(root: TableModule, state: TableState) -> None:
    """Raise ValueError if a loaded table differs from the saved one, or its tensors contradict each other.

    Floating-point tensors are verified unless the model's dtype is narrower than the stored one; a table that
    is not whole here is not verified.
    """
    if not is_whole(root, state):
        return
    tensors = root.table.tensors()
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
