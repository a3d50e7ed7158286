"""How long properties are checked: for a few cases under ``make test``, for a given time under ``make fuzz``.

``EMBKERN_FUZZ_SECONDS`` is that time, for all properties together; the number of distinct cases is printed at
the end. ``EMBKERN_FUZZ_LAST`` names a file to which the current case is written, so that it is known after a
crash of the process. ``EMBKERN_FUZZ_SEED`` is the first seed of the generators; without it a seed is drawn
and printed. Every property starts at that seed, so the case does not depend on the module that defines it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

CASES = 200  # of all properties together, under `make test`
DRAWN = 100  # cases of each property that hypothesis draws before the seeded generators take over
EXHAUSTED = 1000  # repeated cases in a row after which a property is taken to have no further ones
SECONDS = float(os.environ.get("EMBKERN_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("EMBKERN_FUZZ_SEED", secrets.randbits(48)))

settings.register_profile(
    "embkern",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
settings.load_profile("embkern")

_distinct: dict[str, set[int]] = {}
_spent: dict[str, float] = {}
_properties = 0


class _CurrentCase:
    """Writes the current case to a memory-mapped file, which survives a crash of the process."""

    def __init__(self, path: str | None) -> None:
        self.map = None
        if path:
            Path(path).write_bytes(bytes(1 << 20))
            with open(path, "r+b") as file:
                self.map = mmap.mmap(file.fileno(), 0)

    def write(self, text: str) -> None:
        if self.map is not None:
            data = text.encode(errors="replace")[: len(self.map) - 1] + b"\n"
            self.map[: len(data)] = data


_current_case = _CurrentCase(os.environ.get("EMBKERN_FUZZ_LAST"))


def _counted(name: str, check: Callable[..., None]) -> Callable[..., None]:
    seen = _distinct.setdefault(name, set())

    def call(case: dict[str, Any]) -> None:
        text = repr(case)
        _current_case.write(f"{name}({text})")
        check(case)
        seen.add(hash(text))

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    global _properties
    properties = [item for item in items if hasattr(getattr(item, "obj", None), "generate")]
    _properties = len(properties)
    for item in properties:
        count = DRAWN if SECONDS else max(1, CASES // len(properties))
        item.obj = settings(max_examples=count)(item.obj)
        item.obj.hypothesis.inner_test = _counted(item.name, item.obj.hypothesis.inner_test)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    generate = getattr(pyfuncitem.obj, "generate", None)
    if not SECONDS or generate is None:
        return (yield)
    name, check = pyfuncitem.name, pyfuncitem.obj.hypothesis.inner_test
    started = time.monotonic()
    result = yield
    _spent[name] = time.monotonic() - started
    seed, known = SEED, 0
    while time.monotonic() < started + SECONDS / _properties and known < EXHAUSTED:
        before = len(_distinct[name])
        case = generate(Random(seed))
        try:
            check(case)
        except BaseException:
            print(f"\nEMBKERN_FUZZ_SEED={seed} draws this case first:\n{name}({case!r})")
            raise
        finally:
            _spent[name] = time.monotonic() - started
        seed += 1
        known = known + 1 if len(_distinct[name]) == before else 0
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not SECONDS:
        return
    counts = {name: len(seen) for name, seen in _distinct.items()}
    terminalreporter.section("fuzzing")
    for name, count in counts.items():
        with contextlib.suppress(KeyError, ZeroDivisionError):
            terminalreporter.write_line(f"{name}: {count:,} cases, {count / _spent[name]:,.0f} a second")
    failures = len(terminalreporter.stats.get("failed", []))
    terminalreporter.write_line(
        f"{sum(counts.values()):,} cases over {len(counts)} properties, {failures} failures, seed {SEED}"
    )
