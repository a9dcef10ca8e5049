"""What belongs to the rows of a data set but lies elsewhere: an encoder's features, or the images behind latents.

A row and what comes with it have the same id. Both are compared with the data set when they are opened: a set that
lies shifted by one row trains without an error and without a use.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from lsep.data.images import LIMIT, SUFFIXES
from lsep.data.manifest import CorruptRow, Ids
from lsep.data.regular import read_regular
from lsep.data.store import Store
from lsep.data.tree import JSON_LIMIT
from lsep.errors import UserError, shown, told


def open_features(path: str, store: Store, flag: str = "--align.features") -> Store:
    """The store of features at `path`; raises UserError unless its rows are those of `store`."""
    if not (Path(path) / "manifest.json").is_file():
        raise UserError(f"{flag} {path}: no manifest.json there, expected a store of features (lsep data features)")
    features = Store(path, check_rows=store.check_rows)
    own, theirs = features.manifest, store.manifest
    if own.kind != "features":
        raise UserError(f"{flag} {path}: a store of {own.kind}, expected one of features (lsep data features)")
    if own.rows != theirs.rows:
        raise UserError(f"{flag} {path}: {own.rows} rows, expected {theirs.rows} as {theirs.source} has")
    if own.flips != theirs.flips:
        have, want = ("mirror images", "none") if own.flips else ("no mirror images", "some")
        raise UserError(f"{flag} {path}: {have}, expected {want} as {theirs.source} has")
    _same_labels(features.labels, store.labels, f"{flag} {path}", theirs.source)
    return features


def _same_labels(found: Ids, wanted: Ids, where: str, source: str) -> None:
    wrong = np.flatnonzero(found != wanted)
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{where}: the label of row {row} is {int(found[row])} and {int(wanted[row])} in {source}, "
            "expected the same images in the same order"
        )


class Images:
    """Files of images, one for each row of a data set; the rows' own paths, or those of `folder` in sorted order."""

    def __init__(self, folder: str, store: Store, flag: str = "--align.images") -> None:
        """Raises UserError where the folder's images are not those of `store`."""
        self.folder = Path(folder)
        self.paths, labels = _list(self.folder, store, flag)
        rows, data = store.manifest.rows, store.manifest.source
        if len(self.paths) != rows:
            raise UserError(f"{flag} {folder}: {len(self.paths)} images, expected {rows} as {data} has")
        for path in self.paths:
            if path.startswith("/") or ".." in path.split("/"):
                raise UserError(f"{flag} {folder}: path {shown(path)} of {data} leaves the folder")
            if not _named(path):
                raise UserError(f"{flag} {folder}: path {shown(path)} of {data}, expected the name of a file")
        if labels is not None:
            _same_labels(labels, store.labels, f"{flag} {folder}", data)
        self.damaged: dict[int, str] = {}
        """What `read` says of samples whose images turned out to be none."""

    def fingerprint(self) -> str:
        """sha256 of the paths below the folder, in the order of the rows."""
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()

    def path(self, sample: int) -> Path:
        return self.folder / self.paths[sample]

    def read(self, ids: Ids) -> list[bytes]:
        """The files of these rows; raises CorruptRow for the first that cannot be read."""
        out = []
        for sample in ids.tolist():
            if sample in self.damaged:
                raise CorruptRow(self.damaged[sample], sample)
            path = self.path(sample)
            try:
                data = read_regular(path, LIMIT)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise CorruptRow(f"{path}: cannot be read ({why}; sample {sample})", sample) from None
            if not data:
                raise CorruptRow(f"{path}: is empty, expected an image (sample {sample})", sample)
            out.append(data)
        return out

    def give_up(self, sample: int, sentence: str) -> None:
        """From here on this sample counts as damaged."""
        self.damaged[sample] = f"{sentence} (sample {sample})"


def _named(path: str) -> bool:
    """Whether a file can have this name."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _list(folder: Path, store: Store, flag: str) -> tuple[list[str], Ids | None]:
    """Paths below `folder` in the order of the rows, and their labels where the folder says them."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: not a folder, expected that of the images")
    paths = store.paths()
    if paths and paths[0].lower().endswith(SUFFIXES):
        return paths, None
    listing = folder / "dataset.json"
    if listing.is_file() and (listed := _listed(listing)):
        return [path for path, _ in listed], np.array([label for _, label in listed], np.int64)
    found = _walked(folder)
    counted = len(found) == store.manifest.rows
    return found, _labels_of(found, store, f"{flag} {folder}") if counted else None


def _walked(folder: Path) -> list[str]:
    """All images below `folder`, through links as well; folder by folder in the order of their names."""
    found, ways = [], {str(folder): {os.path.realpath(folder)}}
    for root, folders, names in os.walk(folder, followlinks=True):
        way = ways.pop(root)
        for name in [*folders]:
            path = os.path.join(root, name)  # noqa: PTH118 - as os.walk joins them
            place = os.path.realpath(path)
            if name.startswith(".") or name == "__MACOSX" or place in way:  # a link to where we come from has no end
                folders.remove(name)
            else:
                ways[path] = way | {place}
        below = os.path.relpath(root, folder) + "/" if root != str(folder) else ""
        found += [below + name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found, key=lambda path: path.replace("/", "\0"))


def _labels_of(paths: list[str], store: Store, where: str) -> Ids | None:
    """The labels that folders of classes say, in the order of their names.

    None of one folder or of numbered ones, and of rows that all have one label, as without classes. Raises UserError
    where the folders are of another number than the labels that there are.
    """
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    classes, present = sorted(set(folders)), np.unique(store.labels)
    # REPA and EDM2 deal images into folders by number, which says nothing about their class.
    if 1 in (len(classes), len(present)) or all(re.fullmatch(r"\d{5}", name) for name in classes):
        return None
    if len(classes) != len(present):
        raise UserError(
            f"{where}: {len(classes)} folders of images, but rows of {len(present)} classes in "
            f"{store.manifest.source}, expected one folder a class, or all in one folder, which says nothing of classes"
        )
    of = dict(zip(classes, present.tolist(), strict=True))
    return np.array([of[name] for name in folders], np.int64)


def _listed(listing: Path) -> list[tuple[str, int]]:
    """Of `dataset.json` as EDM2 and REPA write it, {"labels": [["00000/img00000000.png", 6], ...]}, sorted by path."""
    try:
        listed = [(path, label) for path, label in json.loads(read_regular(listing, JSON_LIMIT))["labels"] or ()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{listing}: cannot be read as a list of images ({told(error)})") from None
    for path, label in listed:
        if not isinstance(path, str) or type(label) is not int or not 0 <= label < 2**31:
            raise UserError(f"{listing}: {shown([path, label])} in labels, expected a path and a label")
    return sorted(listed)
