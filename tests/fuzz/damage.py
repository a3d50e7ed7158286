"""Damage to files: flipped, lost and moved bytes, and rewritten contents whose checksums are valid."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from embkern.io.checked_json import to_checked_json

SECONDS, MEMORY = 60, 200 << 20  # upper bounds for reading a file of a few kilobytes
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64",
}  # fmt: skip
# JSON texts that replace a value. A number n stands for n nested brackets.
HOSTILE: tuple[str | int, ...] = (
    "null", "true", "0", "-1", "1", "3", "2147483648", "4611686018427387904", "9223372036854775808",
    "18446744073709551616",
    "-9223372036854775808", "1" + "0" * 400, "1" + "0" * 5000, "1.5", "1e308", "1e999",
    "-1e999", "NaN", "Infinity", '""', '"x"', '"float32"', '"\\ud800"', '"\\u0000"', "[]", "[[[]]]", "{}",
    '{"a":1,"a":2}', "[1,2]", '["codes"]', "{", "", "\x00", 500, 2000, 100_000,
)  # fmt: skip


@functools.cache
def place() -> Path:
    """A temporary directory of this process, in /dev/shm where it is writable."""
    memory = Path("/dev/shm")
    directory = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
    atexit.register(directory.cleanup)
    return Path(directory.name)


def json_text(value: str | int) -> str:
    return "[" * value + "]" * value if isinstance(value, int) else value


# ---- bytes -------------------------------------------------------------------------------------------


def byte_damage(random: Random) -> list[tuple]:
    """Draw changes to the bytes of a file, at positions given as fractions of its length."""
    changes: list[tuple] = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        # The fourth power favours the header: a few hundred bytes of a few thousand.
        at = random.random() ** random.choice((1, 4))
        kind = random.choice(("flip", "flip", "set", "truncate", "cut", "repeat", "zeros", "move", "append"))
        changes.append((kind, at, random.randrange(256), random.choice((1, 1, 4, 8, 64))))
    return changes


def damaged(data: bytes, changes: list[tuple]) -> bytes:
    for kind, fraction, value, length in changes:
        at = int(fraction * len(data))
        if kind == "flip" and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << value % 8]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "repeat":
            data = data[: at + length] + data[at:]
        elif kind == "zeros":
            data = data[:at] + bytes(length) + data[at + length :]
        elif kind == "move":
            piece, to = data[at : at + length], value * len(data) // 256
            data = data[:to] + piece + data[to + length :]
        elif kind == "append":
            data = data + bytes([value]) * length
    return data


# ---- JSON --------------------------------------------------------------------------------------------


def json_damage(random: Random) -> list[tuple]:
    """Draw changes to a JSON document; a number, modulo the count of places, chooses the place."""
    return [
        (
            random.choice(("replace", "replace", "replace", "drop", "add", "swap")),
            random.randrange(1 << 30),
            random.choice(HOSTILE),
        )
        for _ in range(random.choice((1, 1, 2)))
    ]


class Raw(str):
    """A text that ``dumped`` inserts verbatim, whether or not it is JSON."""


def dumped(value: Any) -> str:
    """Serialise to JSON, with ``Raw`` texts inserted verbatim."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a document with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged_json(value: Any, changes: list[tuple]) -> str:
    """Apply the changes of ``json_damage`` to a document and return its text."""
    document = [json.loads(json.dumps(value))]
    for kind, at, text in changes:
        places = list(_places(document))
        container, key = places[at % len(places)]
        other, its_key = places[at // 1000 % len(places)]
        if kind == "replace":
            container[key] = Raw(json_text(text))
        elif kind == "drop" and container is not document:
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[str(text)[:20]] = Raw(json_text(text))
        elif kind == "swap":
            container[key] = json.loads(json.dumps(other[its_key])) if _plain(other[its_key]) else None
    return dumped(document[0]) if document else ""


def _plain(value: Any) -> bool:
    return not isinstance(value, Raw) and not any(isinstance(c[k], Raw) for c, k in _places(value))


def rechecked(text: str) -> str:
    """Return a JSON object with a valid checksum; any other text is returned unchanged."""
    try:
        content = json.loads(text)
        return to_checked_json(content) if isinstance(content, dict) else text
    except (ValueError, RecursionError):
        return text


# ---- safetensors -------------------------------------------------------------------------------------


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, at = [], 0
    for name, tensor in tensors.items():
        flat = tensor.contiguous().reshape(-1)
        data = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().tobytes()
        dtype = _NAMES[tensor.dtype]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[at, at + len(data)])
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and the bytes that follow."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(text: str, rest: bytes) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + rest


# ---- reading -----------------------------------------------------------------------------------------


class ReadTimeout(BaseException):
    """Reading takes longer than ``SECONDS``."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise if the block takes more than ``SECONDS`` or ``MEMORY``."""

    def timed_out(*_: Any) -> None:
        raise ReadTimeout(f"reading takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, timed_out)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) << 10
    assert grown < MEMORY, f"took {grown:,} bytes"


def read(
    path: Path, load: Callable[[], Any], allowed: tuple[type, ...] = (), named: str | None = None
) -> Any:
    """Return what ``load`` returns, or None where it raises a documented error that names the file."""
    try:
        return load()
    except Exception as raised:
        error = raised
    kind = type(error)
    documented = (ValueError, FileNotFoundError, *allowed)
    assert kind in documented, f"{kind.__module__}.{kind.__name__}: {error}"[:2000]
    expected = str(path) if named is None else named
    assert expected in str(error), f"{kind.__name__} does not name the file: {error}"[:2000]
    return None


HOSTILE_PLACES = ("missing", "directory", "loop", "dangling", "fifo", "empty", "null device", "under a file")


def hostile_place(kind: str, path: Path) -> Path:
    """Create at a path something other than a regular file with contents."""
    with contextlib.suppress(FileNotFoundError):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "null device":
        path.symlink_to("/dev/null")
    elif kind == "under a file":
        path.touch()
        return path / "file"
    return path
