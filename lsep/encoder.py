"""A frozen vision transformer by its transformers id or folder: from images to the tokens of its patches.

DINOv2 with or without registers, ViT, CLIP's and SigLIP's image half, and others of transformers that have one token a
patch, behind any number of others.
"""

import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsep.data.manifest import Origin
from lsep.errors import UserError, told

INSTALL = 'pip install -e ".[align]"'
_POOLER = "pooler"  # nothing here uses it
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Encoder:
    """Tokens of a grid's side for images of any size."""

    def __init__(
        self, name: str, grid: int, device: torch.device, bf16: bool = False, flag: str = "--align.encoder"
    ) -> None:
        """name: a folder or hub id; grid: tokens a side, and so the patches of its input.

        bf16: matrix products under autocast. Raises UserError, naming `flag`, where it cannot be had or does not give a
        token for each patch.
        """
        self.model, (mean, std) = load(name, flag)
        self.grid, self.device, self.bf16 = grid, device, bf16
        patch: Any = getattr(self.model.config, "patch_size", None)
        if not isinstance(patch, int):
            kind = type(self.model).__name__
            raise UserError(f"{flag} {name}: a {kind} without a patch size, expected a vision transformer")
        self.size = grid * patch
        self.origin = Origin(name, self.size, _fingerprint(self.model, self.size, mean, std))
        _resample_positions(self.model, grid)
        self.model.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.options = _options(self.model, grid, device, f"{flag} {name}")
        self.width = self._try(f"{flag} {name}")

    def _try(self, where: str) -> int:
        """Width of the tokens; raises UserError where it does not give one a patch, the same each time."""
        gray = torch.full((1, 3, self.size, self.size), 128, dtype=torch.uint8, device=self.device)
        try:
            with torch.no_grad():
                found, again = self._tokens(gray), self._tokens(gray)
        except Exception as error:  # any kind: a model's own checks have no common base
            raise UserError(f"{where}: does not take images of {self.size} pixels ({told(error)})") from None
        if not isinstance(found, Tensor) or found.ndim != 3:
            shape = tuple(found.shape) if isinstance(found, Tensor) else found
            raise UserError(f"{where}: gives {shape}, expected (images, tokens, width)")
        if found.shape[1] < self.grid**2:
            raise UserError(f"{where}: gives {found.shape[1]} tokens of {self.grid**2} patches, expected one a patch")
        if not torch.isfinite(found).all():
            raise UserError(f"{where}: gives values that are not finite, expected numbers")
        if found.shape != again.shape or not (found - again).norm() <= 1e-3 * found.norm():
            raise UserError(f"{where}: gives other tokens each time for the same image, expected the same")
        return found.shape[2]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Of images `(B, C, H, W)` uint8, one channel or three, the tokens `(B, grid^2, width)`, row by row."""
        return self._tokens(images)[:, -(self.grid**2) :]

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).to(torch.float32) / 255
        # Resized as in REPA: bicubic, without antialiasing, after the normalisation.
        x = F.interpolate((x - self.mean) / self.std, (self.size, self.size), mode="bicubic")
        options = {k: v.expand(len(x), -1) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(pixel_values=x, **options).last_hidden_state


def _fingerprint(model: nn.Module, size: int, mean: Any, std: Any) -> str:
    """sha256 of the weights, and of what else decides over the tokens, which says more than the path.

    Without names, which versions of transformers change, and without a pooler, which is random where a file has none.
    """
    decide = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    settings = [getattr(model.config, name, None) for name in decide]
    weights = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and _POOLER not in name:
            digest = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().float().numpy())
            weights.append(digest.hexdigest())
    return hashlib.sha256(f"{settings} {size} {[*mean, *std]} {sorted(weights)}".encode()).hexdigest()


def _options(model: nn.Module, grid: int, device: torch.device, where: str) -> dict[str, Any]:
    """What its forward is given besides the images, so that its last tokens are the patches row by row."""
    config: Any = model.config
    if getattr(config, "num_detection_tokens", None):
        raise UserError(
            f"{where}: a {type(model).__name__}, whose last tokens are for detections, expected an encoder of images"
        )
    given = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in given:
        options["interpolate_pos_encoding"] = True
    if "noise" in given:  # a masked autoencoder: none masked, and none moved by the sorting of this noise
        config.mask_ratio = 0.0
        options["noise"] = torch.arange(grid**2, dtype=torch.float32, device=device)[None]
    return options


def _resample_positions(model: nn.Module, grid: int) -> None:
    """Bring learned positions to a grid of this side as REPA does, by an antialiased bicubic filter.

    transformers would do it without antialiasing, and again in every forward; where it stores positions in another way
    than `(1, others + side^2, width)`, it still does.
    """
    embeddings = getattr(model, "embeddings", None)
    found = getattr(embeddings, "position_embeddings", None)
    if not isinstance(embeddings, nn.Module) or not isinstance(found, nn.Parameter) or found.ndim != 3:
        return
    side = math.isqrt(found.shape[1])
    others, places = found.detach().split([found.shape[1] - side**2, side**2], dim=1)
    if side == grid:
        return
    square = places.transpose(1, 2).unflatten(2, (side, side))
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True)
    new = torch.cat([others, square.flatten(2).transpose(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(new, requires_grad=False)


def load(name: str, flag: str) -> tuple[nn.Module, tuple[Any, Any]]:
    """The image encoder in eval mode without gradients, and mean and deviation of the pixels it expects."""
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(f"{flag} needs transformers, which cannot be imported ({error}): {INSTALL}") from None
    where = Path(name).expanduser()
    if not where.exists() and (where.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"{flag} {name}: no such folder, expected one with a model's config.json, or a hub id")
    place = str(where) if where.exists() else name
    try:
        model, report = AutoModel.from_pretrained(place, output_loading_info=True, use_safetensors=True)
    except Exception as error:  # any kind: what transformers, safetensors and the hub's client raise has no common base
        raise UserError(
            f"{flag} {name}: cannot be loaded, expected a folder or hub id of a vision transformer that this "
            f"transformers reads, in safetensors; found {told(error)}"
        ) from None
    missing = [m for m in report["missing_keys"] if _POOLER not in m]
    if missing:  # transformers only warns and leaves random numbers there
        raise UserError(f"{flag} {name}: {len(missing)} weights are missing, such as {sorted(missing)[0]!r}")
    model = getattr(model, "vision_model", model)
    given = getattr(model, "main_input_name", "pixel_values")  # transformers 4 has none of a tower by itself
    if given != "pixel_values":
        raise UserError(f"{flag} {name}: a model of {given}, expected one of images")
    # transformers 5 keeps a file's half precision; what is to run in bf16 does so under autocast.
    return model.float().eval().requires_grad_(False), _normalisation(place, f"{flag} {name}", model.config.model_type)


def _normalisation(place: str, where: str, kind: str) -> tuple[Any, Any]:
    """Mean and deviation that its preprocessor's file says; for DINO without one, ImageNet's."""
    from transformers.utils import cached_file

    file = None
    for name in ("preprocessor_config.json", "processor_config.json"):  # of a processor saved whole, by transformers 5
        try:
            file = file or cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        except Exception as error:  # the hub's client; without its file, other processes could see other images
            raise UserError(f"{where}: {name} cannot be had ({told(error)})") from None
    if file is None:
        if not kind.startswith("dino"):
            raise UserError(
                f"{where}: no preprocessor_config.json, expected one with the image_mean and image_std of this {kind}"
            )
        return _IMAGENET
    try:
        values = json.loads(Path(file).read_bytes())
        values = values.get("image_processor", values)
        found = tuple([float(v) for v in values[key]] for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {file} has no image_mean and image_std ({told(error)})") from None
    if any(len(v) != 3 for v in found) or not all(v > 0 for v in found[1]):
        raise UserError(f"{where}: {file}: image_mean and image_std are {found}, expected three numbers each")
    return found[0], found[1]
