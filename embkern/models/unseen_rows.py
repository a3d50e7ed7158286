"""Keep the rows that a compressed table does not store in a file beside the model, and restore them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..io.atomic import new_file
from ..methods.base import table_checksum
from ..recipe import Recipe
from ..tables import Table
from ..tables.kept_rows import KeptRowsTable
from ..tables.unseen_rows import UnseenRows
from .find_table import ModelTable
from .plan import TablePlan
from .swap import table_roots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_keeps_unseen(
    path: str | os.PathLike, recipe: Recipe, plans: Sequence[TablePlan], overwrite: bool
) -> None:
    """Raise unless a compression can keep its unseen rows in a file; for use before the work.

    Raises:
        ValueError: the recipe stores all rows, or compresses several tables.
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the file cannot be written.
    """
    if not (recipe.method == "prune" or recipe.leaves_rows_out):
        raise ValueError(
            "keep_unseen: expected method 'prune', or 'allocate' with unseen='mean' or 'nearest', "
            f"got {recipe.method!r}, which stores all rows"
        )
    if len(plans) > 1:
        raise ValueError(f"keep_unseen: expected one table to compress, got {len(plans)}")
    new_file(path, overwrite, "keep_unseen")


def keep_unseen_rows(path: str | os.PathLike, table: ModelTable, compressed: Table) -> str:
    """Write the rows that a compressed table does not store to a file; return the dense table's checksum.

    Raises:
        ValueError: all rows are stored.
        OSError: the file cannot be written, for example to a full disk.
    """
    if not isinstance(compressed, KeptRowsTable) or compressed.kept == compressed.num_embeddings:
        raise ValueError("keep_unseen: expected tokens that are not read, got none")
    source = table_checksum(table.rows)
    UnseenRows.of(table.rows, compressed, source).save(path)
    return source


@torch.no_grad()
def restore_rows(model: PreTrainedModel, rows: UnseenRows | str | os.PathLike) -> PreTrainedModel:
    """Make a model dense again, with the rows that its compressed table does not store, in place.

    ``model.dequantize()``, then ``weight[rows.ids] = rows.rows``. Rows that the table keeps are those it
    decodes to: after ``prune`` the original ones, so that an untrained table has its original bits. Ids that
    the model lost since in ``resize_token_embeddings`` are left out.

    Args:
        model: a model that was compressed with ``keep_unseen``.
        rows: the file that ``keep_unseen`` named, or its content.

    Returns:
        The model, which is dense.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another model, or the model is not compressed or all of its
            rows are stored. The model is unchanged.
    """
    name = "the given ones" if isinstance(rows, UnseenRows) else os.fspath(rows)
    rows = rows if isinstance(rows, UnseenRows) else UnseenRows.load(rows)
    roots = table_roots(model)
    states = model.hf_quantizer.quantization_config.states if roots else {}
    known = {state.source: root for root, state in states.items() if state.source is not None}
    if not known:
        raise ValueError(
            "model: expected one that was compressed with keep_unseen (--keep-unseen), got "
            + ("one that was compressed without" if roots else "a dense one")
        )
    if rows.source not in known:
        raise ValueError(
            f"rows: expected those of the table {', '.join(known)}, from which the model was compressed, "
            f"got those of {rows.source} in {name}, another model's"
        )
    root = roots[known[rows.source]]
    path = next(path for path, module in model.named_modules() if module is root)
    if rows.rows.shape[1] != root.shape[1]:
        raise ValueError(f"rows: expected {root.shape[1]} columns, got {rows.rows.shape[1]} in {name}")
    dense = model.dequantize()
    weight = dense.get_submodule(path).weight
    here = rows.ids < len(weight)
    ids = rows.ids[here].long().to(weight.device)
    weight.index_copy_(0, ids, rows.rows[here].to(weight))
    return dense
