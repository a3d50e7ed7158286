"""Safetensors files of named tensors and settings, with checksums of all of their content."""

from __future__ import annotations

import json
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

from .atomic import replacing
from .errors import disk_error

T = TypeVar("T")


@dataclass(frozen=True)
class TensorFormat:
    """A format of safetensors files, whose metadata holds its name, settings and checksums.

    Every tensor has a checksum, and so does the header: names, dtypes, shapes and the metadata itself (the
    first files had no checksum of the header). Equal content gives equal bytes.

    Attributes:
        name: name and version of the format, such as ``embkern.factors/1``.
        content: what a file holds, for error messages.
        required: names of the tensors that every file has.
        optional: names of the tensors that a file may have.
        settings: names of the settings, which are JSON values.
        checked: settings with a checksum of their own, as tensors have; 64-bit integers.
        earlier: names of earlier versions, which are read, too.
    """

    name: str
    content: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike, tensors: Mapping[str, Tensor], **settings: Any) -> None:
        """Write one file; an existing file is replaced atomically.

        Args:
            path: the file.
            tensors: the required tensors and any of the optional ones.
            settings: a value for each of the format's settings.

        Raises:
            OSError: the file cannot be written, for example to a full disk.
        """
        # safetensors writes memory as it is and ignores a view's negative bit.
        stored = {name: tensor.detach().cpu().resolve_neg().contiguous() for name, tensor in tensors.items()}
        checked = {**stored, **{name: _tensor(settings[name]) for name in self.checked}}
        metadata = {
            "format": self.name,
            **{name: json.dumps(settings[name]) for name in self.settings},
            "checksums": json.dumps({name: checksum(tensor) for name, tensor in checked.items()}),
        }
        metadata["header"] = _header_checksum(stored, metadata)
        with replacing(path) as temporary:
            try:
                save_file(stored, temporary, metadata)
            except SafetensorError as error:
                if refused := disk_error(error):
                    raise refused from error
                raise
            _sort_metadata(temporary)

    def load(self, path: str | os.PathLike, build: Callable[[dict[str, Any], dict[str, Any]], T]) -> T:
        """Return ``build(tensors, settings)`` for a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited or of another format, or ``build`` raises ValueError,
                TypeError, KeyError or OverflowError; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file of {self.content}, found none at {path}")
        tensors, metadata = _read(path)
        if (got := metadata.get("format")) not in (self.name, *self.earlier):
            raise ValueError(f"{path}: expected format {self.name!r}, got {got!r}")
        try:
            return build(tensors, self._settings(tensors, metadata))
        except KeyError as error:
            raise ValueError(f"{path}: its metadata is damaged ({error!r})") from None
        except RecursionError:
            raise ValueError(f"{path}: its metadata is damaged (nested too deep)") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None

    def _settings(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
        """Return the settings of a file after its tensors and checksums are verified."""
        try:
            settings = {name: json.loads(metadata[name]) for name in self.settings}
            checked = {**tensors, **{name: _tensor(settings[name]) for name in self.checked}}
            checksums = json.loads(metadata["checksums"])
            if not isinstance(checksums, dict):
                raise TypeError(f"checksums: expected an object with one per tensor, got {checksums!r}")
            if unknown := set(metadata) - {"format", *self.settings, "checksums", "header"}:
                raise TypeError(f"unknown {', '.join(sorted(unknown))}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its metadata is damaged ({error!r})") from None
        known = set(self.required) <= set(tensors) <= {*self.required, *self.optional}
        if not known or set(checked) != set(checksums):
            optional = f" and optionally {', '.join(self.optional)}" if self.optional else ""
            raise ValueError(f"expected {', '.join(self.required)}{optional}, got {sorted(tensors)}")
        verify_checksums(checked, checksums)
        header = metadata.pop("header", None)  # the first files have none
        if header is not None and header != (got := _header_checksum(tensors, metadata)):
            raise ValueError(
                f"the header was changed after it was saved (expected {header}, got {got}); "
                "the file is damaged or edited"
            )
        return settings


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, as ``crc32:`` and 8 hexadecimal digits."""
    return checksum_of_parts([tensor])


def checksum_of_parts(parts: Iterable[Tensor]) -> str:
    """Return the CRC-32 of the concatenated bytes of tensors."""
    crc = 0
    for part in parts:
        flat = part.detach().cpu().resolve_neg().contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,))  # the stride of a single element is arbitrary
        data: Any = flat.view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"crc32:{crc:08x}"


def verify_checksums(tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> None:
    """Raise ValueError if the checksum of a tensor differs."""
    for name, expected in checksums.items():
        if (got := checksum(tensors[name])) != expected:
            raise ValueError(
                f"{name} was changed after it was saved (expected {expected}, got {got}); "
                "the file is damaged or edited"
            )


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of one version of a file that another process may replace.

    safetensors opens a file twice, so that header and tensors may come from two versions; it is read again
    if the file changed meanwhile.
    """
    while True:
        before, failure = _identity(path), None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError, KeyError) as error:  # the last two if torch lacks a dtype
            failure = error
        if _identity(path) != before:
            continue
        if failure is not None:
            raise ValueError(f"{path} is not a readable safetensors file ({failure})") from failure
        return tensors, metadata


def _identity(path: str | os.PathLike) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor of a file, copied unless it is aligned for the kernels.

    Its address depends on its offset in the file. safetensors aligns the offsets that it writes, but the
    format allows any.
    """
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _tensor(setting: Any) -> Tensor:
    """Return an integer setting as a tensor, for its checksum."""
    if type(setting) is not int or not -(2**63) <= setting < 2**63:
        raise TypeError(f"expected a 64-bit integer, got {setting!r}")
    return torch.tensor(setting)


def _header_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of a header's content: the metadata, and names, dtypes and shapes of the tensors."""
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    text = json.dumps([dict(metadata), shapes], sort_keys=True)
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place, as safetensors writes them in random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: expected a header of {length} bytes once sorted, got {len(text)}")
        file.seek(8)
        file.write(text)
