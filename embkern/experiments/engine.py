"""The cache of experimental results: a JSON file per result, used again while nothing it depends on changed.

A result is stored with its dependencies, and found by their hash. It is written whole or not at all, with a
checksum. A file that is damaged is logged and counts as missing, so that the result is measured again.
"""

from __future__ import annotations

import abc
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ..io.atomic import replacing
from ..io.checked_json import read_checked_json, to_checked_json

_log = logging.getLogger(__name__)


class Result(BaseModel, abc.ABC):
    """A measurement as its file holds it, together with what it depends on."""

    @abc.abstractmethod
    def dependencies(self) -> dict[str, Any]:
        """Return everything that the measurement follows from, as JSON can hold it."""

    def is_final(self) -> bool:
        """Return False if the next run has to measure it again."""
        return True


AnyResult = TypeVar("AnyResult", bound=Result)


def key_of(dependencies: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of dependencies, whatever the order of their names."""
    text = json.dumps(dependencies, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_result(path: Path, kind: type[AnyResult], dependencies: dict[str, Any]) -> AnyResult | None:
    """Return the result in a file, or None if it has to be measured.

    That is the case if there is no file, if it is damaged (which is logged), if it holds a result with other
    dependencies, or if the result is not final.
    """
    if not path.is_file():
        return None
    try:
        result = kind.model_validate(read_checked_json(path))
        result.model_dump_json()  # fails for a lone surrogate, which Python's str can hold and UTF-8 cannot
    except ValueError as error:
        _log.warning("%s is damaged and is measured again (%s)", path, str(error).split("\n")[0])
        return None
    return result if result.is_final() and result.dependencies() == dependencies else None


def write_result(path: Path, result: Result) -> None:
    """Write a result, and the directory that holds it.

    Raises:
        OSError: the file cannot be written; one that was there is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(to_checked_json(result), encoding="utf-8")
