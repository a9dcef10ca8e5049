"""What a model's tokens are aligned with (`lsep.align`): an encoder on the batch's images, or a store of its tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch

from lsep.config import Config
from lsep.data.loader import INSTALL, has_dali
from lsep.data.paired import Images, open_features
from lsep.data.store import Store
from lsep.encoder import Encoder
from lsep.errors import UserError


@dataclass(frozen=True)
class Teacher:
    """Where the tokens come from that the model's are aligned with: nowhere, a store, or an encoder of images."""

    features: Store | None = None
    encoder: Encoder | None = None
    images: Images | None = None
    """Of latents; None where the data itself is images."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Width and number of the tokens, if any."""
        if self.features is not None:
            width, height, side = self.features.manifest.shape
            return width, height * side
        return None if self.encoder is None else (self.encoder.width, self.encoder.grid**2)

    @cached_property
    def identity(self) -> dict[str, str]:
        """sha256 of what decides over the tokens, wherever it lies: a run goes on with no others."""
        found = {}
        if self.features is not None:
            found["features"] = self.features.fingerprint()
        if self.encoder is not None:
            found["encoder"] = self.encoder.origin.sha256
        if self.images is not None:
            found["images"] = self.images.fingerprint()
        return found


def open_teacher(config: Config, source: Store, device: torch.device) -> Teacher:
    """What `config`, resolved but for the width, aligns with; raises UserError where it does not fit the data."""
    align, pixels = config.align, source.manifest.kind == "pixels"
    if align.features is not None:
        return Teacher(features=open_features(align.features, source))
    if align.encoder is None:
        return Teacher()
    if pixels == (align.images is not None):
        has, want = ("images itself", "no --align.images") if pixels else ("latents", "--align.images, their images")
        raise UserError(f"--align.encoder: {source.manifest.source} has {has}, expected {want}")
    if pixels and source.manifest.shape[0] not in (1, 3):
        raise UserError(f"--align.encoder: images of {source.manifest.shape[0]} channels, expected 1 or 3")
    images = None if align.images is None else Images(align.images, source)
    if images is not None and not has_dali():
        raise UserError(f"--align.images needs NVIDIA DALI, which is not installed: {INSTALL}")
    bf16 = config.train.precision == "bf16"
    return Teacher(encoder=Encoder(align.encoder, config.grid, device, bf16), images=images)
