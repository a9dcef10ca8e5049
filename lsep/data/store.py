"""The store: safetensors shards of fixed-size rows beside one `manifest.json`.

    write_store(path, kind="moments", x=moments, y=labels, num_classes=1000, scale=0.18215)
    Store(path).read(ids)

Rows are read with `pread`: a shard truncated under a running training becomes an error that names file and row, where
a memory map would kill the process.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lsep.data.manifest import Ids, Manifest, Rows
from lsep.errors import UserError

VERSION = 1
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "U8": np.dtype("uint8"),
    "I64": np.dtype("int64"),
}


class _Shard:
    """One safetensors file: open descriptor, byte offset and type of its rows."""

    def __init__(self, path: Path, manifest: Manifest, rows: int) -> None:
        self.path, self.rows = path, rows
        try:
            self.file = path.open("rb")  # closed with the shard
        except OSError as error:
            raise UserError(
                f"{path}: the manifest names this shard, but it cannot be opened: {error.strerror}"
            ) from None
        self.fd = self.file.fileno()
        size = os.fstat(self.fd).st_size
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: not a safetensors file, or truncated inside its header")
        try:
            header: dict[str, Any] = json.loads(os.pread(self.fd, length, 8))
            self.columns = {k: self._column(v, 8 + length) for k, v in header.items() if k != "__metadata__"}
            x_dtype, x_shape, self.offset, end = self.columns[manifest.kind]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: expected a safetensors file with a {manifest.kind!r} tensor ({error!r})"
            ) from None
        if x_shape != (rows, *manifest.row_shape):
            raise UserError(
                f"{path}: {manifest.kind} has shape {x_shape}, expected {(rows, *manifest.row_shape)} by the manifest"
            )
        if end > size:
            raise UserError(f"{path}: truncated, {size} bytes found and {end} expected")
        self.dtype = x_dtype
        self.row_bytes = x_dtype.itemsize * int(np.prod(manifest.row_shape))
        if end - self.offset != rows * self.row_bytes:
            raise UserError(
                f"{path}: {manifest.kind} spans {end - self.offset} bytes, expected {rows * self.row_bytes}"
            )

    @staticmethod
    def _column(entry: dict[str, Any], base: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
        start, end = entry["data_offsets"]
        return _DTYPES[entry["dtype"]], tuple(entry["shape"]), base + start, base + end

    def labels(self, name: str, classes: int) -> Ids:
        """A whole label column `(rows,)`, checked against the number of classes."""
        if name not in self.columns:
            raise UserError(f"{self.path}: no {name!r} tensor, expected int64 ({self.rows},)")
        dtype, shape, start, end = self.columns[name]
        if dtype != np.int64 or shape != (self.rows,):
            raise UserError(f"{self.path}: {name} is {dtype} {shape}, expected int64 ({self.rows},)")
        labels = np.frombuffer(os.pread(self.fd, end - start, start), np.int64)
        if len(labels) != self.rows:
            raise UserError(f"{self.path}: truncated inside {name!r}")
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            raise UserError(
                f"{self.path}: {name} of row {row} is {int(labels[row])}, "
                f"expected from 0 to {classes - 1} by the manifest"
            )
        return labels

    def read_row(self, row: int, out: np.ndarray, sample: int) -> None:
        got = os.preadv(self.fd, [out.data], self.offset + row * self.row_bytes)
        if got != self.row_bytes:
            raise UserError(
                f"{self.path}: row {row} (sample {sample}) is truncated, {got} of {self.row_bytes} bytes found"
            )


class Store:
    """A data set on disk; ids count the rows of all shards in the manifest's order."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest, shards = _read_manifest(self.path)
        entry = self.manifest
        self._shards = [_Shard(_inside(self.path, file), entry, rows) for file, rows in shards]
        self._starts = np.cumsum([0] + [s.rows for s in self._shards])
        self._y = np.concatenate([s.labels("labels", entry.num_classes) for s in self._shards])
        self._probe_y = self._y
        if any("probe_labels" in s.columns for s in self._shards):
            self._probe_y = np.concatenate([s.labels("probe_labels", entry.probe_classes) for s in self._shards])
        elif entry.probe_classes != entry.num_classes:
            raise UserError(
                f"{self.path}: probe_classes is {entry.probe_classes} and the shards hold no 'probe_labels', "
                f"expected num_classes, {entry.num_classes}"
            )
        dtypes = {s.dtype for s in self._shards}
        if len(dtypes) > 1:
            raise UserError(f"{self.path}: shards hold different types {sorted(map(str, dtypes))}, expected one")
        self._dtype = dtypes.pop()

    def read(self, ids: Ids) -> Rows:
        x = np.empty((len(ids), *self.manifest.row_shape), self._dtype)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for out, sample, shard in zip(x, ids.tolist(), shards.tolist(), strict=True):
            self._shards[shard].read_row(sample - int(self._starts[shard]), out, sample)
        return Rows(x, self._y[ids], self._probe_y[ids])


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / 'manifest.json'}: shard {name!r} leaves the store's folder")
    return path


def _read_manifest(folder: Path) -> tuple[Manifest, list[tuple[str, int]]]:
    """The manifest, and (file, rows) of each shard."""
    path = folder / "manifest.json"
    try:
        entry = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--data.path {folder}: no manifest.json there, expected a store or 'digits'") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    try:
        if entry["version"] != VERSION:
            raise UserError(f"{path}: version {entry['version']!r}, expected {VERSION}")
        if entry["kind"] not in ("moments", "samples", "pixels"):
            raise UserError(f"{path}: kind {entry['kind']!r}, expected 'moments', 'samples' or 'pixels'")
        channels, height, width = (int(n) for n in entry["shape"])
        shards = [(str(s["file"]), int(s["rows"])) for s in entry["shards"]]
        if not shards or min(n for _, n in shards) < 1:
            raise UserError(f"{path}: expected at least one shard, each with at least one row")
        classes = int(entry["num_classes"])
        manifest = Manifest(
            source=str(folder.resolve()),
            kind=entry["kind"],
            shape=(channels, height, width),
            rows=sum(n for _, n in shards),
            num_classes=classes,
            probe_classes=int(entry.get("probe_classes") or classes),
            class_names=tuple(str(n) for n in entry.get("class_names", ())),
            scale=float(entry["scale"]),
            shift=float(entry.get("shift", 0.0)),
        )
        return manifest, shards
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__} {error}, expected the fields of a store's manifest") from None


def write_store(
    path: str | Path,
    *,
    kind: Literal["moments", "samples", "pixels"],
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    probe_y: np.ndarray | None = None,
    probe_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    scale: float = 1.0,
    shift: float = 0.0,
    shard_rows: int = 8192,
) -> None:
    """Write rows x `(N, *row_shape)` (float32, float16 or uint8) and labels `(N,)` as a store, the manifest last."""
    from safetensors.numpy import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, str | int]] = []
    for start in range(0, len(x), shard_rows):
        rows = slice(start, start + shard_rows)
        tensors = {kind: np.ascontiguousarray(x[rows]), "labels": y[rows].astype(np.int64)}
        if probe_y is not None:
            tensors["probe_labels"] = probe_y[rows].astype(np.int64)
        name = f"shard-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name)
        shards.append({"file": name, "rows": len(tensors["labels"])})
    channels = x.shape[1] // 2 if kind == "moments" else x.shape[1]
    manifest = {
        "version": VERSION, "kind": kind, "shape": [channels, *x.shape[2:]], "num_classes": num_classes,
        "probe_classes": probe_classes, "class_names": list(class_names), "scale": scale, "shift": shift,
        "shards": shards,
    }  # fmt: skip
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.replace(folder / "manifest.json")
