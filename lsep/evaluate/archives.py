"""Reading `.npz` files of others: headers and sizes before any array, a part at a time, and nothing unpickled.

archive = Archive(path)
archive.headers["arr_0"].shape;  archive.read("mu");  for rows in archive.rows("arr_0", 64): ...
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from lsep.data.forms_npy import NpyHeader, npy_header
from lsep.errors import UserError, told
from lsep.files import replacing

_HEADER_BYTES = 1 << 16
LARGEST = 4 << 30
"""Bytes of an array that is read whole: a covariance of 2048 features has 32 MiB."""


class Archive:
    """The arrays of an `.npz`; raises UserError, naming the file and the array, for all that is not right with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, NpyHeader] = {}
        with self._opened() as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        head = file.read(_HEADER_BYTES)
                    name = info.filename.removesuffix(".npy")
                    self.headers[name] = npy_header(head, self.where(name), info.file_size)

    def where(self, name: str) -> str:
        return f"{self.path}: {name}"

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except UserError:
            raise
        except Exception as error:  # damage raises anything from BadZipFile to zlib.error
            raise UserError(f"{self.path}: cannot be read ({told(error)}), expected a whole .npz file") from None

    def header(self, name: str, kind: str, dimensions: int, wanted: str) -> NpyHeader:
        """Of the array `name`, which must be there, of a type whose numpy kind is in `kind`, with `dimensions` axes."""
        if name not in self.headers:
            found = ", ".join(sorted(self.headers)[:20]) or "no arrays"
            raise UserError(f"{self.path}: no array {name!r} ({found} found), expected {wanted}")
        header = self.headers[name]
        if header.dtype.kind not in kind or len(header.shape) != dimensions or 0 in header.shape:
            raise UserError(f"{self.where(name)} is {header.dtype} {header.shape}, expected {wanted}")
        return header

    def read(self, name: str) -> np.ndarray:
        """A whole array of one of `headers`."""
        header = self.headers[name]
        count = int(np.prod(header.shape, dtype=object))
        if count * header.dtype.itemsize > LARGEST:
            raise UserError(f"{self.where(name)} has {count * header.dtype.itemsize} bytes, expected at most {LARGEST}")
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            values = np.frombuffer(self._bytes(file, header, count, name, skip=True), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran else "C")

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """The array in order along its first axis, `size` rows at a time."""
        header = self.headers[name]
        if header.fortran:
            raise UserError(f"{self.where(name)} is in Fortran order, expected C order")
        shape = header.shape[1:]
        each = int(np.prod(shape, dtype=object))
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            for start in range(0, header.shape[0], size):
                rows = min(size, header.shape[0] - start)
                data = self._bytes(file, header, rows * each, name, skip=start == 0)
                yield np.frombuffer(data, header.dtype).reshape(rows, *shape)

    def _bytes(self, file: IO[bytes], header: NpyHeader, count: int, name: str, skip: bool) -> bytearray:
        """The next `count` values, writable; `skip`: the header comes before them."""
        if skip:
            file.read(header.offset)
        wanted = count * header.dtype.itemsize
        data = bytearray()
        while len(data) < wanted and (part := file.read(min(wanted - len(data), 1 << 24))):
            data += part  # grows with what is there, whatever the header promises
        if len(data) != wanted:
            raise UserError(f"{self.where(name)} ends after {len(data)} of {wanted} bytes")
        return data


def text(archive: Archive, name: str) -> str:
    """The string in a zero-dimensional array."""
    archive.header(name, "U", 0, "a string")
    return str(archive.read(name)[()])


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Save `arrays` as an .npz under a temporary name, then rename; raises UserError where that cannot be done."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
