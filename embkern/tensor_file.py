"""Named tensors in a safetensors file, with settings, and with checksums that notice damage."""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing

T = TypeVar("T")


@dataclass(frozen=True)
class TensorFormat:
    """A kind of safetensors file, whose metadata has its name, settings and checksums.

    Attributes:
        name: of the format and its version, such as ``embkern.factors/1``.
        content: what a file holds, in a few words.
        required: names of the tensors that each file has, and
        optional: of those that some have.
        settings: names of values of JSON.
        checked: those of the settings that have a checksum as tensors have; whole numbers.
    """

    name: str
    content: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike, tensors: Mapping[str, Tensor], **settings: Any) -> None:
        """Write one file; a file already there is replaced whole or not at all."""
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        checked = {**stored, **{name: _tensor(settings[name]) for name in self.checked}}
        metadata = {
            "format": self.name,
            **{name: json.dumps(settings[name]) for name in self.settings},
            "checksums": json.dumps({name: checksum(tensor) for name, tensor in checked.items()}),
        }
        with replacing(path) as temporary:
            save_file(stored, temporary, metadata)

    def load(self, path: str | os.PathLike, build: Callable[[dict[str, Any], dict[str, Any]], T]) -> T:
        """Return ``build(tensors, settings)`` of a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, edited, of another format, or ``build`` raises a ValueError, a
                TypeError or a KeyError; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file of {self.content}, found none at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
        if (got := metadata.get("format")) != self.name:
            raise ValueError(f"{path}: expected format {self.name!r}, got {got!r}")
        try:
            settings = {name: json.loads(metadata[name]) for name in self.settings}
            checked = {**tensors, **{name: _tensor(settings[name]) for name in self.checked}}
            checksums = json.loads(metadata["checksums"])
            if not isinstance(checksums, dict):
                raise TypeError(f"checksums: expected those of tensors by name, got {checksums!r}")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: its metadata is damaged ({error!r})") from error
        known = set(self.required) <= set(tensors) <= {*self.required, *self.optional}
        if not known or set(checked) != set(checksums):
            perhaps = f" and perhaps {', '.join(self.optional)}" if self.optional else ""
            raise ValueError(f"{path}: expected {', '.join(self.required)}{perhaps}, got {sorted(tensors)}")
        verify_checksums(checked, checksums, str(path))
        try:
            return build(tensors, settings)
        except KeyError as error:
            raise ValueError(f"{path}: its metadata is damaged ({error!r})") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def _tensor(setting: Any) -> Tensor:
    """A whole number as its checksum takes it."""
    return torch.tensor(operator.index(setting))


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, to notice a damaged or edited file."""
    return checksum_of_parts([tensor])


def checksum_of_parts(parts: Iterable[Tensor]) -> str:
    """Return the CRC-32 of the bytes of tensors, one after the other."""
    crc = 0
    for part in parts:
        data: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"crc32:{crc:08x}"


def verify_checksums(tensors: dict[str, Tensor], checksums: dict[str, str], source: str) -> None:
    """Raise ValueError if a tensor is not the one that was saved."""
    for name, expected in checksums.items():
        if (got := checksum(tensors[name])) != expected:
            raise ValueError(
                f"{source}: {name} was changed after it was saved (expected {expected}, got {got}); "
                "the file is damaged or edited"
            )
