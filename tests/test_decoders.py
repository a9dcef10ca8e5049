"""`--vae` by the class its config.json names, whole or in halves, and the presets for latents of 16 x 16 x 32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MANIFEST

from lsep.checks import resolve
from lsep.config import Config
from lsep.data.encode import load_vae
from lsep.data.latents import Latents
from lsep.data.manifest import Manifest
from lsep.decode import Decoder
from lsep.errors import UserError
from lsep.presets import preset
from lsep.sample import to_uint8

CPU = torch.device("cpu")
FLOW = Manifest("test", "samples", (3, 8, 8), rows=1000, num_classes=5, probe_classes=5, scale=0.5, shift=0.1)
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": (8, 8), "latent_channels": 3, "norm_num_groups": 4, "layers_per_block": 1,
    },
    "AutoencoderDC": {
        "latent_channels": 3, "attention_head_dim": 4, "encoder_block_out_channels": (12, 12),
        "decoder_block_out_channels": (12, 12), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()), "scaling_factor": 0.4,
    },
    "AutoencoderTiny": {
        "latent_channels": 3, "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    },
}  # fmt: skip


def saved(name: str, folder: Path, **how: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**SMALL[name]).eval()
    vae.save_pretrained(folder, **how)
    return vae


@pytest.mark.parametrize("name", list(SMALL))
def test_each_class_decodes_in_its_own_units(name: str, tmp_path: Path) -> None:
    """x = (z - shift) scale: an encoder's z for most, and x for a tiny one, which stands in a diffusion pipeline."""
    vae = saved(name, tmp_path / "vae")
    x = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = Decoder(str(tmp_path / "vae"), FLOW, "nearest", CPU)(x)
    with torch.no_grad():
        truth = vae.decode(x if name == "AutoencoderTiny" else x / 0.5 + 0.1).sample
    side = 16 if name != "AutoencoderTiny" else truth.shape[-1]
    assert images.shape == (11, side, side, 3) and np.ptp(images) > 0
    assert np.abs(images.astype(int) - to_uint8(truth).astype(int)).max() <= 1


def test_a_tiny_one_takes_normalised_latents_in_the_model_s_units(tmp_path: Path) -> None:
    """z = stored std / factor + mean, of which a diffusion model's units are z scaling_factor."""
    vae = saved("AutoencoderTiny", tmp_path / "vae")
    way = Latents((0.1, 0.2, 0.3), (2.0, 3.0, 4.0), 0.5, scaling_factor=0.7)
    manifest = replace(MANIFEST, latents=way)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in (way.mean, way.std))
    images = Decoder(str(tmp_path / "vae"), manifest, "nearest", CPU)(x)
    with torch.no_grad():
        truth = vae.decode((x / 0.5 * std + mean) * 0.7).sample
    assert np.abs(images.astype(int) - to_uint8(truth).astype(int)).max() <= 1
    unknown = replace(manifest, latents=replace(way, scaling_factor=None))
    with pytest.raises(UserError, match="does not say its VAE's scaling_factor"):
        Decoder(str(tmp_path / "vae"), unknown, "nearest", CPU)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_variant_of_halves_decodes_in_float32(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "vae", variant="fp16")
    decoder = Decoder(str(tmp_path / "vae"), FLOW, "nearest", CPU)
    assert {p.dtype for p in decoder.vae.parameters()} == {torch.float32}
    assert decoder(torch.zeros(1, 3, 8, 8)).dtype == np.uint8


def test_statistics_of_channels_are_no_obstacle_to_decoding(tmp_path: Path) -> None:
    """A decoder takes latents as encoded, whatever its config.json scales them by for training; encoding is refused."""
    saved("AutoencoderKL", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": [0.1] * 3, "latents_std": [2.0] * 3}))
    Decoder(str(tmp_path / "vae"), FLOW, "nearest", CPU)
    with pytest.raises(UserError, match="scales each channel by latents_mean and latents_std"):
        load_vae(str(tmp_path / "vae"))


def test_another_class_is_named(tmp_path: Path) -> None:
    saved("AutoencoderKL", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(
        UserError, match="config.json says 'AutoencoderOobleck', expected AutoencoderKL, AutoencoderDC,"
    ):
        Decoder(str(tmp_path / "vae"), FLOW, "nearest", CPU)
    with pytest.raises(UserError, match="cannot be loaded, expected a folder"):
        (tmp_path / "empty").mkdir()
        Decoder(str(tmp_path / "empty"), FLOW, "nearest", CPU)


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_presets_for_deep_latents(size: str) -> None:
    """As many tokens, and a window of as many, as patch 2 has on 32 x 32 x 4; other latents are refused."""
    manifest = Manifest("vavae", "samples", (32, 16, 16), rows=1000, num_classes=1000, probe_classes=1000)
    config, like = resolve(preset(f"sit-{size}-1-f16d32"), manifest), preset(f"sit-{size}-2-256")
    assert config.grid == 16 and config.probe.window_min == like.probe.window_min
    assert config.model.hidden_size == like.model.hidden_size and isinstance(config, Config)
    with pytest.raises(UserError, match="--model.input-size is 16, but the data at test has 8"):
        resolve(preset(f"sit-{size}-1-f16d32"), MANIFEST)
