"""What a data set holds: kind, shape, classes and scale. The model's configuration follows from it.

A source of rows is anything with a `manifest` and `read(ids)`; there are two, `digits` and `store`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """Description of `rows` samples of one shape."""

    source: str
    """Where the data is, for messages."""
    kind: Literal["moments", "samples", "pixels"]
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

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of a stored row."""
        c, h, w = self.shape
        return (2 * c if self.kind == "moments" else c, h, w)


class Rows(NamedTuple):
    """Rows of a data set: x `(B, *row_shape)`, labels and probe labels `(B,)` int64."""

    x: np.ndarray
    y: Ids
    probe_y: Ids


class Source(Protocol):
    """A data set that can be read at random."""

    manifest: Manifest

    def read(self, ids: Ids) -> Rows:
        """The rows with these ids, in this order."""
        ...
