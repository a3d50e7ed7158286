"""The codes of a packed table's records, and the values that they stand for.

docs/packed-format.md specifies both. Groups of 1 to 4 bits share a stream of 2 bits a step, which is a ring.
The level of a value follows from the window of its step: 12 bits, its own and those of the next five steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROUP = 32  # This many values share the words of a record, and this many rows an entry of the directory.
MAX_BITS = 8
LEVEL_BITS = 4  # Codes of up to 4 bits have levels, wider ones are uniform.
STEP_BITS, WINDOW_BITS = 2, 12  # of a step in the stream, and of its window
LEVELS_SHAPE = (17, 16)
LEVELS_PER_UNIT = 32
LEVELS_FILE = Path(__file__).parent.parent / "data" / "packed_levels.txt"
_TABLES = {1: 6, 2: 3, 3: 4}  # of levels, by bits; those of 4 bits are the last ones
_WORD = 2**32 - 1
_WINDOWS = 2**WINDOW_BITS
_STEPS_PER_WORD = 32 // STEP_BITS

# ``shift_right(words, places)`` of whole numbers from 0 to 2^63, int64.
ShiftRight = Callable[[Tensor, Tensor], Tensor]


def shift_by_division(words: Tensor, places: Tensor) -> Tensor:
    """``words >> places`` for ONNX, whose shifts have no sign: there a shift takes ten operators."""
    return words // 2**places


@functools.cache
def packed_levels() -> Tensor:
    """Levels (17, 16) int8 of codes of 1 to 4 bits for standard normal values, in steps of 2^-5.

    Found by Lloyd's iteration over best paths: 1.2 to 2.9 dB less error than Lloyd-Max levels, which miss the
    bound of any code, 4^-bits, by 1.6 to 3.9 dB (`python -m benchmarks codes`).
    """
    lines = LEVELS_FILE.read_text(encoding="ascii").splitlines()
    rows = [[int(each) for each in line.split()] for line in lines if not line.startswith("#")]
    return torch.tensor(rows, dtype=torch.int8)


# ---- the order of values -----------------------------------------------------------------------------


class Lanes(NamedTuple):
    """Where the bits of the 32 values of a group lie; each (32,) int64.

    Attributes:
        step: of the group, for 2 to 4 bits: the values of 4 x 4 are transposed.
        pair_step: of the group, for 1 bit.
        place_in_pair: of the two values of such a step.
        third_bit: the bit of the group's further word, for 3 bits.
        upper_word, upper_shift: where the upper two bits begin, for 4 bits.
    """

    step: Tensor
    pair_step: Tensor
    place_in_pair: Tensor
    third_bit: Tensor
    upper_word: Tensor
    upper_shift: Tensor


def lanes(device: torch.device | None = None) -> Lanes:
    """Return the places of value ``16 q + 4 j + m``."""
    value = torch.arange(GROUP, device=device)
    q, j, m = value // 16, value // 4 % 4, value % 4
    return Lanes(16 * q + 4 * m + j, 4 * m + j, q, 8 * j + 4 * q + m, q, 8 * m + 2 * j)


# ---- records -----------------------------------------------------------------------------------------


class Sections(NamedTuple):
    """Words of the record of each tier: of its ring (T,), and where those of its groups begin (T, G)."""

    ring: Tensor
    stream: Tensor
    further: Tensor
    planes: Tensor


def sections(bits: Tensor) -> Sections:
    """Return the sections of tiers with bits (T, G) int64 in their groups."""
    own = (bits > 0) & (bits <= LEVEL_BITS)
    stream = torch.where(own, bits.clamp(max=STEP_BITS), 0)
    further = torch.where(own, (bits - STEP_BITS).clamp(min=0), 0)
    planes = torch.where(own, 0, bits)
    ring = stream.sum(1)
    before_planes = ring + further.sum(1)
    return Sections(
        ring,
        stream.cumsum(1) - stream,
        ring.unsqueeze(1) + further.cumsum(1) - further,
        before_planes.unsqueeze(1) + planes.cumsum(1) - planes,
    )


def records_of(codes: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return the records (n, W) int32 of rows with codes (n, 32 G) uint8 of ``bits`` in each group."""
    values, place = codes.numpy(), lanes()
    records = np.zeros((len(codes), sum(bits)), dtype="<u4")
    _, stream, further, planes = (each[0].tolist() for each in sections(torch.tensor([bits or (0,)])))
    for group, width in enumerate(bits):
        own = values[:, GROUP * group : GROUP * (group + 1)]
        if width > LEVEL_BITS:
            for plane in range(width):
                octets = np.packbits(own >> plane & 1, axis=1, bitorder="little")
                records[:, planes[group] + plane] = octets.view("<u4")[:, 0]
            continue
        at, upper = stream[group], own >> STEP_BITS
        if width == 1:
            records[:, at] = _placed(own, 2 * place.pair_step + place.place_in_pair)
        elif width:
            for word, steps in enumerate(place.step.view(2, GROUP // 2)):
                part = own[:, GROUP // 2 * word :][:, : GROUP // 2] & 3
                records[:, at + word] = _placed(part, 2 * (steps % _STEPS_PER_WORD))
        if width == 3:
            records[:, further[group]] = _placed(upper, place.third_bit)
        elif width == LEVEL_BITS:
            for word, shifts in enumerate(place.upper_shift.view(2, GROUP // 2)):
                part = upper[:, GROUP // 2 * word :][:, : GROUP // 2]
                records[:, further[group] + word] = _placed(part, shifts)
    return torch.from_numpy(records.view("<i4").astype(np.int32, copy=False))


def _placed(codes: np.ndarray, places: Tensor) -> np.ndarray:
    """Words (n,) of codes (n, k), each shifted to its place."""
    words: np.ndarray = np.bitwise_or.reduce(
        codes.astype(np.uint32) << places.numpy().astype(np.uint32), axis=1
    )
    return words


# ---- values ------------------------------------------------------------------------------------------


def values_of_records(
    records: Tensor,
    start: Tensor,
    tier: Tensor,
    bits: Tensor,
    levels: Tensor,
    shift_right: ShiftRight = torch.bitwise_right_shift,
) -> Tensor:
    """Return the values (N, 32 G) fp32 of records.

    Args:
        records: (W,) int32.
        start: (N,), where they begin.
        tier: (N,), their tiers.
        bits: (T, G) int64.
        levels: (17, 16) int8.
        shift_right: the operator.
    """
    at, width = sections(bits), bits[tier].unsqueeze(2)
    own = (width > 0) & (width <= LEVEL_BITS)
    lane = lanes(records.device)

    def words(first: Tensor, count: int, used: Tensor, ring: Tensor | None = None) -> Tensor:
        """Words (N, G, count) from `first` (T, G) of the record on, at least 0; any word where not used."""
        places = first.unsqueeze(2) + torch.arange(count, device=records.device)
        if ring is not None:
            places = places % ring.clamp(min=1).view(-1, 1, 1)
        places = torch.where(used, start.view(-1, 1, 1) + taken(places, tier), 0)
        return taken(records, places).long() & _WORD

    stream = words(at.stream, 3, own, at.ring)
    pairs = stream[:, :, :2] + stream[:, :, 1:] % _WINDOWS * (_WORD + 1)
    places = STEP_BITS * torch.arange(_STEPS_PER_WORD, device=records.device)
    windows = shift_right(pairs.unsqueeze(3), places).flatten(2) % _WINDOWS  # (N, G, 32), of steps
    one = width == 1
    window = torch.where(one, windows[:, :, lane.pair_step], windows[:, :, lane.step])

    more = words(at.further, 2, own & (width - STEP_BITS > torch.arange(2, device=records.device)))
    third = shift_right(more[:, :, :1], lane.third_bit) % 2
    upper = shift_right(more[:, :, lane.upper_word], lane.upper_shift) % 4
    further = torch.where(width == LEVEL_BITS, upper, torch.where(width == 3, third, 0))
    value = _levels_of(window, torch.where(one, lane.place_in_pair, further), width, levels)

    wide = width > LEVEL_BITS
    plane = torch.arange(MAX_BITS, device=records.device)
    planes = words(at.planes, MAX_BITS, wide & (width > plane))
    code = torch.zeros_like(window)
    for each in range(MAX_BITS):
        bit = shift_right(planes[:, :, each : each + 1], torch.arange(GROUP, device=records.device)) % 2
        code = code + torch.where(width > each, bit * (1 << each), 0)
    uniform = code.float() - ((2**width - 1).float() / 2)
    scaled = value.float() / LEVELS_PER_UNIT
    return torch.where(wide, uniform, torch.where(own, scaled, 0.0)).flatten(1)


def _levels_of(window: Tensor, further: Tensor, width: Tensor, levels: Tensor) -> Tensor:
    """Levels (N, G, 32) of windows and further bits (N, G, 32), for 1 to 4 bits (N, G, 1)."""
    own, later = window % 16, window // 256
    mixed = own ^ later
    first = torch.where(width == 1, 3 * further, 0)  # the first of the tables of so many bits
    for bits, tables in _TABLES.items():
        first = first + torch.where(width > bits, tables, 0)
    flat, columns = levels.flatten().int(), LEVELS_SHAPE[1]
    total = taken(flat, first * columns + window // 16 % 16)
    total = total + taken(flat, (first + 1) * columns + mixed)
    third = first + 2 + torch.where(width == 3, further, 0)
    total = total + taken(flat, third * columns + (window // 8 % 16 ^ later))
    fourth = torch.where(width == LEVEL_BITS, 16 * columns + further + mixed // 4 * 4, 0)
    total = total + torch.where(width == LEVEL_BITS, taken(flat, fourth), 0)
    return (total + 128) % 256 - 128  # as bytes are added


def levels_of_windows(levels: Tensor) -> list[Tensor]:
    """Return the levels (E, 4096) fp32 in units of values, for 1 to 4 bits, of levels (17, 16).

    E is 2 for the two values of a step of 1 bit, and otherwise 2 to the power of the further bits.
    """
    windows, found = torch.arange(_WINDOWS, device=levels.device), []
    for bits, count in zip(range(1, LEVEL_BITS + 1), (2, 1, 2, 4), strict=True):
        further = torch.arange(count, device=levels.device).view(count, 1, 1)
        width = torch.tensor([[[bits]]], device=levels.device)
        own = _levels_of(windows.expand(count, 1, -1), further, width, levels)
        found.append(own.squeeze(1).float() / LEVELS_PER_UNIT)
    return found


def taken(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[index]``, which an exporter translates to a gather of rows."""
    return tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])
