"""A store's images to a store of an encoder's tokens, `lsep data features`: encoded once, read in every epoch.

Rows, labels and mirror images are those of the store they belong to. Written like any store: whole shards, a killed run
goes on, processes deal the shards among them.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lsep.config import DataConfig
from lsep.data.encode import pick_device, ranks
from lsep.data.images import center_crop, decoded, in_cuts, open_image
from lsep.data.loader import open_source
from lsep.data.paired import Images
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build
from lsep.encoder import Encoder
from lsep.errors import UserError

_SHARD = 1 << 30
"""Bytes of a shard: what is in memory at once is twice that."""


def write_features(
    store: str,
    out: Path,
    encoder: str,
    images: Path | None = None,
    image_size: int | None = None,
    patch_size: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    shard_rows: int | None = None,
    device: str = "auto",
) -> None:
    """Write the tokens of every image of `store` (and of its mirror image, where it has them) into the store `out`.

    Images are those of a store of pixels, or in the folder `images` those behind latents. Raises UserError where they
    are not the store's, or the encoder's tokens are not as many as those of a model of this `patch_size`.
    """
    for flag, value in (
        ("--patch-size", patch_size), ("--batch-size", batch_size), ("--shard-rows", shard_rows),
        ("--image-size", image_size),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}, expected at least 1")
    rank, world, local = ranks()
    source = open_source(DataConfig(path=store), flag="")
    pixels, side = source.manifest.kind == "pixels", source.manifest.shape[1]
    if pixels == (images is not None):
        has, want = ("images itself", "no --images") if pixels else ("latents", "--images, the folder of their images")
        raise UserError(f"{store} has {has}, expected {want}")
    if image_size is not None and images is None:
        raise UserError(f"--image-size is {image_size} without --images, which it is for")
    if pixels and source.manifest.shape[0] not in (1, 3):
        raise UserError(f"{store}: images of {source.manifest.shape[0]} channels, expected 1 or 3")
    if side % patch_size:
        raise UserError(f"--patch-size is {patch_size}, expected a divisor of the data's side {side}")
    found = None if images is None else Images(str(images), source, "--images")
    place = pick_device(device, local)
    model = Encoder(encoder, side // patch_size, place, precision == "bf16", "--encoder")
    tokens = Tokens(source, found, model, batch_size, image_size or 8 * side, dtype)
    identity = {
        "precision": precision, "batch_size": batch_size, "image_size": tokens.image_size, "device": place.type,
        "images_sha256": _content(source, found),
    }  # fmt: skip
    build(tokens, out, shard_rows or tokens.fitting_rows(), rank, world, identity=identity)


def _content(source: Store, images: Images | None) -> str:
    """What is encoded, so that a build that was killed does not go on with other images."""
    manifest = source.path / "manifest.json"
    text = f"{source.path.resolve()} {manifest.read_text() if manifest.is_file() else ''}"
    if images is not None:
        text += f" {images.folder.resolve()} {images.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Tokens:
    """Tokens of a store's images as rows `(width, grid, grid)`, for `writer.build`."""

    source: Store
    images: Images | None
    encoder: Encoder
    batch_size: int
    image_size: int
    dtype: str

    def __post_init__(self) -> None:
        m, grid = self.source.manifest, self.encoder.grid
        self.rows = m.rows
        self.header = Header(
            "features", (self.encoder.width, grid, grid), self.dtype, m.num_classes, class_names=m.class_names,
            flips=m.flips, encoder=self.encoder.origin,
        )  # fmt: skip

    def fitting_rows(self) -> int:
        """Rows of a shard of at most `_SHARD` bytes, in whole batches."""
        row = math.prod(self.header.shape) * np.dtype(self.dtype).itemsize * (1 + self.header.flips)
        return max(1, _SHARD // row // self.batch_size) * self.batch_size

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        cuts = in_cuts(start, stop, self.batch_size)
        found = [np.empty((stop - start, *self.header.shape), self.dtype) for _ in range(1 + self.header.flips)]
        for cut, variants in zip(cuts, self._pixels(cuts), strict=True):
            for x, images in zip(found, variants, strict=True):
                tokens = self._encoded(images)
                if not np.isfinite(tokens).all():
                    wanted = "--dtype float32" if self.dtype == "float16" else "numbers"
                    raise UserError(
                        f"{self.source.manifest.source}: rows {cut.start} to {cut.stop - 1} have tokens that are not "
                        f"finite in {self.dtype}, expected {wanted}"
                    )
                x[cut.start - start : cut.stop - start] = tokens
        return Block(found[0], self.source.labels[start:stop], flip=found[1] if self.header.flips else None)

    def _encoded(self, images: Tensor) -> np.ndarray:
        tokens = self.encoder(images).transpose(1, 2).unflatten(2, (self.encoder.grid, self.encoder.grid))
        return tokens.to(getattr(torch, self.dtype)).cpu().numpy()

    def _pixels(self, cuts: list[range]) -> Iterator[list[Tensor]]:
        """Of each cut the images `(B, C, H, W)` uint8 on the device, and their mirror images, if any."""
        flips, device = self.header.flips, self.encoder.device
        if self.images is None:
            for cut in cuts:
                ids = np.arange(cut.start, cut.stop)
                variants = [np.full(len(ids), v) for v in (False, True)] if flips else [None]
                yield [torch.from_numpy(self.source.read(ids, v).x).to(device) for v in variants]
            return
        for squares in decoded(self._square, cuts):
            images = torch.from_numpy(squares).to(device)
            yield [images, images.flip(-1)] if flips else [images]

    def _square(self, row: int) -> np.ndarray:
        assert self.images is not None
        (data,) = self.images.read(np.array([row]))
        return center_crop(open_image(self.images.path(row), data), self.image_size)
