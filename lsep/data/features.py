"""A store's images to a store of an encoder's tokens, `lsep data features`: encoded once, read in every epoch.

Rows, labels and mirror images are those of the store they belong to. Written like any store: whole shards, a killed run
goes on, processes deal the shards among them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lsep.config import DataConfig
from lsep.data.encode import pick_device, ranks
from lsep.data.images import center_crop, open_image
from lsep.data.loader import open_source
from lsep.data.manifest import Ids
from lsep.data.paired import Images
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build
from lsep.encoder import Encoder
from lsep.errors import UserError


def write_features(
    store: str,
    out: Path,
    encoder: str,
    images: Path | None = None,
    image_size: int | None = None,
    size: int | None = None,
    patch_size: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    shard_rows: int = 4096,
    device: str = "auto",
) -> None:
    """Write the tokens of every image of `store` (and of its mirror image, where it has them) into the store `out`.

    Images are those of a store of pixels, or in the folder `images` those behind latents. Raises UserError where they
    are not the store's, or the encoder's tokens are not as many as those of a model of this `patch_size`.
    """
    for flag, value in (("--patch-size", patch_size), ("--batch-size", batch_size), ("--shard-rows", shard_rows)):
        if value < 1:
            raise UserError(f"{flag} is {value}, expected at least 1")
    for flag, given in (("--size", size), ("--image-size", image_size)):
        if given is not None and given < 1:
            raise UserError(f"{flag} is {given}, expected at least 1")
    rank, world, local = ranks()
    source = open_source(DataConfig(path=store))
    pixels, side = source.manifest.kind == "pixels", source.manifest.shape[1]
    if pixels == (images is not None):
        has, want = ("images itself", "no --images") if pixels else ("latents", "--images, the folder of their images")
        raise UserError(f"{store} has {has}, expected {want}")
    if pixels and source.manifest.shape[0] not in (1, 3):
        raise UserError(f"{store}: images of {source.manifest.shape[0]} channels, expected 1 or 3")
    if side % patch_size:
        raise UserError(f"--patch-size is {patch_size}, expected a divisor of the data's side {side}")
    found = None if images is None else Images(str(images), source, "--images")
    place = pick_device(device, local)
    model = Encoder(encoder, side // patch_size, place, precision == "bf16", size, "--encoder")
    tokens = Tokens(source, found, model, batch_size, image_size or 8 * side, dtype)
    identity = (
        f"{model.fingerprint()} {precision} {batch_size} {tokens.image_size} {place.type} of {_content(source, found)}"
    )
    build(tokens, out, shard_rows, rank, world, identity=identity)


def _content(source: Store, images: Images | None) -> str:
    """What is encoded, so that a build that was killed does not go on with other images."""
    manifest = source.path / "manifest.json"
    text = f"{source.path.resolve()} {manifest.read_text() if manifest.is_file() else ''}"
    if images is not None:
        text += "\n".join([f" {images.folder.resolve()}", *images.paths])
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
            flips=m.flips,
        )  # fmt: skip

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        ids = np.arange(start, stop)
        x = self._encoded(ids, mirrored=False)
        flip = self._encoded(ids, mirrored=True) if self.header.flips else None
        return Block(x, self.source.labels[ids], flip=flip)

    def _encoded(self, ids: Ids, mirrored: bool) -> np.ndarray:
        parts = []
        for first in range(0, len(ids), self.batch_size):
            some = ids[first : first + self.batch_size]
            images = self._pixels(some, mirrored).to(self.encoder.device)
            tokens = self.encoder(images).transpose(1, 2).unflatten(2, (self.encoder.grid, self.encoder.grid))
            parts.append(tokens.to(getattr(torch, self.dtype)).cpu().numpy())
        return np.concatenate(parts)

    def _pixels(self, ids: Ids, mirrored: bool) -> Tensor:
        """Images `(B, C, H, W)` uint8."""
        if self.images is None:
            flips = np.full(len(ids), mirrored) if self.source.manifest.flips else None
            return torch.from_numpy(self.source.read(ids, flips).x)
        pairs = zip(ids.tolist(), self.images.read(ids), strict=True)
        cut = [center_crop(open_image(self.images.path(i), data), self.image_size) for i, data in pairs]
        found = torch.from_numpy(np.stack(cut))
        return found.flip(-1) if mirrored else found
