"""Turn the errors of other libraries into messages for users."""

from __future__ import annotations

import os
import re


def disk_error(error: Exception) -> OSError | None:
    """Return the OSError that a library of Rust put into words, such as that of a full disk, if it is one."""
    found = re.search(
        r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error)
    )  # the latter before safetensors 0.5
    if found is None:
        return None
    code = int(found[1] or found[2])
    return OSError(code, os.strerror(code))


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing, its kind."""
    return str(error).strip().split("\n")[0] or repr(error)
