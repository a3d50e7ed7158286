"""Optional packages."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str = "evaluate") -> Any:
    """Import an optional package; the ImportError of a missing one says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here: pip install 'embkern[{extra}]' ({error})") from error
