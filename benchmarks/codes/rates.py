"""Signal to noise of codes on independent standard normal values, and the time of their encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.methods.quantizer_levels import distortion
from embkern.ops.packed_codes import GROUP, LEVEL_BITS, LEVELS_PER_UNIT

from .sums import ROW, SUMS_4096, Sums, packed_entries, trellis_of_sums
from .trellis import Trellis, best_paths, free_levels, normal_samples, sums_of_bytes
from .words import drawn, lloyd_words, nearest

SAMPLES = 360_000  # values per figure; the standard error is below .02 dB
SEED = 2**31 - 1  # of the samples that no level was found with
RINGS = (32, 64, 128, 384, 576, ROW)
# Bits of the groups of a row whose values have falling variance, so that each has the same squared error.
MIXED_ROW = (4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1)

_FIRST_EDITION = Path(__file__).parent / "first_edition_levels.txt"
_SUMS_256 = Sums((tuple((bit,) for bit in range(4)), tuple((bit,) for bit in range(4, 8))))


def measure_rates() -> Iterator[dict[str, Any]]:
    """Yield a row per code, number of bits and ring."""
    for bits in range(1, 5):
        yield _row("scalar", bits, 1, -10 * math.log10(distortion(bits)), 0.0, None)
        yield _trellis("packed/1", Trellis(bits, 7, GROUP), first_edition_levels(bits))
    for memory in (4, 6, 7):
        yield _trellis(f"trellis-{2**memory}", *_free(Trellis(2, memory, ROW)))
    yield _trellis("trellis-128-rings", *_free(Trellis(2, 7, GROUP)))
    pairs = Trellis(2, 8, ROW)
    yield _trellis("sums-256", pairs, _SUMS_256.levels(_SUMS_256.trained(pairs), 8))
    levels_of = {}
    for bits, sums in SUMS_4096.items():
        levels_of[bits] = sums.levels(packed_entries(bits), trellis_of_sums(bits).memory) / LEVELS_PER_UNIT
        for ring in RINGS if bits <= 2 else (ROW,):
            yield _trellis("sums-4096", trellis_of_sums(bits, ring), levels_of[bits])
    yield from _mixed_row(levels_of)
    yield _trellis("gathered-4096", *_free(Trellis(2, 12, ROW)))
    for bits in (2, 4):
        yield _trellis("computed-65536", Trellis(bits, 16, ROW), computed_levels(bits))
    yield _words("pairs", 2, 16, signs=False)
    yield _words("quadruples", 4, 256, signs=False)
    yield _words("eights", 8, 256, signs=True)


def _mixed_row(levels_of: dict[int, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a row per number of bits: `sums-4096` in one ring through groups of 4 to 1 bits."""
    each, kinds = [], [(levels_of[bits], 4.0**bits) for bits in range(1, 5)]
    for bits in MIXED_ROW:
        each += [bits - 1] * (GROUP // 2 if bits == 1 else GROUP)
    bits_of_values = torch.tensor(MIXED_ROW).repeat_interleave(GROUP)
    samples = normal_samples(len(bits_of_values), 2 * SAMPLES, SEED)
    states = best_paths(samples, torch.tensor(each), kinds, coded=2, window=12)
    decoded = torch.cat([kinds[kind][0][:, states[:, step]].T for step, kind in enumerate(each)], 1)
    for bits in range(1, 5):
        own = bits_of_values == bits
        measured = _signal_to_noise(samples[:, own], decoded[:, own])
        yield _row("sums-4096, mixed", bits, ROW, *measured, None)


def first_edition_levels(bits: int) -> Tensor:
    """Return the levels (1, 128) of the first edition of the format, which are part of its tables."""
    lines = _FIRST_EDITION.read_text(encoding="ascii").splitlines()
    numbers = [int(each) for line in lines if not line.startswith("#") for each in line.split()]
    return torch.tensor(numbers).view(LEVEL_BITS, -1)[bits - 1 : bits] / 4096


def computed_levels(bits: int) -> Tensor:
    """Return levels (1, 65536) of QTIP, 1MAD: the sum of the bytes of (34038481 s + 76625530) mod 2^32."""
    total = sums_of_bytes(34038481, 76625530).float() - 510
    return (total / total.std() * math.sqrt(1 - 4.0**-bits))[None]


def _free(trellis: Trellis) -> tuple[Trellis, Tensor]:
    return trellis, free_levels(trellis)


def _trellis(code: str, trellis: Trellis, levels: Tensor) -> dict[str, Any]:
    samples = normal_samples(trellis.ring, SAMPLES, SEED)
    return _measured(
        code,
        trellis.bits,
        trellis.ring,
        samples,
        lambda given: trellis.decoded(trellis.states(given, levels), levels),
    )


def _words(code: str, values: int, count: int, *, signs: bool) -> dict[str, Any]:
    words = lloyd_words(values, count, signs)
    samples = drawn(SAMPLES // values, values, signs, torch.Generator().manual_seed(SEED))
    return _measured(code, 2, values, samples, lambda given: words[nearest(given, words)])


def _measured(
    code: str, bits: int, ring: int, samples: Tensor, coded: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return the row of a code, with the processor time of ``coded``."""
    coded(samples[:1])  # compiles the encoder
    start = time.process_time()
    decoded = coded(samples)
    seconds = (time.process_time() - start) / samples.numel() * 1e6
    return _row(code, bits, ring, *_signal_to_noise(samples, decoded), seconds)


def _signal_to_noise(samples: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Return a ratio in dB, of two means over independent rings, and its standard error."""
    noise, signal = (each.square().double().mean(1) for each in (samples - decoded, samples))
    ratio = float(noise.mean() / signal.mean())
    deviation = float((noise - ratio * signal).std()) / math.sqrt(len(noise)) / float(noise.mean())
    return -10 * math.log10(ratio), 10 / math.log(10) * deviation


def _row(
    code: str, bits: int, ring: int, rate: float, deviation: float, seconds: float | None
) -> dict[str, Any]:
    return {
        "kind": "rate",
        "code": code,
        "bits": bits,
        "ring": ring,
        "decibels": round(rate, 3),
        "standard_error": round(deviation, 4),
        "encoding_seconds_per_million": None if seconds is None else round(seconds, 3),
    }
