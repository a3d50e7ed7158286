"""The rows of a study: what each depends on, and the file in which it is kept once it is measured."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..experiments.environment import environment_in_words
from ..files import replacing
from ..json_file import read_checked_json, to_checked_json

DENSE = "dense"  # the method of rows about the model as it is
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*_Pooling/*.json")
_NOT_OF_THE_MODEL = ("embkern_report.json", "embkern_files.json")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A row that is to be measured.

    Attributes:
        measure: what is measured, a name in ``embkern.study.measures``.
        method: as it was asked for, such as ``svd:center=true``; ``dense`` for the model as it is.
        ratio: bytes of the table over bytes of what replaces it, as asked for.
        depends: everything the result follows from; the row's id is its hash.
    """

    measure: str
    method: str
    ratio: float | None
    depends: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """12 hexadecimal digits, the same for the same dependencies."""
        text = json.dumps(self.depends, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Row(BaseModel):
    """One measurement: what it depends on, what came of it, and the command that repeats it."""

    model_config = ConfigDict(extra="forbid")

    id: str
    measure: str
    method: str
    ratio: float | None
    depends: dict[str, Any]
    command: str = Field(description="measures this row again, and only this one")
    result: dict[str, Any] | None = None
    reason: str | None = Field(None, description="why there is no result")
    passing: bool = Field(False, description="the reason may pass: a package can be installed")
    seconds: float = Field(description="spent measuring, the method itself not counted")
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    environment: dict[str, str] = Field(default_factory=environment_in_words)


class RowFiles:
    """The rows of a directory, a JSON file each. One is there whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, plan: Plan) -> Row | None:
        """Return the row of a plan if it is there, not damaged, and not to be tried again."""
        path = self._path(plan.id)
        if not path.is_file():
            return None
        try:
            row = Row.model_validate(read_checked_json(path))
            row.model_dump_json()  # a report needs that: half a surrogate pair is text in Python alone
        except ValueError:
            _log.warning("%s is damaged and is measured again", path)
            return None
        if row.passing or row.depends != plan.depends:
            return None
        return row.model_copy(update={"method": plan.method})  # as it is written this time

    def put(self, row: Row) -> None:
        """Write a row."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(row.id)) as temporary:
            temporary.write_text(to_checked_json(row), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def model_fingerprint(source: str | os.PathLike, commit: str | None) -> str:
    """Return a hash of a model directory's weights, configs and tokenizer; of a hub model, its commit."""
    if not Path(source).is_dir():
        return f"{source}@{commit}"
    found = {path for pattern in _MODEL_FILES for path in Path(source).glob(pattern) if path.is_file()}
    return _hash_of_files(path for path in sorted(found) if path.name not in _NOT_OF_THE_MODEL)


def text_fingerprint(source: str | os.PathLike) -> str:
    """Return a hash of a file or of the files in a directory; the name of a data set stands for itself."""
    path = Path(source)
    if path.is_dir():
        return _hash_of_files(sorted(each for each in path.rglob("*") if each.is_file()))
    return _hash_of_files([path]) if path.exists() else str(source)


def _hash_of_files(paths: Any) -> str:
    """Hash names and contents, not the directory: a copy elsewhere is the same."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:32]}"
