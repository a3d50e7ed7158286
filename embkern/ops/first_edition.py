"""Values of tables of the format ``embkern.packed/1``, which embkern reads and no longer writes.

All groups are stored as bit planes: bit i of a group's word p is bit p of the code of value i. The level of a
code of 1 to 4 bits follows from a state of 7 bits, its own and those of the codes before it; each group is a
ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed_codes import GROUP, LEVEL_BITS, MAX_BITS, ShiftRight, taken

LEVELS_SHAPE = (4, 128)
LEVELS_DTYPES = (torch.int16, torch.int32)  # of files, and of state dicts that modules have made
_LEVELS_PER_UNIT = 4096
_STATE_BITS = 7
_WORD = 2**32 - 1


def is_first_edition(levels: Tensor) -> bool:
    """Return whether a table with these levels is of the first edition."""
    return levels.dtype in LEVELS_DTYPES


def op_of(name: str, levels: Tensor) -> str:
    """Return the op that serves tables with these levels: for the first edition, one that has no kernels."""
    return f"{name} of tables of the first edition" if is_first_edition(levels) else name


def values_of_records(
    records: Tensor, start: Tensor, tier: Tensor, bits: Tensor, levels: Tensor, shift_right: ShiftRight
) -> Tensor:
    """Return the values (N, 32 G) fp32 of records, with levels (4, 128) in steps of 2^-12.

    The other arguments are those of ``packed_codes.values_of_records``.
    """
    lane = torch.arange(GROUP, device=records.device)
    plane = torch.arange(MAX_BITS, device=records.device)
    width = bits.unsqueeze(2)
    own = width <= LEVEL_BITS
    # Bit k of the index of a value: of its state or, beyond four bits, of its code. It is a bit of the code
    # `before` lanes earlier.
    planes = torch.where(own, width.clamp(min=1), MAX_BITS)
    used = torch.where(width == 0, 0, torch.where(own, _STATE_BITS, width)) > plane
    place, before = width.cumsum(1) - width + plane % planes, plane // planes
    used, place, before = (taken(each, tier) for each in (used, place, before))
    words = taken(records, torch.where(used, start.view(-1, 1, 1) + place, 0)).long() & _WORD
    index = torch.zeros((), dtype=torch.int64, device=records.device)
    for each in range(MAX_BITS):
        from_lane = (lane - before[:, :, each : each + 1]) % GROUP
        bit = shift_right(words[:, :, each : each + 1], from_lane) % 2
        index = index + torch.where(used[:, :, each : each + 1], bit * (1 << each), 0)
    width, own = bits[tier].unsqueeze(2), (bits[tier].unsqueeze(2) <= LEVEL_BITS)
    row = (width - 1).clamp(0, LEVEL_BITS - 1)
    level = taken(levels.flatten(), row * LEVELS_SHAPE[1] + index % LEVELS_SHAPE[1]).float()
    uniform = index.float() - (2**width - 1).float() / 2
    value = torch.where(own, level / _LEVELS_PER_UNIT, uniform)
    return torch.where(width > 0, value, 0.0).flatten(1)
