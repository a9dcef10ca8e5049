"""Parquet files of Hugging Face's image data sets as a list of images: a column of images, and one of labels.

The image's column is a struct with `bytes` (datasets' Image) or binary; names of the classes come from the files' own
description of their features. Row groups are read one after the other and the last ones kept.
"""

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from lsep.data.forms_npy import count_classes
from lsep.data.pictures import Listed
from lsep.data.regular import open_regular
from lsep.errors import UserError, shown, told

INSTALL = "pip install pyarrow"
_GROUP_LIMIT = 4 << 30
"""Bytes of a row group, which is in memory as a whole."""
_KEPT = 2
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")
_LABELS = ("label", "labels", "cls", "class_id", "fine_label")


def files(path: Path) -> list[Path]:
    """The parquet files at `path`, a file or a folder that holds them; none where that is something else."""
    if path.is_dir():
        return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    return [path] if path.suffix == ".parquet" and path.exists() else []


def open_files(paths: list[Path], unlabelled: bool) -> "Tables":
    """The images in these files, in their order."""
    splits = sorted({re.split(r"-\d{5}", path.stem)[0] for path in paths})
    if len(splits) > 1:
        raise UserError(
            f"{paths[0].parent}: files of {len(splits)} splits ({shown(', '.join(splits))}), expected those of one: "
            "put them into a folder of their own"
        )
    return Tables(paths, unlabelled)


class Tables:
    """See `pictures.Pictures`."""

    def __init__(self, paths: list[Path], unlabelled: bool) -> None:
        self._paths, self._lock = paths, threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._opened = [_open(path) for path in paths]
        schema = self._opened[0].schema_arrow
        for path, opened in zip(paths, self._opened, strict=True):
            if not opened.schema_arrow.equals(schema):
                found = shown(opened.schema_arrow.names)
                raise UserError(f"{path}: columns {found}, expected those of {paths[0].name}, of the same types")
        features = _features(schema)
        self._column = _image_column(schema, features, paths[0])
        self._groups = [(f, g) for f, opened in enumerate(self._opened) for g in range(opened.num_row_groups)]
        self._rows = [self._opened[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = np.cumsum([0, *self._rows])
        if not self._starts[-1]:
            raise UserError(f"{paths[0]}: no rows inside, expected images")
        digits = len(str(self._starts[-1]))
        self.names = [f"{paths[f].name}/{i:0{digits}d}" for (f, _), i in self._places()]
        column = None if unlabelled else _label_column(schema, features)
        self.listed = self._listed(column, features)

    def _places(self) -> list[tuple[tuple[int, int], int]]:
        """Of every row its group, and its number in the file."""
        places, before = [], dict.fromkeys(range(len(self._paths)), 0)
        for (f, g), rows in zip(self._groups, self._rows, strict=True):
            places += [((f, g), before[f] + i) for i in range(rows)]
            before[f] += rows
        return places

    def _listed(self, column: str | None, features: dict[str, Any]) -> Listed:
        total = int(self._starts[-1])
        if column is None:
            return Listed(np.zeros(total, np.int64), 1, labelled=False)
        try:
            parts = [o.read(columns=[column]).column(0).to_numpy(zero_copy_only=False) for o in self._opened]
        except Exception as error:  # pyarrow's own kinds
            raise UserError(f"{self._paths[0]}: column {column!r} cannot be read ({told(error)})") from None
        labels = np.concatenate(parts)
        if labels.dtype.kind not in "iu":  # floats stand for missing ones
            raise UserError(f"{self._paths[0]}: column {column!r} lacks labels, expected a number in every row")
        labels = labels.astype(np.int64)
        if (labels == -1).all():  # as the test splits are published
            return Listed(np.zeros(total, np.int64), 1, labelled=False)
        names = features.get(column, {}).get("names") or ()
        names = tuple(names) if all(isinstance(n, str) for n in names) else ()
        classes = count_classes(labels, len(names) or None, lambda i: f"{self.where(i)}, column {column!r}")
        return Listed(labels, classes, names)

    def data(self, row: int) -> bytes:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._group(group)[row - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(
                f"{self.where(row)}: column {self._column!r} holds {shown(value)}, expected an image's bytes"
            )
        return data

    def _group(self, number: int) -> Any:
        f, g = key = self._groups[number]
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            size = self._opened[f].metadata.row_group(g).total_byte_size
            if size > _GROUP_LIMIT:
                raise UserError(f"{self._paths[f]}: a row group of {size} bytes, expected at most {_GROUP_LIMIT}")
            try:
                read = self._opened[f].read_row_group(g, columns=[self._column]).column(0)
            except Exception as error:
                raise UserError(f"{self._paths[f]}: row group {g} cannot be read ({told(error)})") from None
            self._kept[key] = read
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return read

    def where(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        f, _ = self._groups[group]
        first = next(i for i, (file, _) in enumerate(self._groups) if file == f)
        return f"{self._paths[f]}: row {row - int(self._starts[first])}"


def _open(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: needs pyarrow, which cannot be imported ({told(error)}): {INSTALL}") from None
    try:
        return ParquetFile(open_regular(path))
    except Exception as error:
        raise UserError(f"{path}: cannot be read as parquet ({told(error)})") from None


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets write of the columns; nothing of other files."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {k: v for k, v in features.items() if isinstance(v, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, features: dict[str, Any], path: Path) -> str:
    from pyarrow import types

    def holds(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    fitting = [field.name for field in schema if holds(field.type)]
    said = [name for name in fitting if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in fitting if name.lower() in _IMAGES]
    for choice in (said, named, fitting):
        if len(choice) == 1:
            return choice[0]
    raise UserError(
        f"{path}: columns {shown(schema.names)}, expected one of images (a struct with 'bytes', or binary, named "
        f"{', '.join(_IMAGES)})"
    )


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    from pyarrow import types

    fitting = [field.name for field in schema if types.is_integer(field.type)]
    said = [name for name in fitting if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in _LABELS if name in fitting]
    return next((choice[0] for choice in (said if len(said) == 1 else [], named, said) if choice), None)
