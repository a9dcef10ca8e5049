"""What a data set holds: kind, shape, classes and scale. The model's configuration follows from it.

A source of rows is anything with a `manifest` and `read(ids, flips)`, above all a `Store`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lsep.data import latents as latents_of
from lsep.data.latents import Latents
from lsep.errors import UserError, one_line, shown

Ids = npt.NDArray[np.int64]
Flips = npt.NDArray[np.bool_]
Kind = Literal["moments", "samples", "pixels", "features"]
KINDS = ("moments", "samples", "pixels", "features")
DTYPES = ("float32", "float16", "uint8")
MOST_CLASSES = 2**31
"""More than a reader takes."""


@dataclass(frozen=True)
class Origin:
    """The encoder that features are of."""

    name: str
    """Its transformers id or folder, as it was given."""
    size: int
    """Side of its input, in pixels."""
    sha256: str
    """Of its weights and of what its images go through."""


@dataclass(frozen=True)
class Manifest:
    """Description of `rows` samples of one shape."""

    source: str
    """Where the data is, for messages."""
    kind: Kind
    """moments: mean and std of a VAE posterior, (2C, H, W); samples: latents, (C, H, W); pixels: uint8, (C, H, W);
    features: an encoder's tokens on their grid, (C, H, W), for `align.features`, which no model is trained on."""
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
    encoder: Origin | None = None
    """Of features, where it is known."""
    latents: Latents | None = None
    """Of moments and samples: the way back to what their VAE decodes; None where an earlier version did not say."""
    labelled: bool = True
    """False of data without labels: every row's is 0, and the model is unconditional."""
    unused: tuple[tuple[int, int], ...] = ()
    """Classes without rows, which a model of this data has not seen, as ranges (first, last)."""

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of a stored row."""
        c, h, w = self.shape
        return (2 * c if self.kind == "moments" else c, h, w)

    def unseen(self, classes: Iterable[int] | None = None) -> str | None:
        """A sentence on those of `classes` (None: all) that have no rows; None where all have some."""
        if not self.labelled:
            return None
        if classes is None:
            count = sum(last - first + 1 for first, last in self.unused)
            which = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in self.unused[:5])
        else:
            found = [c for c in dict.fromkeys(classes) if any(a <= c <= b for a, b in self.unused)]
            count, which = len(found), ", ".join(map(str, found[:5]))
        if not count:
            return None
        more = ", ..." if len(self.unused) > 5 or (classes is not None and count > 5) else ""
        return f"{count} of {self.num_classes} classes have no rows in {self.source} ({which}{more})"

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize


def parse(value: dict[str, Any], where: str, source: str, rows: int, flips: bool) -> Manifest:
    """The manifest that the JSON object `value` describes, every field checked; `where` names it in errors."""

    def fail(name: str, wanted: str) -> UserError:
        return UserError(f"{where}: {name} is {shown(value.get(name))}, expected {wanted}")

    kind, shape, dtype = value.get("kind"), value.get("shape"), value.get("dtype")
    if kind not in KINDS:
        raise fail("kind", " or ".join(KINDS))
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 < n < 2**16 for n in shape):
        raise fail("shape", "three counts C, H, W")
    if dtype not in DTYPES or (kind == "pixels") != (dtype == "uint8"):
        raise fail("dtype", "uint8 for pixels, float32 or float16 for latents and features")
    classes, probe_classes = value.get("num_classes"), value.get("probe_classes")
    for name, count in (("num_classes", classes), ("probe_classes", probe_classes)):
        if (type(count) is not int or not 0 < count < MOST_CLASSES) and not (name == "probe_classes" and count is None):
            raise fail(name, "a count")
    names = value.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise fail("class_names", "a list of names")
    for name in ("scale", "shift"):
        number = value.get(name)
        if not isinstance(number, int | float) or not abs(number) < 1e30 or (name == "scale" and number == 0):
            raise fail(name, "a finite number")
    assert isinstance(classes, int)
    encoder = value.get("encoder")
    if encoder is not None and not (
        isinstance(encoder, dict) and encoder.keys() == {"name", "size", "sha256"} and type(encoder["size"]) is int
        and all(isinstance(encoder[k], str) and one_line(encoder[k]) for k in ("name", "sha256"))
    ):  # fmt: skip
        raise fail("encoder", "null, or name, size and sha256 of an encoder")
    if value.get("latents") is not None and kind not in ("moments", "samples"):
        raise fail("latents", "null, as the kind is neither moments nor samples")
    unused = value.get("unused", [])
    if not isinstance(unused, list) or not all(
        isinstance(r, list) and len(r) == 2 and all(type(n) is int and 0 <= n < classes for n in r) for r in unused
    ):
        raise fail("unused", "a list of ranges [first, last] of classes")
    labelled = value.get("labelled", True)
    if not isinstance(labelled, bool):
        raise fail("labelled", "true or false")
    return Manifest(
        source=source, kind=kind, shape=(shape[0], shape[1], shape[2]), dtype=dtype, rows=rows, num_classes=classes,
        probe_classes=probe_classes or classes, class_names=tuple(names), scale=float(value["scale"]),
        shift=float(value["shift"]), flips=flips, encoder=None if encoder is None else Origin(**encoder),
        latents=latents_of.parse(value.get("latents"), shape[0], where),
        labelled=labelled, unused=tuple((first, last) for first, last in unused),
    )  # fmt: skip


def parse_described(value: dict[str, Any], where: str, source: str) -> Manifest:
    """As `parse`, of a description apart from the data, which says rows and flips itself."""
    rows, flips = value.get("rows"), value.get("flips")
    if type(rows) is not int or rows < 1 or not isinstance(flips, bool):
        raise UserError(
            f"{where}: rows and flips are {shown(rows)} and {shown(flips)}, expected a count, and true or false"
        )
    return parse(value, where, source, rows, flips)


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
