"""Signal to noise of codes on independent standard normal values, and the time of their encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from embkern.methods.quantizer_levels import distortion
from embkern.ops.packed_format import GROUP, LEVEL_STEP, STATE_BITS, trellis_levels

from .trellis import Sums, Trellis, best_paths, free_levels, normal_samples
from .words import drawn, lloyd_words, nearest

SAMPLES = 360_000  # values per figure; the standard error is below .02 dB
SEED = 2**31 - 1  # of the samples that no level was found with
ROW = 640
RINGS = (32, 64, 128, 384, 576, ROW)
# Bits of the groups of a row whose values have falling variance, so that each has the same squared error.
MIXED_ROW = (4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1)

_LOW = ((4,), (5,), (6,), (7,))
_MIXED = ((0, 8), (1, 9), (2, 10), (3, 11))
_OTHER = ((3, 8), (4, 9), (5, 10), (6, 11))
# The tables of `sums-4096` by bits a value, as native/decoders.h adds them. Bits 12 and 13 of a state are
# those of a value that no other value depends on.
SUMS_4096 = {
    1: Sums((_LOW, _MIXED, _OTHER)),
    2: Sums((_LOW, _MIXED, _OTHER)),
    3: Sums((_LOW, _MIXED, (*_OTHER, (12,)))),
    4: Sums((_LOW, _MIXED, _OTHER, ((12,), (13,), (2, 10), (3, 11)))),
}
_SUMS_256 = Sums((tuple((bit,) for bit in range(4)), tuple((bit,) for bit in range(4, 8))))


def trellis_of_sums(bits: int, ring: int = ROW) -> Trellis:
    """Return the trellis of `sums-4096`: windows of 12 bits of a stream of two bits a step.

    A step is a value or, at one bit, a pair of values.
    """
    return Trellis(bits, 12, ring, coded=2, values=2 if bits == 1 else 1)


def measure_rates() -> Iterator[dict[str, Any]]:
    """Yield a row per code, number of bits and ring."""
    for bits in range(1, 5):
        yield _row("scalar", bits, 1, -10 * math.log10(distortion(bits)), 0.0, None)
        levels = trellis_levels()[bits - 1 : bits].float() * LEVEL_STEP
        yield _trellis("packed/1", Trellis(bits, STATE_BITS, GROUP), levels)
    for memory in (4, 6, 7):
        yield _trellis(f"trellis-{2**memory}", *_free(Trellis(2, memory, ROW)))
    yield _trellis("trellis-128-rings", *_free(Trellis(2, 7, GROUP)))
    pairs = Trellis(2, 8, ROW)
    yield _trellis("sums-256", pairs, _SUMS_256.levels(_SUMS_256.trained(pairs), 8))
    levels_of = {}
    for bits, sums in SUMS_4096.items():
        trellis = trellis_of_sums(bits)
        whole, unit = sums.as_bytes(sums.trained(trellis), trellis.memory)
        levels_of[bits] = sums.levels(whole, trellis.memory) * unit
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


def computed_levels(bits: int) -> Tensor:
    """Return levels (1, 65536) of QTIP, 1MAD: the sum of the bytes of (34038481 s + 76625530) mod 2^32."""
    mixed = (torch.arange(2**16) * 34038481 + 76625530) % 2**32
    total = sum((mixed >> shift & 255 for shift in (8, 16, 24)), mixed & 255).float() - 510
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
