"""One shard of a store: what the manifest says of it, what its file's header says, and rows by `pread`.

A shard is a file of fixed-size rows (`packed`), or a list of files with one row each (`files`), beside columns (labels,
checksums) in a safetensors file. Rows are never memory-mapped: a file truncated under a running training becomes an
error that names file and row, where a map would kill the process.
"""

import json
import os
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsep.data.manifest import CorruptRow, Ids, Manifest
from lsep.data.regular import open_regular
from lsep.errors import UserError, one_line, shown, told

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("float32"), "F16": np.dtype("float16"), "U8": np.dtype("uint8"), "I64": np.dtype("int64"),
    "U32": np.dtype("uint32"), "BF16": np.dtype([("bfloat16", "<u2")]),
    "F64": np.dtype("float64"), "I32": np.dtype("int32"), "I16": np.dtype("int16"), "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"), "U16": np.dtype("uint16"), "BOOL": np.dtype("bool"),
}  # fmt: skip
"""Of all tensors a file may hold; which of them a store reads is another matter."""
BF16 = DTYPES["BF16"]
"""numpy has no such type: as bits, see `widened`."""
_HEADER_LIMIT = 16 << 20
_LAYOUTS = ("packed", "files")
COLUMNS = ("labels", "probe_labels", "crc32", "crc32_flip")


@dataclass(frozen=True)
class Entry:
    """A shard as the manifest lists it; all paths are relative to the manifest's folder."""

    file: str
    """packed: the file of the rows; files: a text file that lists one file a line."""
    rows: int
    layout: str
    offset: int
    """Byte offset of row 0 in the file (packed), or of the row in every file (files)."""
    flip_offset: int | None
    """Byte offset of the mirrored row 0 (packed), or None."""
    bytes: int
    """Size of the file (packed), or of every listed file (files)."""
    sha256: str
    """Of `file`."""
    columns: str
    """safetensors file with labels int64, crc32 uint32 (of each row's bytes), [probe_labels], [crc32_flip]."""
    columns_crc32: int
    """Of these columns' bytes, one after the other in the order of COLUMNS."""
    non_finite: int
    """Rows that hold a value that is not finite."""

    @classmethod
    def parse(cls, value: Any, where: str) -> "Entry":
        """From the manifest's JSON; `where` names the place in errors."""
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise UserError(f"{where}: a shard is {shown(value)}, expected an object with {', '.join(names)}")
        for name in ("file", "layout", "sha256", "columns"):
            if not isinstance(value[name], str) or not one_line(value[name]) or "\0" in value[name]:
                raise UserError(f"{where}: a shard's {name} is {shown(value[name])}, expected text in one line")
        for name in ("rows", "offset", "flip_offset", "bytes", "columns_crc32", "non_finite"):
            number = value[name]
            if number is None and name == "flip_offset":
                continue
            if type(number) is not int or not (name == "rows") <= number < 2**62:
                raise UserError(f"{where}: {name} of shard {shown(value['file'])} is {shown(number)}, expected a count")
        if value["layout"] not in _LAYOUTS:
            raise UserError(
                f"{where}: layout of shard {shown(value['file'])} is {shown(value['layout'])}, expected {_LAYOUTS}"
            )
        return cls(**value)


class Column(NamedTuple):
    """A tensor of a safetensors file: its type, shape, and first and last byte in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


def header(path: Path) -> dict[str, Column]:
    """The tensors of a safetensors file; sizes are checked against the file before anything is read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise UserError(f"{path}: not a safetensors file, or truncated inside its header")
            entries = json.loads(file.read(length))
            found = {}
            for name, entry in entries.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
                    raise ValueError(f"{name} has a negative or fractional size")
                count = 1
                for n in shape:
                    count *= n
                if end - start != count * dtype.itemsize:
                    raise ValueError(f"{name} spans {end - start} bytes, its shape needs {count * dtype.itemsize}")
                if 8 + length + end > size:
                    raise UserError(f"{path}: truncated, {size} bytes found and {8 + length + end} expected")
                found[name] = Column(dtype, shape, 8 + length + start, 8 + length + end)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file of a store ({told(error)})") from None
    return found


def widened(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, which holds every one of them; other arrays as they are."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if x.dtype == BF16 else x


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file that `header` has read."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(min(length, _HEADER_LIMIT))).get("__metadata__", {})
    return {str(k): str(v) for k, v in found.items()}


def columns_crc32(path: Path) -> int:
    """The checksum of a shard's columns, see `Entry`."""
    found, value = header(path), 0
    with open_regular(path) as file:
        for name in COLUMNS:
            if name in found:
                column = found[name]
                value = zlib.crc32(os.pread(file.fileno(), column.end - column.start, column.start), value)
    return value


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; raises UserError when that is not below the folder (absolute, `..`, a link that leads out)."""
    path = folder / name
    try:
        below = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        below = False
    if not below:
        raise UserError(f"{folder / 'manifest.json'}: path {shown(name)} leaves the store's folder")
    return path


class Shard:
    """An open shard."""

    def __init__(self, folder: Path, entry: Entry, manifest: Manifest) -> None:
        self.entry = entry
        self.fd: int | None = None
        self.files: list[bytes] = []
        """Of the layout `files`: the file of each row."""
        self.path = inside(folder, entry.file)
        self.columns_path = inside(folder, entry.columns)
        self._columns = header(self.columns_path)
        checksum = columns_crc32(self.columns_path)
        if checksum != entry.columns_crc32:
            raise UserError(
                f"{self.columns_path}: labels or checksums are damaged, crc32 {checksum} found and "
                f"{entry.columns_crc32} expected by the manifest"
            )
        self.labels = self.column("labels", manifest.num_classes)
        self.probe_labels = None
        if "probe_labels" in self._columns:
            self.probe_labels = self.column("probe_labels", manifest.probe_classes)
        self.crc = self._read("crc32", np.dtype("uint32"))
        self.crc_flip = self._read("crc32_flip", np.dtype("uint32")) if entry.flip_offset is not None else None
        if entry.layout == "packed":
            self._open_packed(manifest)
        else:
            self._open_files(folder)

    def _open_packed(self, manifest: Manifest) -> None:
        entry = self.entry
        try:
            self._file = open_regular(self.path)  # closed with the shard
        except OSError as error:
            raise UserError(f"{self.path}: a shard of the manifest cannot be opened ({error.strerror})") from None
        self.fd = self._file.fileno()
        size = os.fstat(self.fd).st_size
        if size != entry.bytes:
            raise UserError(f"{self.path}: truncated or changed, {size} bytes found and {entry.bytes} expected")
        expected = (np.dtype(manifest.dtype), (entry.rows, *manifest.row_shape))
        starts = {c.start: (c.dtype, c.shape) for c in header(self.path).values()}
        for name, offset in (("offset", entry.offset), ("flip_offset", entry.flip_offset)):
            if offset is None:
                continue
            if starts.get(offset) != expected:
                found = f"{starts[offset][0]} {starts[offset][1]}" if offset in starts else "no tensor"
                raise UserError(
                    f"{self.path}: {found} at {name} {offset}, expected {expected[0]} {expected[1]} by the manifest"
                )

    def _open_files(self, folder: Path) -> None:
        try:
            names = self.path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: the list of files cannot be read ({error})") from None
        if len(names) != self.entry.rows:
            raise UserError(f"{self.path}: lists {len(names)} files, expected {self.entry.rows} by the manifest")
        if any(name.startswith("/") for name in names):
            raise UserError(f"{self.path}: lists an absolute path, expected paths inside the store's folder")
        folders = {name.rpartition("/")[0] for name in names}
        for parent in folders:  # resolving every file would cost more than reading it
            inside(folder, parent or ".")
        if any(name.rpartition("/")[2] in ("", ".", "..") for name in names):
            raise UserError(f"{self.path}: lists a path without a file name")
        self.files = [os.fsencode(folder / name) for name in names]

    def column(self, name: str, classes: int) -> Ids:
        """A label column `(rows,)`, checked against the number of classes."""
        labels = self._read(name, np.dtype("int64"))
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            raise UserError(
                f"{self.columns_path}: {name} of row {row} is {int(labels[row])}, "
                f"expected from 0 to {classes - 1} by the manifest"
            )
        return labels

    def _read(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        column, rows = self._columns.get(name), self.entry.rows
        if column is None or column.dtype != dtype or column.shape != (rows,):
            found = "nothing" if column is None else f"{column.dtype} {column.shape}"
            raise UserError(f"{self.columns_path}: {name} is {found}, expected {dtype} ({rows},)")
        with open_regular(self.columns_path) as file:
            data = os.pread(file.fileno(), column.end - column.start, column.start)
        if len(data) != column.end - column.start:
            raise UserError(f"{self.columns_path}: truncated inside {name}")
        return np.frombuffer(data, dtype)

    def paths(self) -> list[str]:
        """Where the rows come from, where the shard says it: its listed files, or the column of image paths."""
        if self.entry.layout == "files":
            return [os.fsdecode(f) for f in self.files]
        if not {"paths", "path_ends"} <= self._columns.keys():
            return []
        data = self.columns_path.read_bytes()
        text, ends = (data[self._columns[n].start : self._columns[n].end] for n in ("paths", "path_ends"))
        column = self._columns["path_ends"]
        if column.dtype != np.int64 or column.shape != (self.entry.rows,):
            raise UserError(f"{self.columns_path}: path_ends is not int64 ({self.entry.rows},)")
        stops = np.frombuffer(ends, np.int64).tolist()
        return [text[a:b].decode(errors="replace") for a, b in zip([0, *stops[:-1]], stops, strict=True)]

    def corrupt(self, row: int, sample: int, what: str) -> CorruptRow:
        """The error that names the file, the row in it and the sample's id."""
        path = os.fsdecode(self.files[row]) if self.entry.layout == "files" else self.path
        return CorruptRow(f"{path}: row {row} (sample {sample}) {what}", sample)
