"""Listed images as squares of one size, for `pack` and `encode`; damaged ones end it or are left out."""

from typing import Literal

import numpy as np

from lsep.data.images import center_crop, open_image
from lsep.data.manifest import Ids
from lsep.data.pictures import Pictures, fingerprint
from lsep.data.writer import Block, Header
from lsep.errors import UserError

OnCorrupt = Literal["error", "skip"]


class Squares:
    """Image after image as uint8 `(3, size, size)`, from several threads at once."""

    def __init__(self, pictures: Pictures, size: int, on_corrupt: OnCorrupt) -> None:
        self.pictures, self.size, self._skip = pictures, size, on_corrupt == "skip"
        self._passed: dict[int, str] = {}

    def __call__(self, row: int) -> np.ndarray:
        """The square; zeros in place of an image that is to be left out, so that the others' batches stay the same."""
        try:
            return center_crop(open_image(self.pictures.where(row), self.pictures.data(row)), self.size)
        except UserError as error:
            if not self._skip:
                raise UserError(f"{error}; --on-corrupt skip goes on without it") from None
            self._passed[row] = str(error)
            return np.zeros((3, self.size, self.size), np.uint8)

    def block(self, start: int, stop: int, x: np.ndarray, flip: np.ndarray | None = None) -> Block:
        """Rows start to stop - 1 without those of damaged images."""
        kept: Ids = np.array([row for row in range(start, stop) if row not in self._passed], np.int64)
        if len(kept) < stop - start:
            x, flip = x[kept - start], None if flip is None else flip[kept - start]
        said = [self._passed[row] for row in range(start, stop) if row in self._passed]
        paths = [self.pictures.names[row] for row in kept]
        return Block(x, self.pictures.listed.labels[kept], flip=flip, paths=paths, passed_over=said)


class PixelRows:
    """Block source of squares as pixels `(3, size, size)`."""

    def __init__(self, squares: Squares, num_classes: int) -> None:
        listed, side = squares.pictures.listed, squares.size
        self._squares, self.rows = squares, len(listed.labels)
        self.header = Header(
            "pixels", (3, side, side), "uint8", num_classes, class_names=listed.class_names, labelled=listed.labelled
        )

    @property
    def identity(self) -> str:
        """sha256 of names and labels, which two lists of images do not share."""
        return fingerprint(self._squares.pictures)

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        from lsep.data.forms_npy import each

        x = np.empty((stop - start, *self.header.shape), np.uint8)

        def fill(i: int) -> None:
            x[i] = self._squares(start + i)

        each(fill, len(x))
        return self._squares.block(start, stop, x)
