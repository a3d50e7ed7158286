"""The divergence of a compressed table from the dense one, on inputs that its calibration did not see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..fidelity import HeldOutDivergence
from ..fidelity.divergence import DenseBlock, Divergences
from ..tables import Table
from .calibrate.windows import HeldOut
from .find_table import ModelTable
from .inference import evaluating
from .table_swap import TableSwap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUES_AT_ONCE = 1 << 23  # log-probabilities of a block: 32 MB in fp32


@torch.no_grad()
def held_out_divergence(
    model: PreTrainedModel, found: ModelTable, table: Table, inputs: HeldOut, *, head: bool
) -> HeldOutDivergence | None:
    """Measure ``KL(dense || table) = (dense.exp() * (dense - table)).sum(-1)`` of the log-softmax of logits.

    The logits of one input are in memory at a time.

    Args:
        model: the dense language model, unchanged afterwards.
        found: its table.
        table: the compressed table.
        inputs: what it reads.
        head: whether a tied head uses the compressed table, too.

    Returns:
        The divergence, or None where no token is scored.
    """
    swap, divergences = TableSwap(model, table, found), Divergences()
    used = swap.inputs_and_heads if head else swap.inputs
    with evaluating(model):
        for ids, positions, _ in inputs:
            batch = torch.from_numpy(ids).to(found.weight.device)[None]
            dense = model(input_ids=batch).logits[0]
            with used():
                other = model(input_ids=batch).logits[0]
            for block in torch.from_numpy(positions).split(max(1, _VALUES_AT_ONCE // dense.shape[-1])):
                expected, got = (F.log_softmax(logits[block].float(), dim=-1) for logits in (dense, other))
                divergences.add(DenseBlock.of(expected), got)
    total = divergences.total()
    return None if total is None else HeldOutDivergence(**total.model_dump(), tokens=divergences.tokens)
