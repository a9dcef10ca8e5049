"""How a store's latents came from those of their VAE, and the way back.

    VAE's latent z  ->  stored (z - mean) / std * factor, by channel  ->  the model's input (stored - shift) * scale

Everything that leaves (decoded images, previews, `arr_0`, what is evaluated) is z, and all ways out go through here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsep.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from torch import Tensor

    from lsep.data.manifest import Manifest

SD_SCALE = 0.18215
"""scaling_factor of Stable Diffusion's first VAEs (sd-vae-ft-mse, -ft-ema), whose latents the published sets hold."""


@dataclass(frozen=True)
class Latents:
    """Which VAE's latents a store holds, and what was done to each channel of them before they were stored."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float = 1.0
    """stored = (z - mean) / std * factor."""
    scaling_factor: float | None = None
    """Of the VAE's config.json, where it is known: the decoder of a VAE with another one is refused."""
    encoder_sha256: str | None = None
    """Of the VAE's encoder, where it is known (`encode`): fine-tuned decoders share it."""

    @property
    def changed(self) -> bool:
        """Whether stored latents are others than the VAE's."""
        return self.factor != 1 or any(self.mean) or any(s != 1 for s in self.std)


def raw(channels: int, scaling_factor: float | None = None, encoder_sha256: str | None = None) -> Latents:
    """Latents that are stored as the VAE encodes them."""
    return Latents((0.0,) * channels, (1.0,) * channels, 1.0, scaling_factor, encoder_sha256)


def parse(value: Any, channels: int, where: str) -> Latents | None:
    """From a manifest's JSON; None where it does not say (earlier versions). `where` names the place in errors."""
    if value is None:
        return None
    names = {"mean", "std", "factor", "scaling_factor", "encoder_sha256"}
    if not isinstance(value, dict) or value.keys() != names:
        raise UserError(
            f"{where}: latents is {shown(value)}, expected null or an object with {', '.join(sorted(names))}"
        )
    for name in ("mean", "std"):
        numbers = value[name]
        if not isinstance(numbers, list) or len(numbers) != channels or not all(map(_number, numbers)):
            raise UserError(f"{where}: latents' {name} is {shown(numbers)}, expected {channels} finite numbers")
    if not all(s > 0 for s in value["std"]):
        raise UserError(f"{where}: latents' std is {shown(value['std'])}, expected numbers above 0")
    for name in ("factor", "scaling_factor"):
        if not ((_number(value[name]) and value[name] > 0) or (name == "scaling_factor" and value[name] is None)):
            raise UserError(f"{where}: latents' {name} is {shown(value[name])}, expected a number above 0")
    sha256 = value["encoder_sha256"]
    if sha256 is not None and not (isinstance(sha256, str) and one_line(sha256)):
        raise UserError(f"{where}: latents' encoder_sha256 is {shown(sha256)}, expected null or hexadecimal digits")
    known = None if value["scaling_factor"] is None else float(value["scaling_factor"])
    mean, std = (tuple(map(float, value[name])) for name in ("mean", "std"))
    return Latents(mean, std, float(value["factor"]), known, sha256)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def of_vae(stored: "Tensor", manifest: "Manifest") -> "Tensor":
    """The VAE's latents z `(N, C, H, W)` of stored ones, see the module; pixels stay as they are."""
    way = manifest.latents
    if way is None or not way.changed:
        return stored
    mean, std = _by_channel(stored, way)
    return stored / way.factor * std + mean


def as_stored(z: "Tensor", manifest: "Manifest") -> "Tensor":
    """The inverse of `of_vae`."""
    way = manifest.latents
    if way is None or not way.changed:
        return z
    mean, std = _by_channel(z, way)
    return (z - mean) / std * way.factor


def in_units(z: "Tensor", manifest: "Manifest") -> "Tensor | None":
    """The VAE's latents `(N, C, H, W)` at about unit scale for a preview, the same however they were stored.

    None where the VAE's own scale is not known, or nothing was changed: then the model's input serves.
    """
    way = manifest.latents
    return None if way is None or way.scaling_factor is None or not way.changed else z * way.scaling_factor


def deviation_of_vae(stored: "Tensor", manifest: "Manifest") -> "Tensor":
    """As `of_vae` for standard deviations `(N, C, H, W)`, which no mean moves."""
    way = manifest.latents
    return stored if way is None or not way.changed else stored / way.factor * _by_channel(stored, way)[1]


def _by_channel(x: "Tensor", way: Latents) -> "tuple[Tensor, Tensor]":
    import torch

    if x.shape[1] != len(way.mean):
        raise ValueError(f"{x.shape[1]} channels, the manifest has statistics of {len(way.mean)}")
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (way.mean, way.std))
    return mean, std


def is_tiny(vae: Any) -> bool:
    """Whether `vae` (TAESD) stands in for the VAE of a diffusion model: it decodes latents in that model's units."""
    return type(vae).__name__ == "AutoencoderTiny"


def in_model_units(z: "Tensor", manifest: "Manifest") -> "Tensor":
    """The VAE's latents `(N, C, H, W)` in the units of the diffusion models that come with it."""
    way = manifest.latents
    if way is None or not way.changed:
        return (z - manifest.shift) * manifest.scale
    assert way.scaling_factor is not None, "see require_decoder"
    return z * way.scaling_factor


def require_decoder(vae: Any, name: str, manifest: "Manifest", whose: str = "the run's") -> None:
    """Raise UserError where the VAE `name` cannot decode the latents of `manifest`, or nobody can tell.

    whose: `manifest`, in messages.
    """
    source, way = manifest.source, manifest.latents
    channels = int(vae.config.latent_channels)
    if channels != manifest.shape[0]:
        raise UserError(f"--vae {name}: its latents have {channels} channels, expected {whose} {manifest.shape[0]}")
    if way is None and (manifest.scale, manifest.shift) == (1, 0):
        raise UserError(
            f"--vae {name}: the description of {source}, an earlier version's or imported, does not say how its "
            "latents of scale 1 were normalised: expected 'latents' in it; pack the data again, and for a run that is "
            "there already copy the new manifest's 'latents' to 'manifest' in its config.json"
        )
    if is_tiny(vae):  # its own scaling_factor is 1, and its encoder another one
        if way is not None and way.changed and way.scaling_factor is None:
            raise UserError(
                f"--vae {name}: an AutoencoderTiny takes latents in a diffusion model's units, and {source} does not "
                "say its VAE's scaling_factor: expected an AutoencoderKL, or 'scaling_factor' in its 'latents'"
            )
        return
    own = vae.config.get("scaling_factor")
    known = way.scaling_factor if way is not None else SD_SCALE if manifest.scale == SD_SCALE else None
    if own is not None and known is not None and abs(float(own) - known) > 1e-3 * known:
        raise UserError(
            f"--vae {name}: its scaling_factor is {float(own):g}, expected the decoder of a VAE with {known:g}, whose "
            f"latents {source} holds"
        )
    if way is not None and way.encoder_sha256 is not None and encoder_fingerprint(vae) != way.encoder_sha256:
        raise UserError(
            f"--vae {name}: its encoder is not the one that encoded {source}, expected that VAE, or one that differs "
            "in its decoder only"
        )


def encoder_fingerprint(vae: Any) -> str:
    """sha256 of what makes the latents: the encoder's weights, rounded to float16, in which VAEs are published too."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()
