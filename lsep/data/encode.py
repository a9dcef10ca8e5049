"""Images to a store of moments: `encode` runs a diffusers `AutoencoderKL` over all that `pictures` lists.

Every rank encodes whole shards of its own and batches begin with the shard, so what a shard holds depends neither on
the number of processes nor on where an earlier run was cut. `encode.json` in the store's folder keeps the settings: a
restart that differs in one is refused instead of mixing two encodings in one store.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lsep.data import Labels, begun
from lsep.data.images import decoded, in_cuts
from lsep.data.latents import SD_SCALE, encoder_fingerprint, raw
from lsep.data.pictures import fingerprint as listing_fingerprint
from lsep.data.pictures import open_pictures, said
from lsep.data.regular import read_regular
from lsep.data.squares import OnCorrupt, Squares
from lsep.data.store import all_finite
from lsep.data.tree import JSON_LIMIT
from lsep.data.writer import Block, Header, build, replace_file
from lsep.errors import UserError, shown, told

if TYPE_CHECKING:
    import torch

SETTINGS = "encode.json"
INSTALL = "pip install diffusers"
DECODERS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
"""Classes of diffusers whose decoders take latents (C, H, W) to images."""
_WEIGHTS = "diffusion_pytorch_model"


def encode(
    images: Path,
    out: Path,
    vae: str,
    size: int = 256,
    flips: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 16,
    shard_rows: int = 4096,
    device: str = "auto",
    dtype: Literal["float16", "float32"] = "float16",
    labels: Labels = "auto",
    on_corrupt: OnCorrupt = "error",
) -> None:
    """Encode images at `size` x `size` pixels into the store `out` of rows (2C, H, W): mean, then std.

    `images` and `labels` are those of `open_pictures`. `on_corrupt`: whether an image that cannot be read ends it or is
    left out; a run that ended so may go on with skip. `vae` is a folder or a hub id. With `flips` each row has a second
    variant, the encoding of the mirrored image. Under torchrun every process takes every WORLD_SIZE-th shard on its own
    GPU. A killed run, started again with the same arguments, continues after its last whole shard.
    """
    for flag, value in (("--size", size), ("--batch-size", batch_size), ("--shard-rows", shard_rows)):
        if value < 1:
            raise UserError(f"{flag} is {value}, expected at least 1")
    rank, world, local = ranks()
    pictures = open_pictures(Path(images), labels)
    if rank == 0:
        for line in said(Path(images), pictures.listed):
            print(line, file=sys.stderr)
    if on_corrupt == "skip":
        pictures = begun.as_begun(pictures, Path(out) / begun.LISTING)
    recipe = Recipe(size, flips, precision, batch_size, shard_rows, dtype)
    squares = Squares(pictures, size, on_corrupt)
    source = Encoder(squares, load_vae(vae), recipe, pick_device(device, local), Path(out))
    source.compare()
    build(source, Path(out), shard_rows=shard_rows, rank=rank, world=world)
    if rank == 0:
        (Path(out) / begun.LISTING).unlink(missing_ok=True)


@dataclass(frozen=True)
class Recipe:
    """What decides over a store's bytes, besides the images, the VAE and the kind of device."""

    size: int
    flips: bool
    precision: Literal["fp32", "bf16"]
    batch_size: int
    shard_rows: int
    dtype: Literal["float16", "float32"]


class Encoder:
    """Images as rows of moments, for `writer.build`."""

    def __init__(self, squares: Squares, vae: Any, recipe: Recipe, device: "torch.device", out: Path) -> None:
        import torch

        listed = squares.pictures.listed

        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if recipe.size % factor:
            raise UserError(f"--size is {recipe.size}, expected a multiple of {factor}, by which the VAE downsamples")
        channels = int(vae.config.latent_channels)
        scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
        self.header = Header(
            kind="moments",
            shape=(channels, recipe.size // factor, recipe.size // factor),
            dtype=recipe.dtype,
            num_classes=listed.num_classes,
            class_names=listed.class_names,
            labelled=listed.labelled,
            scale=SD_SCALE if scale is None else float(scale),
            shift=0.0 if shift is None else float(shift),
            flips=recipe.flips,
            latents=raw(channels, SD_SCALE if scale is None else float(scale), encoder_fingerprint(vae)),
        )
        self.rows = len(listed.labels)
        self._squares, self._recipe, self._device, self._out = squares, recipe, device, out
        self._settings = {
            **asdict(recipe), "images": listing_fingerprint(squares.pictures), "vae": fingerprint(vae),
            "device": device.type,
        }  # fmt: skip
        self._dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self._vae = vae.to(device=device, dtype=self._dtype).eval().requires_grad_(False)
        if device.type == "cuda":
            self._vae.to(memory_format=torch.channels_last)

    def read(self, start: int, stop: int) -> Block:
        """Images [start, stop) of the sorted list, encoded in batches counted from `start`."""
        import torch

        if not (self._out / SETTINGS).exists():  # here, once `build` has taken the folder
            _write(self._out / begun.LISTING, "".join(f"{line}\n" for line in begun.lines(self._squares.pictures)))
            _write(self._out / SETTINGS, json.dumps(self._settings, indent=2) + "\n")
        x = np.empty((stop - start, *self.header.row_shape), self.header.dtype)
        flip = np.empty_like(x) if self.header.flips else None
        at = 0
        # TF32 would make "fp32" a lie; a benchmarked or non-deterministic kernel would make bytes differ between runs.
        exact = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
        )
        with torch.inference_mode(), exact:
            for pixels in decoded(self._squares, in_cuts(start, stop, self._recipe.batch_size)):
                batch = torch.from_numpy(pixels).to(self._device)
                rows = slice(at, at + len(batch))
                x[rows] = self._moments(batch)
                if flip is not None:
                    flip[rows] = self._moments(batch.flip(-1))
                at += len(batch)
        self._require_finite(x, flip, start)
        return self._squares.block(start, stop, x, flip)

    def compare(self) -> None:
        """Raise UserError where an earlier run has begun this folder with other settings or images."""
        path = self._out / SETTINGS
        if not path.exists():
            return
        try:
            found = json.loads(read_regular(path, JSON_LIMIT))
            differing = [k for k in self._settings if found.get(k) != self._settings[k]]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: cannot be read as JSON settings ({told(error)}), expected those of encode"
            ) from None
        if not differing:
            return
        key = differing[0]
        if key == "images":
            changed = begun.changed(self._out / begun.LISTING, self._squares.pictures)
            raise UserError(
                f"{path}: this folder was begun with other images{changed}: expected the same ones, or "
                "--on-corrupt skip to go on without those that are gone or cannot be read, or another OUT"
            )
        raise UserError(
            f"{path}: this folder was begun with {key} {found.get(key)!r}, now it is {self._settings[key]!r}: "
            "expected the same settings, or another OUT"
        )

    def _require_finite(self, x: np.ndarray, flip: np.ndarray | None, start: int) -> None:
        for part in (x, flip):
            if part is None or all_finite(part):
                continue
            row = start + next(i for i in range(len(part)) if not all_finite(part[i]))
            wanted = "--dtype float32" if self.header.dtype == "float16" else "a VAE that gives finite numbers"
            raise UserError(
                f"{self._squares.pictures.where(row)}: its moments are not finite in {self.header.dtype}, expected "
                f"{wanted}"
            )

    def _moments(self, pixels: "torch.Tensor") -> np.ndarray:
        """Mean and std `(B, 2C, H, W)` of the posterior of uint8 `pixels` `(B, 3, size, size)`."""
        import torch

        batch = (pixels.float() / 127.5 - 1).to(self._dtype)
        if self._device.type == "cuda":
            batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = self._vae.encode(batch).latent_dist
        std = torch.exp(0.5 * posterior.logvar.float())  # not posterior.std: under bf16 that is rounded once more
        # Overflow of float16 becomes infinite here, which `read` refuses.
        return torch.cat([posterior.mean.float(), std], dim=1).to(getattr(torch, self.header.dtype)).cpu().numpy()


def ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; (0, 1, 0) without it."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{name} is {text!r} in the environment, expected a number as torchrun sets it")
        values.append(int(text))
    rank, world, local = values
    if not rank < world:
        raise UserError(f"RANK is {rank} in the environment, expected from 0 to WORLD_SIZE - 1, which is {world - 1}")
    return rank, world, local


def pick_device(wanted: str, local: int) -> "torch.device":
    """The device behind `--device`: `auto` and `cuda` mean the GPU of this process's LOCAL_RANK."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"--device is {wanted!r}, expected 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda":
        index = local if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {wanted}: GPU {index} was asked for, {torch.cuda.device_count()} found")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def load_vae(vae: str, decodes: bool = False) -> Any:
    """The `AutoencoderKL` at a folder or hub id; that of a whole pipeline is found in its subfolder `vae`.

    decodes: any of `DECODERS`, with or without statistics of its channels: what decodes takes latents as encoded.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"--vae needs diffusers, which cannot be imported ({error}): {INSTALL}") from None
    where = Path(vae).expanduser()
    local = where.exists()
    if not local and (where.is_absolute() or vae.startswith((".", "~"))):
        raise UserError(f"--vae {vae}: no such folder, expected one with an AutoencoderKL's config.json, or a hub id")
    place = str(where) if local else vae
    subfolder = "vae" if local and (where / "vae" / "config.json").is_file() else None
    try:
        # accelerate is not needed: low_cpu_mem_usage only saves a second copy of 0.3 GB
        kind = _class_of(place, subfolder, vae) if decodes else AutoencoderKL
        folder = where / (subfolder or "")
        halves = local and not any(folder.glob(f"{_WEIGHTS}.[sb]*")) and any(folder.glob(f"{_WEIGHTS}.fp16.*"))
        model, report = kind.from_pretrained(
            place, subfolder=subfolder, low_cpu_mem_usage=False, output_loading_info=True,
            variant="fp16" if halves else None,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # any kind: what diffusers, safetensors and the hub's client raise has no common base
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--vae {vae}: cannot be loaded, expected a folder or hub id of an AutoencoderKL that this diffusers reads "
            f"(newest: {INSTALL} -U); found {type(error).__name__}: {reason}"
        ) from None
    missing = [*report["missing_keys"], *report["mismatched_keys"]]
    if missing:  # diffusers only warns and leaves random numbers there
        raise UserError(f"--vae {vae}: {len(missing)} weights are missing or of another shape, such as {missing[0]!r}")
    if decodes:
        return model
    if model.config.get("latents_mean") is not None or model.config.get("latents_std") is not None:
        raise UserError(
            f"--vae {vae}: its config.json scales each channel by latents_mean and latents_std, "
            "expected one scaling_factor and shift_factor"
        )
    return model


def _class_of(place: str, subfolder: str | None, vae: str) -> Any:
    """The diffusers class that the config.json of a decoder names."""
    import diffusers

    name = diffusers.AutoencoderKL.load_config(place, subfolder=subfolder).get("_class_name", DECODERS[0])
    if name not in DECODERS:
        raise UserError(f"--vae {vae}: its config.json says {shown(name)}, expected {', '.join(DECODERS)}")
    return getattr(diffusers, name)


def fingerprint(vae: Any) -> str:
    """sha256 of the VAE's weights and configuration, which says more than the path it was loaded from."""
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Every process may write: all write the same."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
