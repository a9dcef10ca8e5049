"""From latents to images through a decoder of diffusers: `AutoencoderKL`, `AutoencoderDC` or `AutoencoderTiny`."""

import numpy as np
import torch
from torch import Tensor

from lsep.data.encode import load_vae
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.sample import Rounding, latents, to_uint8

UNIT = 8
"""Latents decoded at once, always as many, so that an image does not depend on how many there are."""


class Decoder:
    """The decoder of `vae`, a folder or a hub id, for latents as the model sees them."""

    def __init__(self, vae: str, manifest: Manifest, rounding: Rounding, device: torch.device) -> None:
        """Raises UserError where the VAE cannot be had or has other latents."""
        self.vae = load_vae(vae, decodes=True).float().to(device).eval().requires_grad_(False)
        # A tiny one (TAESD) stands in for the VAE of a diffusion model, and takes latents in that model's units.
        self.tiny = type(self.vae).__name__ == "AutoencoderTiny"
        self.manifest, self.rounding = manifest, rounding
        channels = int(self.vae.config.latent_channels)
        if channels != manifest.shape[0]:
            raise UserError(
                f"--vae {vae}: its latents have {channels} channels, expected the run's {manifest.shape[0]}"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> np.ndarray:
        """uint8 images `(N, H, W, 3)` of latents `(N, C, h, w)`."""
        x = x if self.tiny else latents(x, self.manifest)
        filled = torch.cat([x, x[:1].expand(-len(x) % UNIT, -1, -1, -1)])
        images = [to_uint8(self.vae.decode(part).sample, self.rounding) for part in filled.split(UNIT)]
        return np.concatenate(images)[: len(x)]
