"""The user's cache directory, for files that can be regenerated."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return ``$EMBKERN_CACHE``, else ``$XDG_CACHE_HOME/embkern``, else ``~/.cache/embkern``.

    The directory need not exist. An empty variable counts as unset, and so does an ``XDG_CACHE_HOME`` that is
    not absolute, as the XDG base directory specification requires.
    """
    if own := os.environ.get("EMBKERN_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "embkern"
