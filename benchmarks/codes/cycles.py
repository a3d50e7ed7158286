"""Cycles of decoders for 32 values, while they multiply rows of 640 values with one vector."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from .compiler import available_sets, compiled, is_x86

_MOST = 64  # decoders


class _Result(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("bits", ctypes.c_int32),
        ("right", ctypes.c_int32),
        ("ticks", ctypes.c_double),
        ("ticks_of_integers", ctypes.c_double),
    )


def measure_decoders(repeats: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return a row per instruction set, decoder and number of bits.

    ``cycles`` is the time with products in fp32, ``cycles_of_integers`` that with products of integers where
    levels are bytes. Both are the least of ``repeats`` runs of a few microseconds on 16 rows in L1, in ticks
    of the time-stamp counter, divided by the ticks that a cycle of the core took in a chain of additions.
    """
    rows: list[dict[str, Any]] = []
    rate = _ticks_per_nanosecond() if is_x86() else 0.0
    for name, flags in (available_sets() if is_x86() else {}).items():
        library = compiled("measure.cpp", flags)
        library.ticks_per_cycle.restype = ctypes.c_double
        results = (_Result * _MOST)()
        count = library.measure(repeats, seed, results)
        per_cycle = library.ticks_per_cycle(repeats)
        for each in results[:count]:
            rows.append(
                {
                    "kind": "cycles",
                    "decoder": each.name.decode(),
                    "bits": each.bits,
                    "set": name,
                    "right": bool(each.right),
                    "cycles": round(each.ticks / per_cycle, 2),
                    "cycles_of_integers": round(each.ticks_of_integers / per_cycle, 2) or None,
                    "nanoseconds": round(each.ticks / rate, 3),
                    "ticks_per_cycle": round(per_cycle, 4),
                }
            )
    return rows


def _ticks_per_nanosecond() -> float:
    """Return the rate of the time-stamp counter."""
    library = compiled("measure.cpp", next(iter(available_sets().values())))
    library.ticks.restype = ctypes.c_uint64
    start, ticks = time.perf_counter_ns(), library.ticks()
    time.sleep(0.05)
    later, now = time.perf_counter_ns(), library.ticks()
    return float(now - ticks) / (later - start)
