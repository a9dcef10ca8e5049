"""Latents in one `.npy` file a row: the folders and zip archives of REPA, EDM2, SpeedrunDiT and fast-DiT.

`NpyRows` is the block source of all four. Nothing is unpickled, and a file
whose type, shape or size is not what its set promises is named.
"""

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lsep.data.latents import Latents, raw
from lsep.data.manifest import MOST_CLASSES, Ids, Kind
from lsep.data.tree import JSON_LIMIT, Tree
from lsep.data.writer import Block, Header
from lsep.errors import UserError, told

THREADS = 8  # files on a network disk are waited for, not computed with
DTYPES = (np.dtype("float32"), np.dtype("float16"))


class NpyHeader(NamedTuple):
    """What a `.npy` file says of itself; `offset` is the byte where its values start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int


@lru_cache(maxsize=64)  # a set's files share one header, and parsing it costs more than reading the file
def _parse(head: bytes) -> NpyHeader:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return NpyHeader(dtype, shape, fortran, len(head))


def npy_header(data: bytes, where: str, size: int | None = None) -> NpyHeader:
    """The header of a whole `.npy` file; raises UserError, naming `where`, when it has none or values are missing.

    `size`: bytes of the file where `data` is only its beginning.
    """
    size = len(data) if size is None else size
    width = 4 if data[6:7] > b"\x01" else 2
    end = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if data[:6] != b"\x93NUMPY" or len(data) < end:
        raise UserError(f"{where}: {len(data)} bytes without a whole .npy header, expected an array saved by numpy")
    try:
        header = _parse(data[:end])
    except Exception as error:  # numpy parses it as Python: damage raises anything from TokenError to MemoryError
        raise UserError(f"{where}: its .npy header cannot be read ({type(error).__name__})") from None
    if min(header.shape, default=0) < 0:
        raise UserError(f"{where}: shape {header.shape} found, expected no negative size")
    if header.dtype.hasobject:
        raise UserError(f"{where}: holds pickled Python objects, expected numbers")
    expected = end + int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    if size != expected:
        raise UserError(f"{where}: {size} bytes found, expected {expected} by its .npy header")
    return header


def npy_array(data: bytes, where: str) -> np.ndarray:
    """The array of a whole `.npy` file, of numbers only."""
    header = npy_header(data, where)
    if header.dtype.kind not in "fiu":
        raise UserError(f"{where}: holds {header.dtype}, expected numbers")
    values = np.frombuffer(data, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran else "C")


def each(work: Callable[[int], None], count: int) -> None:
    """`work(i)` for each i in several threads; the first error in order is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, range(count), chunksize=1):
            pass


def count_classes(labels: Ids, given: int | None, name: Callable[[int], str]) -> int:
    """Number of classes: `given`, or the largest label + 1; `name(row)` is the label's place in messages."""
    classes = max(1, int(labels.max(initial=-1)) + 1) if given is None else given
    if classes >= MOST_CLASSES:
        row = int(labels.argmax())
        raise UserError(f"{name(row)}: label {int(labels[row])} found, expected below {MOST_CLASSES - 1}")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = int(wrong[0])
        top = "up" if given is None else f"to {classes - 1} by the number of classes"
        raise UserError(f"{name(row)}: label {int(labels[row])} found, expected from 0 {top}")
    return classes


def json_labels(tree: Tree, file: str, base: str, names: Sequence[str]) -> Ids | None:
    """Labels `(N,)` of `names` (below folder `base`) from a `dataset.json` = {"labels": [[name, label], ...]}.

    None where it says {"labels": null}, as the files of sets without labels do.
    """
    where = tree.where(file)
    if not tree.has(file):
        raise UserError(f"{where}: does not exist, expected the labels as {{'labels': [[file, label], ...]}}")
    try:
        pairs = json.loads(tree.read(file, JSON_LIMIT))["labels"]
        if pairs is None:
            return None
        table = {str(name).replace("\\", "/"): label for name, label in pairs}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: expected {{'labels': [[file, label], ...]}} ({told(error)})") from None
    keys = [name[len(base) + 1 :] if base else name for name in names]
    labels = np.empty(len(keys), np.int64)
    for i, key in enumerate(keys):
        label = table.get(key)
        if type(label) is not int or not -(2**63) <= label < 2**63:
            found = "no label" if label is None else f"label {str(label)[:40]}"
            raise UserError(f"{where}: {found} for {key!r}, expected a whole number")
        labels[i] = label
    if len(pairs) != len(keys):
        extra = min(set(table) - set(keys), default="a file named twice")
        raise UserError(f"{where}: {len(pairs)} labels found, expected {len(keys)}, one for each file (see {extra!r})")
    return labels


class NpyRows:
    """Block source over `.npy` files of `(C', H, W)` or `(1, C', H, W)` each, all of one type and shape.

    `channels` is what C' must be (None: any); of moments it counts mean and std. `change(x)` is applied to each block.
    """

    def __init__(
        self,
        tree: Tree,
        names: Sequence[str],
        labels: Ids | None,
        kind: Kind,
        channels: int | None,
        scale: float,
        num_classes: int,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        latents: Callable[[int], Latents] = raw,
    ) -> None:
        """labels: None of a set without; latents: what is said of them, by their channels, `change` included."""
        self.tree, self.names = tree, names
        self.labels = np.zeros(len(names), np.int64) if labels is None else labels
        self.rows, self._change = len(names), change
        where = tree.where(names[0])
        first = npy_array(tree.read(names[0]), where)
        shape = first.shape[1:] if first.ndim == 4 and first.shape[0] == 1 else first.shape
        if len(shape) != 3 or channels not in (None, shape[0]) or 0 in shape:
            expected = f"({channels or 'C'}, H, W) or (1, {channels or 'C'}, H, W)"
            raise UserError(f"{where}: shape {first.shape} found, expected {expected}")
        if first.dtype not in DTYPES:
            raise UserError(f"{where}: {first.dtype} found, expected float32 (or float16)")
        self.row_shape, self.dtype = shape, first.dtype
        latent = shape[0] // 2 if kind == "moments" else shape[0]
        self.header = Header(
            kind,
            (latent, shape[1], shape[2]),
            first.dtype.name,
            num_classes,
            scale=scale,
            latents=latents(latent),
            labelled=labels is not None,
        )

    def row(self, i: int) -> tuple[np.ndarray, bytes, NpyHeader]:
        """Row i as `row_shape`, with its file's bytes and header, checked against the first row."""
        where = self.tree.where(self.names[i])
        data = self.tree.read(self.names[i])
        array = npy_array(data, where)
        if array.dtype != self.dtype or array.shape not in (self.row_shape, (1, *self.row_shape)):
            raise UserError(
                f"{where}: {array.dtype} {array.shape} found, expected {self.dtype} {self.row_shape} "
                f"as in {self.names[0]}"
            )
        return array.reshape(self.row_shape), data, npy_header(data, where)

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        x = np.empty((stop - start, *self.row_shape), self.dtype)

        def fill(i: int) -> None:
            x[i] = self.row(start + i)[0]

        each(fill, len(x))
        return Block(x if self._change is None else self._change(x), self.labels[start:stop])
