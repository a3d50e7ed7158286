"""JSON objects whose last entry is a checksum of the others."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_KEY = "checksum"


def to_checked_json(content: BaseModel | dict[str, Any], indent: int = 1) -> str:
    """Return an object or a pydantic model as JSON with a checksum, for ``read_checked_json``."""
    plain = json.loads(content.model_dump_json()) if isinstance(content, BaseModel) else content
    return json.dumps({**plain, _KEY: _checksum(plain)}, indent=indent) + "\n"


def read_checked_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object in a file that ``to_checked_json`` wrote, without its checksum.

    A file without a checksum is accepted, as the first ones had none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a JSON object, or its checksum differs.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is damaged: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {type(content).__name__}")
    stated = content.pop(_KEY, None)
    if stated is not None and stated != (got := _checksum(content)):
        raise ValueError(f"{path} is damaged or edited: expected {_KEY} {stated}, got {got}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return f"crc32:{zlib.crc32(text.encode()):08x}"
