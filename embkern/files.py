"""Writing that leaves what was there whole: a temporary name first, then one rename."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file name beside ``path``, renamed onto it if the block succeeds, else removed."""
    path = Path(path).resolve()  # a link stays a link
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new directory beside ``path``, put in its place if the block succeeds, else removed.

    A directory that was there stays whole until the new one is complete and is then exchanged with it.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a directory or nothing")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories, in one step where the system can; ``new`` then holds what is to be removed."""
    if sys.platform == "linux":
        at_cwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if getattr(libc, "renameat2", None) and not libc.renameat2(
            at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), rename_exchange
        ):
            return
    # Two renames: killed between them, the old directory is whole under its temporary name.
    aside = Path(f"{new}.old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
