"""WebDataset's tars as a list of images: members that share a name up to its first dot are one sample.

    n01440764_1.jpg  n01440764_1.cls     the label, a number or a class's name, is in .cls, or in .json under "label"

Tars are indexed once, header by header, and read in place at random.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lsep.data.forms_npy import count_classes
from lsep.data.images import LIMIT, SUFFIXES
from lsep.data.pictures import Listed
from lsep.data.regular import open_regular
from lsep.errors import UserError, shown, told

_LABEL_LIMIT = 1 << 20
"""Bytes of a sample's .cls or .json."""
_KEYS = ("label", "cls", "class_id")


class _Member(NamedTuple):
    tar: int
    name: str
    start: int
    size: int


class _Sample(NamedTuple):
    image: _Member
    label: int | str | None


def files(path: Path) -> list[Path]:
    """The tars at `path`, a file or a folder that holds them; none where that is something else."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" and path.exists() else []


def open_files(paths: list[Path], unlabelled: bool) -> "Tars":
    """The images in these tars, in their order."""
    return Tars(paths, unlabelled)


class Tars:
    """See `pictures.Pictures`."""

    def __init__(self, paths: list[Path], unlabelled: bool) -> None:
        self._paths = paths
        self._files: list[BinaryIO] = []
        samples: list[_Sample] = []
        passed: dict[str, int] = {}
        for number, path in enumerate(paths):
            try:
                self._files.append(open_regular(path))
                samples += _indexed(self._files[-1], number, path, passed)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror or told(error)})") from None
            except tarfile.TarError as error:
                raise UserError(f"{path}: expected an uncompressed tar, whole ({told(error)})") from None
        if not samples:
            raise UserError(f"{paths[0]}: no images inside, expected members as KEY.jpg and KEY.cls")
        self._images = [sample.image for sample in samples]
        self.names = [f"{paths[m.tar].name}/{m.name}" for m in self._images]
        self.listed = self._listed(samples, unlabelled)
        self.listed.passed_over.update(passed)

    def _listed(self, samples: list[_Sample], unlabelled: bool) -> Listed:
        labels = [sample.label for sample in samples]
        without = [i for i, label in enumerate(labels) if label is None]
        if unlabelled or len(without) == len(labels):
            return Listed(np.zeros(len(labels), np.int64), 1, labelled=False)
        if without:
            raise UserError(f"{self.where(without[0])}: no .cls or .json with its label, expected one as others have")
        if all(isinstance(label, int) for label in labels):
            for i, label in enumerate(labels):
                if not -(2**63) <= label < 2**63:  # type: ignore[operator]
                    raise UserError(f"{self.where(i)}: label {shown(label)} found, expected a class's number")
            numbers = np.array(labels, np.int64)
            return Listed(numbers, count_classes(numbers, None, self.where))
        names = sorted({str(label) for label in labels})
        of = {name: i for i, name in enumerate(names)}
        return Listed(np.array([of[str(label)] for label in labels], np.int64), len(names), tuple(names))

    def data(self, row: int) -> bytes:
        member = self._images[row]
        data = os.pread(self._files[member.tar].fileno(), member.size, member.start)
        if len(data) != member.size:
            raise UserError(f"{self.where(row)}: truncated, {len(data)} of {member.size} bytes found")
        return data

    def where(self, row: int) -> str:
        member = self._images[row]
        return f"{self._paths[member.tar]}:{member.name}"


def _indexed(file: BinaryIO, number: int, path: Path, passed: dict[str, int]) -> list[_Sample]:
    """Samples of one tar in the order of their images; other members are counted in `passed`."""
    images: dict[str, _Member] = {}
    labels: dict[str, int | str] = {}
    whole = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # or all of them stay in memory
            if not member.isreg() or member.issparse():
                continue
            folder, _, name = member.name.rpartition("/")
            key, _, kind = name.partition(".")
            key, kind = f"{folder}/{key}", kind.lower()
            if member.offset_data + member.size > whole:
                raise UserError(f"{path}:{member.name}: truncated, the tar ends at byte {whole}")
            if f".{kind}".endswith(SUFFIXES) and not name.startswith("."):
                if key in images or member.size > LIMIT:
                    what = "a second image" if key in images else f"{member.size} bytes found"
                    raise UserError(f"{path}:{member.name}: {what}, expected one image of at most {LIMIT} bytes")
                images[key] = _Member(number, member.name, member.offset_data, member.size)
            elif kind in ("cls", "json"):
                label = _label(file, member, kind, f"{path}:{member.name}")
                if label is not None and (kind == "cls" or key not in labels):
                    labels[key] = label
            else:
                passed[f"of type .{kind}"] = passed.get(f"of type .{kind}", 0) + 1
    return [_Sample(image, labels.get(key)) for key, image in images.items()]


def _label(file: BinaryIO, member: tarfile.TarInfo, kind: str, where: str) -> int | str | None:
    if member.size > _LABEL_LIMIT:
        raise UserError(f"{where}: {member.size} bytes found, expected a label in at most {_LABEL_LIMIT}")
    data = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        if kind == "cls":
            text = data.decode().strip()
            return int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else text or None
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as a label ({told(error)})") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
        return value if isinstance(value, int | str) and not isinstance(value, bool) else None
    return None
