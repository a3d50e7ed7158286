"""Writing that leaves what was there whole: a temporary name first, then one rename.

What is renamed is on the disk before: not even a power failure leaves a name with half of its content.
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
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The medium's refusals: no space, a quota, the limit of a file's size, a read-only or a failing device.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file name beside ``path``, renamed onto it if the block succeeds, else removed.

    Raises:
        OSError: the disk refuses (it is full, for example); it names ``path``, which is as it was.
    """
    given, path = path, Path(path).resolve()  # a link stays a link
    mode = path.stat().st_mode & 0o777 if path.exists() else None  # what was there keeps its permissions
    with _naming(given):
        temporary = _new_file(path, 0o666 if mode is None else 0o600)
    if mode is None:
        mode = temporary.stat().st_mode & 0o777  # safetensors puts a file of its own, with 0600, in its place
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
    """Yield a new directory beside ``path``, put in its place if the block succeeds, else removed.

    A directory that was there stays whole until the new one is complete and is then exchanged with it.

    Raises:
        NotADirectoryError: ``path`` is a file.
        OSError: the disk refuses (it is full, for example); it names ``path``, which is as it was.
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
    """Raise unless a file can be written at ``path``: before the work whose result it is to hold.

    Tried by making a file beside it, since permissions alone do not tell (a read-only mount, root in /proc).

    Args:
        path: of the file.
        argument: what the error calls it.

    Raises:
        FileNotFoundError: its directory does not exist.
        IsADirectoryError: it is a directory.
        OSError: no file can be made in its directory, or it is a mount point, which cannot be replaced.
    """
    resolved = Path(path).resolve()
    if not resolved.parent.is_dir():
        raise FileNotFoundError(f"{argument}: expected a file in a directory that exists, got {path}")
    if resolved.is_dir():
        raise IsADirectoryError(f"{argument}: expected a file, got the directory {path}")
    if os.path.ismount(resolved):
        raise OSError(errno.EBUSY, f"{argument}: a mount point cannot be replaced", str(path))
    _try(resolved, path, argument)


def check_writable_directory(path: str | os.PathLike, argument: str) -> None:
    """Raise unless files can be written in a directory at ``path``, which may be made first.

    Raises:
        OSError: nothing can be written there, or a file is in the way.
    """
    resolved = Path(path).resolve()
    folder = next(each for each in (resolved, *resolved.parents) if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{argument}: expected a directory, got {path}: {folder} is a file")
    _try(folder / "new", path, argument)


def _try(place: Path, path: str | os.PathLike, argument: str) -> None:
    try:
        _new_file(place, 0o600).unlink()
    except OSError as error:
        raise OSError(error.errno, f"{argument}: cannot be written ({error.strerror})", str(path)) from error


@contextlib.contextmanager
def alone_in(directory: str | os.PathLike, argument: str) -> Iterator[None]:
    """Keep other processes out of a directory that exists, as far as they ask here; a kill ends that, too.

    Raises:
        BlockingIOError: another process is in it.
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
            raise BlockingIOError(error.errno, reason, os.fspath(directory)) from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise  # those are of file systems that know no locks
        yield
    finally:
        os.close(descriptor)


def file_checksum(path: str | os.PathLike) -> str:
    """Return the CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"crc32:{crc:08x}"


def _new_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _new_file(path: Path, mode: int) -> Path:
    """Make an empty file beside a path; from its mode the kernel takes the umask, which only it can read."""
    name = _new_name(path)
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    return name


@contextlib.contextmanager
def _naming(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Let the medium's refusals name the file that was to be written, not the temporary one or none."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or temporary is None or Path(error.filename).is_relative_to(temporary)
        if error.errno not in _REFUSED or not ours:
            raise
        reason = f"could not be written ({os.strerror(error.errno)})"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    if os.name == "nt":  # which opens no directories, and synchronises nothing that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, old: Path) -> None:
    """Rename a directory onto another or onto nothing; ``new`` then holds what is to be removed, if anything.

    Between the question and the rename another process may put a directory there, or take it away.
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
    try:
        new.rename(old)
    except OSError:
        if old.exists():  # another process was faster
            shutil.rmtree(aside)
        else:
            aside.rename(old)
        raise
    aside.rename(new)
