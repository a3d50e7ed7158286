"""The category of embkern's warnings, and messages from the errors of other libraries."""

from __future__ import annotations

import os
import re


class EmbkernWarning(UserWarning):
    """A warning of embkern about what it was given."""


def disk_error(error: Exception) -> OSError | None:
    """Return the OSError that a Rust library (safetensors, tokenizers) reports as text, or None."""
    # The second form is that of safetensors before 0.5.
    found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    if found is None:
        return None
    code = int(found[1] or found[2])
    return OSError(code, os.strerror(code))


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its ``repr`` if the message is empty."""
    return str(error).strip().split("\n")[0] or repr(error)
