"""Atomic writes of files and directories: write under a temporary name, synchronise, rename.

Content reaches the disk before the rename, so that not even a power failure leaves a partial file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Failures of the storage: no space, quota exceeded, file too large, read-only, input/output error.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file name beside ``path``, renamed onto it if the block succeeds, else removed.

    Raises:
        OSError: the file cannot be written, for example to a full disk; ``path``, which the error names, is
            unchanged.
    """
    given, path = path, Path(path).resolve()  # a symbolic link is kept
    mode = path.stat().st_mode & 0o777 if path.exists() else None  # an existing file keeps its permissions
    with _naming(given):
        temporary = _new_file(path, 0o666 if mode is None else 0o600)
    if mode is None:
        mode = temporary.stat().st_mode & 0o777  # safetensors replaces the file by one with mode 0600
    try:
        with _naming(given, temporary):
            yield temporary
            os.chmod(temporary, mode)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new directory beside ``path``, which replaces ``path`` if the block succeeds, else is removed.

    An existing directory is left alone until the new one is complete, and then exchanged with it.

    Raises:
        NotADirectoryError: ``path`` is a file.
        OSError: the directory cannot be written, for example to a full disk; ``path``, which the error names,
            is unchanged.
    """
    given, path = path, Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a directory or nothing")
    with _naming(given):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_name(path)
        os.mkdir(temporary, 0o777)
    try:
        with _naming(given, temporary):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _put_in_place(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | os.PathLike, argument: str) -> None:
    """Raise unless a file can be written at ``path``; for use before the work whose result it will hold.

    This creates and removes a file beside it, as permissions do not show a read-only mount.

    Args:
        path: where the file will be written.
        argument: name of the argument, for the error message.

    Raises:
        FileNotFoundError: the directory of ``path`` does not exist.
        IsADirectoryError: ``path`` is a directory.
        OSError: no file can be created in the directory, or ``path`` is a mount point, which cannot be
            replaced.
    """
    resolved = Path(path).resolve()
    if not resolved.parent.is_dir():
        raise FileNotFoundError(f"{argument}: expected a file in a directory that exists, got {path}")
    if resolved.is_dir():
        raise IsADirectoryError(f"{argument}: expected a file, got the directory {path}")
    if os.path.ismount(resolved):
        raise OSError(errno.EBUSY, f"{argument}: a mount point cannot be replaced", str(path))
    _try_to_create(resolved, path, argument)


def new_file(
    path: str | os.PathLike,
    overwrite: bool,
    argument: str = "output",
    sources: Iterable[str | os.PathLike] = (),
) -> Path:
    """Return the resolved path of a file to make; for use before the work whose result it will hold.

    Args:
        path: where the file will be written.
        overwrite: whether it may replace another file.
        argument: name of the argument, for the error message.
        sources: texts that it may not replace in any case.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False, or it is one of the sources.
        FileNotFoundError, IsADirectoryError, OSError: as ``check_writable``.
    """
    resolved = Path(path).resolve()
    if any(resolved == Path(source).resolve() for source in sources):
        raise FileExistsError(f"{argument}: {path} is the text to read; choose another name")
    check_writable(path, argument)
    if resolved.exists() and not overwrite:
        raise FileExistsError(
            f"{argument}: {path} exists; choose another name, or pass overwrite (--overwrite)"
        )
    return resolved


def check_writable_directory(path: str | os.PathLike, argument: str) -> None:
    """Raise unless files can be written in the directory ``path``, which need not exist yet.

    Args:
        path: the directory.
        argument: name of the argument, for the error message.

    Raises:
        NotADirectoryError: ``path`` or one of its parents is a file.
        OSError: no file can be created there.
    """
    resolved = Path(path).resolve()
    folder = next(each for each in (resolved, *resolved.parents) if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{argument}: expected a directory, got {path}: {folder} is a file")
    _try_to_create(folder / "new", path, argument)


@contextlib.contextmanager
def alone_in(directory: str | os.PathLike, argument: str) -> Iterator[None]:
    """Hold an advisory lock on an existing directory; it is released when the block or the process ends.

    On systems without ``fcntl`` and file systems without locks there is no lock.

    Args:
        directory: the directory to lock.
        argument: name of the argument, for the error message.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = f"{argument}: expected a directory for this process alone, another one writes there"
            raise BlockingIOError(error.errno, reason, os.fspath(directory)) from None
        except OSError as error:  # these errors come from file systems without locks
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


def file_checksum(path: str | os.PathLike) -> str:
    """Return the CRC-32 of a file's bytes, as ``crc32:`` and 8 hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"crc32:{crc:08x}"


def _try_to_create(file: Path, path: str | os.PathLike, argument: str) -> None:
    try:
        _new_file(file, 0o600).unlink()
    except OSError as error:
        reason = f"{argument}: cannot be written ({error.strerror})"
        raise OSError(error.errno, reason, str(path)) from None


def _new_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _new_file(path: Path, mode: int) -> Path:
    """Create an empty file beside ``path`` under a temporary name; the umask applies to ``mode``."""
    name = _new_name(path)
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    return name


@contextlib.contextmanager
def _naming(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Make storage errors name ``path`` in place of the temporary file or of no file."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or temporary is None or Path(error.filename).is_relative_to(temporary)
        if error.errno not in _STORAGE_ERRORS or not ours:
            raise
        reason = f"could not be written ({os.strerror(error.errno)})"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    if os.name == "nt":  # Windows cannot open directories, or synchronise files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot synchronise
            raise
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, old: Path) -> None:
    """Move the directory ``new`` to ``old``; if ``old`` exists, its content is left under the name ``new``.

    The loop is for other processes that create or remove ``old`` between the test and the rename.
    """
    while True:
        try:
            if old.exists():
                _exchange(new, old)
            else:
                new.rename(old)
            return
        except FileNotFoundError:
            if not new.exists():
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _exchange(new: Path, old: Path) -> None:
    """Exchange two directories, atomically where the system can."""
    if sys.platform == "linux":
        at_cwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if getattr(libc, "renameat2", None) and not libc.renameat2(
            at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), rename_exchange
        ):
            return
    # Two renames: if the process is killed between them, the old directory is complete as `aside`.
    aside = Path(f"{new}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        if old.exists():  # another process has put its directory there
            shutil.rmtree(aside)
        else:
            aside.rename(old)
        raise
    aside.rename(new)
