"""The op namespace, in one place: schemas, fakes and the native extension that implements them.

Schemas are defined here and not in C++, so that the ops exist, can be traced and can say what is missing
where the extension was not built. One overload per backend: ``embkern::gather_project_forward.native``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "embkern"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, *, backends: tuple[str, ...], fake: Callable) -> None:
    """Define one overload of ``name`` per backend, with ``fake`` as its shape function."""
    for backend in backends:
        overload = f"{name}.{backend}"
        LIBRARY.define(overload + schema)
        LIBRARY.impl(overload, fake, "Meta")


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """Return the raw op of one backend."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)


@functools.cache
def load_native() -> str | None:
    """Load the native extension; return None on success and the reason it cannot be used otherwise."""
    candidates = sorted(Path(__file__).parent.parent.glob("_C*.so")) + sorted(
        Path(__file__).parent.parent.glob("_C*.pyd")
    )
    if not candidates:
        return "the native extension is not built (no compiler at install time, or EMBKERN_NATIVE=0)"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return (
            f"the native extension does not load with torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None
