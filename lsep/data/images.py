"""Image folders: which files belong to which class, and the square cut that a VAE or a pixel model sees.

The cut is ADM's: halve with a box filter while the shorter side stays at least twice the target, go to the target by
a bicubic filter, keep the centre. `load_image` and `center_crop` serve the pixel form and the encoder alike.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsep.data.manifest import Ids
from lsep.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def list_images(folder: Path) -> tuple[list[Path], Ids, tuple[str, ...]]:
    """Paths, labels `(N,)` and class names of `folder/<class>/<image>`, all in sorted order.

    The label is the class folder's place among the sorted names. A class folder without images right inside is
    refused: it is either an empty class or a folder one level too high, whose labels would be wrong.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder, expected one folder for each class with images inside")
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no folders inside, expected one for each class with images inside")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            e.name
            for e in os.scandir(folder / name)
            if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")
        ]
        if not found:
            raise UserError(f"{folder / name}: no images right inside, expected at least one ({', '.join(SUFFIXES)})")
        paths += [folder / name / file for file in sorted(found)]
        labels += [label] * len(found)
    return paths, np.array(labels, np.int64), tuple(classes)


def load_image(path: Path) -> "Image":
    """The image in RGB, as stored (an orientation tag is not applied, as in the published data sets)."""
    return open_image(path, path)


def open_image(path: Path, data: bytes | Path) -> "Image":
    """As `load_image` from the bytes of the file `path`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            if image.mode.startswith("I"):  # of 16 bits, of which a conversion would keep the lowest 255 levels
                return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # decoders meet damage with anything from SyntaxError to DecompressionBombError
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from None


def center_crop(image: "Image", size: int) -> np.ndarray:
    """The central square of an RGB image as uint8 `(3, size, size)`; smaller images are enlarged."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    cut = np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)
    return np.ascontiguousarray(cut.transpose(2, 0, 1))


def decoded(square: Callable[[int], np.ndarray], cuts: Sequence[range]) -> Iterator[np.ndarray]:
    """The images `square(row)` of each cut of rows as `(B, 3, size, size)`, read by threads one cut ahead."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="lsep-decode")
    try:
        ahead = [pool.submit(square, row) for row in cuts[0]]
        for following in [*cuts[1:], range(0)]:
            now, ahead = ahead, [pool.submit(square, row) for row in following]
            yield np.stack([future.result() for future in now])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_cuts(start: int, stop: int, size: int) -> list[range]:
    """Rows start to stop - 1 in batches counted from start."""
    return [range(i, min(i + size, stop)) for i in range(start, stop, size)]
