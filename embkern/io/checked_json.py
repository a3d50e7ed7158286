"""JSON that notices damage: an object with a checksum of the rest as its last entry."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_KEY = "checksum"


def to_checked_json(content: BaseModel | dict[str, Any], indent: int = 1) -> str:
    """Return JSON of an object, or of a model, with a checksum, for ``read_checked_json``."""
    plain = json.loads(content.model_dump_json()) if isinstance(content, BaseModel) else content
    return json.dumps({**plain, _KEY: _checksum(plain)}, indent=indent) + "\n"


def read_checked_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object of a file of ``to_checked_json``, or of one from before there were checksums.

    Raises:
        ValueError: it is damaged or edited.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {type(content).__name__}")
    expected = content.pop(_KEY, None)
    if expected is not None and expected != (got := _checksum(content)):
        raise ValueError(f"{path} is damaged or edited: expected {_KEY} {expected}, got {got}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return f"crc32:{zlib.crc32(text.encode()):08x}"
