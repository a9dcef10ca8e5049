"""What a data set holds: kind, shape, classes and scale. The model's configuration follows from it.

A source of rows is anything with a `manifest` and `read(ids, flips)`, above all a `Store`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lsep.errors import UserError

Ids = npt.NDArray[np.int64]
Flips = npt.NDArray[np.bool_]
Kind = Literal["moments", "samples", "pixels"]
KINDS = ("moments", "samples", "pixels")


@dataclass(frozen=True)
class Manifest:
    """Description of `rows` samples of one shape."""

    source: str
    """Where the data is, for messages."""
    kind: Kind
    """moments: mean and std of a VAE posterior, (2C, H, W); samples: latents, (C, H, W); pixels: uint8, (C, H, W)."""
    shape: tuple[int, int, int]
    """C, H, W of a latent or image."""
    rows: int
    num_classes: int
    """Classes of the conditioning label."""
    probe_classes: int
    """Classes of the probe's label: its own column's, or those of the conditioning label."""
    class_names: tuple[str, ...] = ()
    scale: float = 1.0
    """The model sees (latent - shift) * scale; pixels go to [-1, 1] instead."""
    shift: float = 0.0
    dtype: str = "float32"
    """Type of the stored rows: float32, float16 or uint8."""
    flips: bool = False
    """Every row has a second, mirrored variant."""

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of a stored row."""
        c, h, w = self.shape
        return (2 * c if self.kind == "moments" else c, h, w)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize


class Rows(NamedTuple):
    """Rows of a data set: x `(B, *row_shape)`, labels and probe labels `(B,)` int64."""

    x: np.ndarray
    y: Ids
    probe_y: Ids


class CorruptRow(UserError):
    """A row that must not be trained on; `sample` is its id."""

    def __init__(self, message: str, sample: int) -> None:
        super().__init__(message)
        self.sample = sample


class Source(Protocol):
    """A data set that can be read at random, from several threads at once."""

    manifest: Manifest

    def read(self, ids: Ids, flips: Flips | None = None, out: np.ndarray | None = None) -> Rows:
        """The rows with these ids, in this order, mirrored where `flips` says so; into `out` if given.

        Raises CorruptRow for the first row that is damaged.
        """
        ...
