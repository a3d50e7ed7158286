"""Codes of 1 to 8 bits as one stream of bits: code k has the bits ``k * bits`` to ``k * bits + bits - 1``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1 << 18  # codes that are packed at a time, a multiple of 8


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the stream of codes, bit i of byte j being bit ``8 j + i``.

    Args:
        codes: integers below ``2**bits``, of any shape, in the order of their memory.
        bits: 1 to 8.

    Returns:
        (ceil(codes.numel() * bits / 8),) uint8.
    """
    flat = codes.reshape(-1)
    parts = [_packed_block(some, bits) for some in flat.split(_BLOCK)]
    return torch.cat(parts)[: packed_bytes(len(flat), bits)]


def _packed_block(codes: Tensor, bits: int) -> Tensor:
    """Return the stream of codes, up to a multiple of 8 of them: their bits fill whole bytes."""
    groups = F.pad(codes.long(), (0, -len(codes) % 8)).view(-1, 8)
    shifts = torch.arange(8, device=codes.device)
    words = (groups << bits * shifts).sum(1)  # of at most 64 bits, the highest of which is the sign
    parts: Tensor = words.unsqueeze(1) >> 8 * shifts[:bits]
    return parts.bitwise_and(255).to(torch.uint8).reshape(-1)


def codes_at(stream: Tensor, places: Tensor, bits: int) -> Tensor:
    """Return the codes number ``places`` (any shape, int64) of a stream, int32."""
    if bits == 8:
        return stream[places].int()
    first = places * bits
    byte, shift = first >> 3, (first & 7).int()
    window = stream[byte].int()
    if 8 % bits:  # codes may cross the end of a byte
        window = window | stream[(byte + 1).clamp_max(len(stream) - 1)].int() << 8
    codes: Tensor = window >> shift & 2**bits - 1
    return codes


def codes_of_rows(stream: Tensor, ids: Tensor, per_row: int, bits: int) -> Tensor:
    """Return the codes of rows that have ``per_row`` codes each, ids (n,) int64: (n, per_row) int32."""
    places = ids.unsqueeze(1) * per_row + torch.arange(per_row, device=ids.device)
    return codes_at(stream, places, bits)


def rows_taken(stream: Tensor, ids: Tensor, per_row: int, bits: int) -> Tensor:
    """Return the stream of the rows ids (n,) int64, of which there is at least one, in their order."""
    parts = [codes_of_rows(stream, some, per_row, bits) for some in ids.split(max(1, _BLOCK // per_row))]
    return pack_codes(torch.cat([part.to(torch.uint8) for part in parts]), bits)
