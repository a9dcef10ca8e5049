"""The store: shards of fixed-size rows beside one `manifest.json`, described in docs/store.md.

Store(path).read(ids)
"""

import hashlib
import json
import os
import stat
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from lsep.data.manifest import Flips, Ids, Manifest, Rows, parse
from lsep.data.native import library, read_rows
from lsep.data.regular import read_regular
from lsep.data.shards import Entry, Shard
from lsep.errors import UserError, shown, told

FORMAT, VERSION = "lsep-store", 1
_JSON_LIMIT = 256 << 20
_CHUNK = 32  # rows read and then checked while they are in the cache


class Store:
    """A data set on disk; ids count the rows of all shards in the manifest's order."""

    def __init__(self, path: str | Path, check_rows: bool = True) -> None:
        """`check_rows`: compare the crc32 of every row that is read."""
        self.path, self.check_rows = Path(path), check_rows
        self.manifest, self.entries = read_manifest(self.path)
        m = self.manifest
        self.shards = [Shard(self.path, entry, m) for entry in self.entries]
        self._starts = np.cumsum([0] + [s.entry.rows for s in self.shards])
        self._y = np.concatenate([s.labels for s in self.shards])
        probe = [s.probe_labels for s in self.shards if s.probe_labels is not None]
        if probe and len(probe) != len(self.shards):
            raise UserError(f"{self.path}: some shards hold 'probe_labels' and some do not, expected all or none")
        if not probe and m.probe_classes != m.num_classes:
            raise UserError(
                f"{self.path}: probe_classes is {m.probe_classes} and the shards hold no 'probe_labels', "
                f"expected num_classes, {m.num_classes}"
            )
        self._probe_y = np.concatenate(probe) if probe else self._y
        self.manifest = replace(m, unused=_unused(self._y, m.num_classes)) if m.labelled else m
        # Flat tables over shards and rows: a batch's rows are looked up in one go.
        self._fds = np.array([-1 if s.fd is None else s.fd for s in self.shards], np.int32)
        self._files = any(s.fd is None for s in self.shards)
        offsets = [(e.offset, e.offset if e.flip_offset is None else e.flip_offset) for e in self.entries]
        self._offsets = np.array(offsets, np.int64).T
        columns = [(s.crc, s.crc if s.crc_flip is None else s.crc_flip) for s in self.shards]
        self._crc = np.stack([np.concatenate(c) for c in zip(*columns, strict=True)])
        self._sizes = np.array([e.bytes for e in self.entries], np.int64)

    @property
    def labels(self) -> Ids:
        """Labels of all rows `(rows,)`."""
        return self._y

    def fingerprint(self) -> str:
        """sha256 of what the manifest says of all shards' bytes."""
        parts = [f"{e.rows} {e.sha256} {e.columns_crc32}\n" for e in self.entries]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def paths(self) -> list[str]:
        """Where all rows come from; empty where the shards do not say it."""
        found = [path for shard in self.shards for path in shard.paths()]
        return found if len(found) == self.manifest.rows else []

    def read(self, ids: Ids, flips: Flips | None = None, out: np.ndarray | None = None) -> Rows:
        """Rows in this order, see `Source.read`. A row with a value that is not finite is corrupt as well."""
        m = self.manifest
        x = np.empty((len(ids), *m.row_shape), m.dtype) if out is None else out
        which = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[which]
        variant = np.zeros(len(ids), np.int64) if flips is None else flips.astype(np.int64)
        offsets = self._offsets[variant, which] + rows * m.row_bytes * (self._fds[which] >= 0)
        crc = self._crc[variant, ids] if self.check_rows else None
        paths = None
        if self._files:
            places = zip(which.tolist(), rows.tolist(), strict=True)
            paths = [self.shards[s].files[r] if self.shards[s].files else b"" for s, r in places]
        read = read_rows if library() is not None else read_rows_in_python
        bad = read(self._fds[which], paths, offsets, self._sizes[which], x, crc) if len(ids) else None
        if bad is not None:
            i, what = bad
            raise self.shards[which[i]].corrupt(int(rows[i]), int(ids[i]), what)
        return Rows(x, self._y[ids], self._probe_y[ids])


_RANGES = 1000
"""Ranges of classes without rows that are kept: they go into every run's config.json."""


def _unused(labels: Ids, num_classes: int) -> tuple[tuple[int, int], ...]:
    """Ranges (first, last) of the classes that no row has."""
    small = num_classes <= 1 << 22  # counting is faster than sorting while the counts are few
    present = np.flatnonzero(np.bincount(labels, minlength=num_classes)) if small else np.unique(labels)
    edges = np.concatenate([[-1], present, [num_classes]])
    gaps = np.flatnonzero(np.diff(edges) > 1)[:_RANGES]
    return tuple((int(edges[i]) + 1, int(edges[i + 1]) - 1) for i in gaps)


def read_rows_in_python(
    fds: np.ndarray,
    paths: list[bytes] | None,
    offsets: np.ndarray,
    sizes: np.ndarray,
    out: np.ndarray,
    crc: np.ndarray | None,
) -> tuple[int, str] | None:
    """What `native.read_rows` does, row by row."""
    whole, size = memoryview(out).cast("B"), out.nbytes // len(out)  # type: ignore[arg-type]
    views = [whole[i : i + size] for i in range(0, len(whole), size)]
    places = list(zip(fds.tolist(), offsets.tolist(), strict=True))
    for start in range(0, len(views), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(views)))
        for i in chunk:
            fd, offset = places[i]
            got: int | str
            if fd >= 0:
                got = os.preadv(fd, (views[i],), offset)
            else:
                assert paths is not None
                got = _read_file(paths[i], int(sizes[i]), views[i], offset)
            if isinstance(got, str):
                return i, got
            if got != size:
                return i, f"is truncated, {got} of {size} bytes found"
        for i in chunk if crc is not None else ():
            assert crc is not None
            if (found := zlib.crc32(views[i])) != crc[i]:
                return i, f"is damaged, crc32 {found:08x} found and {crc[i]:08x} expected"
        if not all_finite(out[start : chunk.stop]):
            return next(i for i in chunk if not all_finite(out[i])), "holds a value that is not finite"
    return None


def _read_file(path: bytes, size: int, view: memoryview, offset: int) -> int | str:
    """Bytes read of one row's own file, or what is wrong with it; never through a link, never waiting for a pipe."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    try:
        found = os.fstat(fd)
        if found.st_size != size or not stat.S_ISREG(found.st_mode):
            return f"has {found.st_size} bytes, expected a file of {size}"
        return os.preadv(fd, (view,), offset)
    finally:
        os.close(fd)


def all_finite(x: np.ndarray) -> bool:
    """Whether every value is finite, from the largest bit patterns: an exponent of all ones sorts last."""
    if x.dtype == np.uint8 or not x.size:
        return True
    signed, unsigned, top = (
        (np.int16, np.uint16, 0x7C00) if x.dtype == np.float16 else (np.int32, np.uint32, 0x7F800000)
    )
    negative = top | 1 << (8 * x.dtype.itemsize - 1)
    return bool(x.view(signed).max() < top and x.view(unsigned).max() < negative)


def read_manifest(folder: Path) -> tuple[Manifest, list[Entry]]:
    """The manifest of a store and its shards; every field is checked, see docs/store.md."""
    path = folder / "manifest.json"
    try:
        value = json.loads(read_regular(path, _JSON_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no manifest.json there, expected a store or 'digits'") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({told(error)})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not the manifest of a store, expected 'format': '{FORMAT}'")
    if value.get("version") != VERSION:
        raise UserError(f"{path}: version {shown(value.get('version'))}, expected {VERSION}")
    listed = value.get("shards")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: 'shards' is {shown(listed)}, expected a list of at least one")
    entries = [Entry.parse(e, str(path)) for e in listed]
    manifest = parse(
        value, str(path), str(folder.resolve()), sum(e.rows for e in entries), entries[0].flip_offset is not None
    )
    for entry in entries:
        # Before any memory is taken: a row count must fit what the shard's file can hold.
        room = manifest.row_bytes * (entry.rows if entry.layout == "packed" else 1)
        if max(entry.offset, entry.flip_offset or 0) + room > entry.bytes:
            raise UserError(
                f"{path}: {entry.rows} rows do not fit the {entry.bytes} bytes of shard {shown(entry.file)}"
            )
    mirrored = {e.flip_offset is not None for e in entries}
    if mirrored != {manifest.flips}:
        raise UserError(f"{path}: some shards have a flip_offset and some do not, expected all or none")
    return manifest, entries
