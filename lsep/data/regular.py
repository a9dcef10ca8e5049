"""Opening files that others wrote: a pipe, a device or a folder under a file's name is refused, never waited for."""

import errno
import io
import os
import stat
from pathlib import Path


def open_regular(path: str | Path) -> io.BufferedReader:
    """The file, opened for reading; raises OSError, also where it is no regular file (EINVAL, says so)."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would be waited for
    try:
        if stat.S_ISDIR(mode := os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_regular(path: str | Path, limit: int) -> bytes:
    """The whole file; raises OSError as `open_regular`, and ValueError where it is larger than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{size} bytes found, expected at most {limit}")
        return file.read(limit)
