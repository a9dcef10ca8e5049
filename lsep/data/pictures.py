"""Lists of images with their labels, of a folder or a zip archive: what `encode` and `pack` read.

    open_pictures("imagenet/train").data(0)

Labels and order: by `dataset.json` where there is one (EDM2, REPA), else by torchvision's rules for folders of classes,
else by names (ADM) or without labels. What was passed over is counted by its reason.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lsep.data import Labels
from lsep.data.forms_npy import count_classes, json_labels
from lsep.data.images import LIMIT, SUFFIXES
from lsep.data.manifest import Ids
from lsep.data.tree import Tree
from lsep.errors import UserError, shown

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NUMBERED = re.compile(r"\d{5}/img\d{8}\.\w+")


@dataclass
class Listed:
    """What is known of a list of images: labels `(N,)` and names in their order."""

    labels: Ids
    num_classes: int
    class_names: tuple[str, ...] = ()
    labelled: bool = True
    passed_over: Counter[str] = field(default_factory=Counter)
    """Files that are not in the list, by reason."""


class Pictures(Protocol):
    """Images that can be read at random, from several threads at once."""

    listed: Listed
    names: list[str]
    """Of each image, unique; a path where it has one."""

    def data(self, row: int) -> bytes:
        """An image's file."""
        ...

    def where(self, row: int) -> str:
        """The image in messages."""
        ...


def open_pictures(path: Path, labels: Labels = "auto") -> Pictures:
    """The images at `path`: a folder, a zip archive, WebDataset's tars or parquet files.

    labels: folders (of classes, torchvision's rules), names (ADM's: the class stands before the first `_`), none, or
    auto: what `dataset.json` says, else folders, else none where there is no folder. Raises UserError where that cannot
    be told.
    """
    from lsep.data import pictures_parquet, pictures_tar

    for room in (pictures_tar, pictures_parquet):
        if files := room.files(path):
            if labels not in ("auto", "none"):
                raise UserError(f"--labels {labels}: {path} holds labels of its own, expected auto or none")
            return room.open_files(files, labels == "none")
    return InTree(Tree(path, "images"), labels)


def fingerprint(pictures: Pictures) -> str:
    """sha256 of names and labels: another list of images is noticed."""
    pairs = zip(pictures.names, pictures.listed.labels.tolist(), strict=True)
    return hashlib.sha256("".join(f"{name}\t{label}\n" for name, label in pairs).encode()).hexdigest()


def said(path: Path, listed: Listed) -> list[str]:
    """Lines on what was passed over and on missing labels, none where nothing was."""
    lines = []
    if listed.passed_over:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(listed.passed_over.items()))
        lines.append(f"{path}: {len(listed.labels)} images; passed over: {reasons}")
    if not listed.labelled:
        lines.append(f"{path}: no labels, so a model of it is unconditional and has no probe")
    return lines


class InTree:
    """Images of a folder or of a zip archive."""

    def __init__(self, tree: Tree, labels: Labels) -> None:
        self._tree = tree
        self._base, found, passed = _images(tree)
        if self._base:
            found = [name for name in found if name.startswith(self._base)]
        shorter = [name[len(self._base) :] for name in found]
        if not shorter:
            raise UserError(f"{tree.path}: no images inside, expected some ({', '.join(SUFFIXES)}){_passed(passed)}")
        self.names, self.listed = _labelled(tree, self._base, shorter, labels)
        self.listed.passed_over += passed
        if outside := len(shorter) - len(self.names):
            self.listed.passed_over["beside the folders of classes"] += outside
        for name in self.names:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"{tree.path}: file name {name!r} is not UTF-8, in which a store keeps paths") from None

    def data(self, row: int) -> bytes:
        return self._tree.read(self._base + self.names[row], LIMIT)

    def where(self, row: int) -> str:
        return self._tree.where(self._base + self.names[row])


def _passed(passed: Counter[str]) -> str:
    return f"; found {', '.join(f'{n} {reason}' for reason, n in sorted(passed.items()))}" if passed else ""


def _images(tree: Tree) -> tuple[str, list[str], Counter[str]]:
    """Folder inside an archive that holds all (ends with `/`, or is empty), images below the tree, and the others."""
    found, passed = [], Counter[str]()
    for name in tree.list("", ".*"):
        parts = name.split("/")
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            passed["hidden"] += 1
        elif name.lower().endswith(SUFFIXES):
            found.append(name)
        elif parts[-1] != "dataset.json":
            suffix = Path(parts[-1]).suffix.lower()
            passed[f"of type {suffix}" if suffix else "without a suffix"] += 1
    tops = {name.partition("/")[0] for name in found}
    if not tree.archive or tree.has("dataset.json") or len(tops) != 1 or any("/" not in name for name in found):
        return "", found, passed
    (top,) = tops  # an archive of one folder: of its images, or of its folders of classes
    deeper = all(name.count("/") > 1 for name in found)
    return (f"{top}/" if tree.has(f"{top}/dataset.json") or deeper else ""), found, passed


class _Order(NamedTuple):
    """Sorts as torchvision lists: class by class, in each folder by folder, in each file by file."""

    top: str
    folder: str
    name: str


def _labelled(tree: Tree, base: str, names: list[str], labels: Labels) -> tuple[list[str], Listed]:
    """Names in their order, and their labels."""
    if labels == "none":
        return sorted(names), Listed(np.zeros(len(names), np.int64), 1, labelled=False)
    if labels == "names":
        return _by_name(tree, sorted(names))
    if tree.has(base + "dataset.json"):
        if labels == "folders":
            raise UserError(
                f"--labels folders: {tree.where(base + 'dataset.json')} says the labels, expected auto, or that file "
                "taken away"
            )
        return _by_json(tree, base, sorted(names))
    in_folders = [name for name in names if "/" in name]
    if not in_folders:
        if labels == "folders":
            raise UserError(f"{tree.path}: no folders inside, expected one for each class with images inside")
        return sorted(names), Listed(np.zeros(len(names), np.int64), 1, labelled=False)
    if labels == "auto":
        _require_classes(tree, in_folders)
    return _by_folder(tree, base, in_folders)


def _by_json(tree: Tree, base: str, names: list[str]) -> tuple[list[str], Listed]:
    where = tree.where(f"{base}dataset.json")
    found = json_labels(tree, f"{base}dataset.json", base.rstrip("/"), [base + name for name in names])
    if found is None:
        return names, Listed(np.zeros(len(names), np.int64), 1, labelled=False)
    return names, Listed(found, count_classes(found, None, lambda i: f"{where}: {names[i]}"))


def _by_name(tree: Tree, names: list[str]) -> tuple[list[str], Listed]:
    """ADM's rule for its class-conditional models: the class is what stands before the first `_` of a file's name."""
    classes = []
    for name in names:
        before, mark, _ = name.rpartition("/")[2].partition("_")
        if not mark:
            raise UserError(f"--labels names: {tree.where(name)}, expected names as CLASS_more{Path(name).suffix}")
        classes.append(before)
    return names, _of_classes(classes, sorted(set(classes)))


def _by_folder(tree: Tree, base: str, names: list[str]) -> tuple[list[str], Listed]:
    names = sorted(names, key=lambda name: _Order(name.partition("/")[0], *name.rpartition("/")[::2]))
    tops = [name.partition("/")[0] for name in names]
    there = set(tops) if base else {f for f in tree.folders() if not f.startswith(".") and f != "__MACOSX"}
    if empty := sorted(there - set(tops)):
        raise UserError(
            f"{tree.where(empty[0])}: no images inside this folder of a class, expected at least one "
            f"({', '.join(SUFFIXES)}), or no such folder"
        )
    return names, _of_classes(tops, sorted(there))


def _of_classes(classes: Iterable[str], names: list[str]) -> Listed:
    number = {name: i for i, name in enumerate(names)}
    return Listed(np.array([number[name] for name in classes], np.int64), len(names), tuple(names))


def _require_classes(tree: Tree, names: list[str]) -> None:
    """Raise UserError where folders can hardly be classes: every label would be wrong without a word."""
    tops = sorted({name.partition("/")[0] for name in names})
    if tree.has("images/dataset.json"):
        raise UserError(
            f"{tree.path}: the labels are in images/dataset.json, expected the folder with it: {tree.path}/images"
        )
    if all(top.lower() in _SPLITS for top in tops):
        raise UserError(
            f"{tree.path}: its folders are {', '.join(tops)}, expected one folder for each class: name one of them, or "
            "say --labels folders"
        )
    if all(_NUMBERED.fullmatch(name) for name in names):
        raise UserError(
            f"{tree.path}: numbered folders as EDM2's and REPA's, which are no classes, and no dataset.json, expected "
            "that file, or --labels none"
        )
    deeper = {name.split("/")[1] for name in names if name.count("/") > 1}
    if len(tops) == 1 and len(deeper) > 1 and all(name.count("/") > 1 for name in names):
        raise UserError(
            f"{tree.where(tops[0])}: no images right inside the only folder, expected the folders of the classes in "
            f"{shown(str(tree.path))}: name {tree.where(tops[0])}, or say --labels folders"
        )
