"""Images: decoding to RGB, and the square cut that a VAE or a pixel model sees.

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

from lsep.data.regular import read_regular
from lsep.errors import UserError, told

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
LIMIT = 256 << 20
"""Bytes of an image's file."""
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds 16 bits


def load_image(path: Path) -> "Image":
    """The image in RGB, as stored (an orientation tag is not applied, as in the published data sets)."""
    return open_image(path, path)


def open_image(path: Path | str, data: bytes | Path) -> "Image":
    """As `load_image` from the bytes of the file `path`, or of what it names in messages."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data if isinstance(data, bytes) else read_regular(data, LIMIT))) as image:
            if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
                kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
                raise UserError(f"holds {kind}, whose black and white no file says, expected 8 or 16 bits a channel")
            if image.mode.startswith("I"):  # of 16 bits, of which a conversion would keep the lowest 255 levels
                return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: cannot be read as an image ({_beginning(data)})") from None
    except Exception as error:  # decoders meet damage with anything from SyntaxError to DecompressionBombError
        raise UserError(f"{path}: cannot be read as an image ({told(error)})") from None


def _beginning(data: Path | bytes) -> str:
    if isinstance(data, Path):
        data = read_regular(data, LIMIT)
    return f"{len(data)} bytes of no known format, beginning {data[:12]!r}" if data else "it is empty"


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
