"""The list of images that an encoding was begun with, kept while it is unfinished: rows count its images.

So a restart can say which image is gone, new or of another label, and with `--on-corrupt skip` go on without those that
are gone.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from lsep.data.pictures import Pictures
from lsep.data.regular import read_regular
from lsep.data.tree import JSON_LIMIT
from lsep.errors import UserError, shown

LISTING = "encode-images.txt"


def lines(pictures: Pictures) -> list[str]:
    """A line per image: its name as JSON, and its label."""
    return [f"{json.dumps(name)} {label}" for name, label in zip(pictures.names, pictures.listed.labels, strict=True)]


def _read(listing: Path) -> list[str]:
    """The lines of an earlier run; none where they cannot be read."""
    try:
        return read_regular(listing, JSON_LIMIT).decode().splitlines()
    except (OSError, ValueError):
        return []


def changed(listing: Path, pictures: Pictures) -> str:
    """In parentheses the first image that is gone and the first that is new, where the earlier list can be read."""
    before, now = _read(listing), lines(pictures)
    if not before:
        return ""
    old, new = set(before), set(now)
    gone = next((line for line in before if line not in new), None)
    come = next((line for line in now if line not in old), None)
    said = [f"{what} {shown(line)}" for what, line in (("without", gone), ("with", come)) if line is not None]
    return f" ({'; '.join([f'{len(before)} then and {len(now)} now', *said])})"


class Begun:
    """The earlier list, of which some images are gone; see `pictures.Pictures`."""

    def __init__(self, pictures: Pictures, names: list[str], labels: list[int]) -> None:
        self.names, self._pictures = names, pictures
        self.listed = replace(pictures.listed, labels=np.array(labels, np.int64))
        self._row = {name: row for row, name in enumerate(pictures.names)}

    def data(self, row: int) -> bytes:
        if (found := self._row.get(self.names[row])) is None:
            raise UserError(f"{self.where(row)}: is gone since the encoding was begun")
        return self._pictures.data(found)

    def where(self, row: int) -> str:
        found = self._row.get(self.names[row])
        return self.names[row] if found is None else self._pictures.where(found)


def as_begun(pictures: Pictures, listing: Path) -> Pictures:
    """The list of an earlier run where only some of its images are gone, else `pictures`."""
    before, now = _read(listing), lines(pictures)
    there = set(now)
    if len(before) <= len(now) or [line for line in before if line in there] != now:
        return pictures
    try:
        parts = [line.rpartition(" ") for line in before]
        return Begun(pictures, [json.loads(name) for name, _, _ in parts], [int(label) for _, _, label in parts])
    except ValueError:
        return pictures
