"""From latents to images through a decoder of diffusers: `AutoencoderKL`, `AutoencoderDC` or `AutoencoderTiny`."""

import numpy as np
import torch
from torch import Tensor

from lsep.data.encode import load_vae
from lsep.data.latents import in_model_units, is_tiny, require_decoder
from lsep.data.manifest import Manifest
from lsep.sample import Rounding, latents, to_uint8

UNIT = 8
"""Latents decoded at once, always as many, so that an image does not depend on how many there are."""


class Decoder:
    """The decoder of `vae`, a folder or a hub id, for latents as the model sees them."""

    def __init__(
        self, vae: str, manifest: Manifest, rounding: Rounding, device: torch.device, whose: str = "the run's"
    ) -> None:
        """Raises UserError where the VAE cannot be had or other latents than it decodes are here."""
        self.vae = load_vae(vae, decodes=True).float().to(device).eval().requires_grad_(False)
        self.manifest, self.rounding = manifest, rounding
        require_decoder(self.vae, vae, manifest, whose)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> np.ndarray:
        """uint8 images `(N, H, W, 3)` of the model's samples `(N, C, h, w)`."""
        return self.decode(latents(x, self.manifest))

    @torch.no_grad()
    def decode(self, z: Tensor) -> np.ndarray:
        """As above of latents as the VAE encodes them."""
        x = in_model_units(z, self.manifest) if is_tiny(self.vae) else z
        filled = torch.cat([x, x[:1].expand(-len(x) % UNIT, -1, -1, -1)])
        images = [to_uint8(self.vae.decode(part).sample, self.rounding) for part in filled.split(UNIT)]
        return np.concatenate(images)[: len(x)]
