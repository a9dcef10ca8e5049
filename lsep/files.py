"""Files in folders that others may have made: written whole under names nobody can foresee, read as what they claim.

A run directory may come from a stranger, with symbolic links where files of a run are expected. What is written goes
into a new file, made exclusively, which is renamed in the end; what is read is a plain file of a bounded size. A link
is never followed, neither way. Nothing here imports torch.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from lsep.errors import UserError

SMALL = 64 << 20
"""Bytes of a small file, at most: a configuration, results, a picture of samples."""
_ABANDONED = 3600.0
"""Seconds after which a temporary file is taken for one that a kill has left behind."""


@contextlib.contextmanager
def replacing(path: Path, flushed: bool = False) -> Iterator[Path]:
    """An empty new file beside `path`, to be filled by its name; afterwards it is `path`, or, after an error, gone.

    Its mode is what the umask gives, whatever fills it. flushed: it is on the disk before it gets the name.
    """
    _sweep(path)
    temporary, mode = _new_file(path)
    try:
        yield temporary
        if stat.S_IMODE(temporary.lstat().st_mode) != mode:  # safetensors replaces it by a file of mode 0600
            temporary.chmod(mode)
        if flushed:
            flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file in one step, in UTF-8: a kill leaves the old one or the new one."""
    with replacing(path) as temporary:
        # What no encoding has are bytes of file names that are none of UTF-8.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be filled; afterwards it is `path`, or, after an error, gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unforeseen(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _unforeseen(path: Path) -> Path:
    # The name may be as long as a system takes already.
    return path.with_name(f".{path.name[:180]}.{secrets.token_hex(8)}.tmp")


def _new_file(path: Path) -> tuple[Path, int]:
    """An empty file that was not there, and its mode."""
    temporary = _unforeseen(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        return temporary, stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _sweep(path: Path) -> None:
    """Remove what kills have left of earlier writes of `path`."""
    start, length = f".{path.name[:180]}.", len(_unforeseen(path).name)
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if left.name.startswith(start) and left.name.endswith(".tmp") and len(left.name) == length:
                with contextlib.suppress(OSError):
                    if time.time() - left.lstat().st_mtime > _ABANDONED:
                        left.unlink()


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds, if it is there; what cannot be removed stays."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass


def read_plain(path: Path, limit: int = SMALL) -> bytes:
    """All of a plain file of at most `limit` bytes; raises UserError for anything else, but FileNotFoundError."""
    try:
        # Without O_NONBLOCK the opening of a pipe would wait for who writes into it.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        require(path)
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _unexpected(path, status.st_mode, folder=False)
        if status.st_size > limit:
            raise UserError(f"{path}: has {status.st_size} bytes, expected at most {limit}")
        with FileIO(fd, closefd=False) as file:
            return file.readall()
    finally:
        os.close(fd)


def open_to_append(path: Path) -> FileIO:
    """A plain file, or a new one, to be added to without a buffer; raises UserError for anything else."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            require(path)
        raise
    file = FileIO(fd, "ab")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        require(path)
    return file


def require(path: Path, folder: bool = False) -> None:
    """Raise UserError where something else than a plain file, or with `folder` than a folder, is at `path`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise _unexpected(path, mode, folder)


_KINDS = (
    (stat.S_ISLNK, "a symbolic link, which is not followed"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a pipe"),
)


def _unexpected(path: Path, mode: int, folder: bool) -> UserError:
    found = next((name for test, name in _KINDS if test(mode)), "a device or socket")
    wanted = "a folder" if folder else "a plain file"
    return UserError(f"{path}: is {found}, expected {wanted}: remove it, or put one there")
