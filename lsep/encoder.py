"""A frozen vision transformer by its transformers id or folder: from images to the tokens of its patches.

DINOv2 with or without registers, ViT, CLIP's and SigLIP's image half, and others of transformers that have one token a
patch, behind any number of others.
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsep.errors import UserError, told

INSTALL = 'pip install -e ".[align]"'
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Encoder:
    """Tokens of a grid's side for images of any size."""

    def __init__(
        self,
        name: str,
        grid: int,
        device: torch.device,
        bf16: bool = False,
        size: int | None = None,
        flag: str = "--align.encoder",
    ) -> None:
        """name: a folder or hub id; grid: tokens a side; size: of the encoder's input, None for one patch a token.

        bf16: matrix products under autocast. Raises UserError, naming `flag`, where it cannot be had or gives another
        number of tokens.
        """
        self.model, (mean, std) = load(name, flag)
        self.grid, self.device, self.bf16 = grid, device, bf16
        patch: Any = getattr(self.model.config, "patch_size", None)
        if not isinstance(patch, int):
            kind = type(self.model).__name__
            raise UserError(f"{flag} {name}: a {kind} without a patch size, expected a vision transformer")
        self.size = size or grid * patch
        self.model.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        given = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in given else {}
        try:
            found = self._tokens(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=device))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{flag} {name}: does not take images of {self.size} pixels ({told(error)})") from None
        if found.ndim != 3:
            raise UserError(f"{flag} {name}: gives {tuple(found.shape)}, expected (images, tokens, width)")
        self.width, more = found.shape[2], found.shape[1] - grid**2
        if self.size != grid * patch or more < 0:
            raise UserError(
                f"{flag} {name}: {(self.size // patch) ** 2} patches of {patch} pixels of an input of {self.size}, "
                f"expected {grid**2}, one a token of the model: give it {grid * patch} pixels"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Of images `(B, C, H, W)` uint8, one channel or three, the tokens `(B, grid^2, width)`, row by row."""
        return self._tokens(images)[:, -(self.grid**2) :]

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).to(torch.float32) / 255
        # Resized as in REPA: bicubic, without antialiasing, after the normalisation.
        x = F.interpolate((x - self.mean) / self.std, (self.size, self.size), mode="bicubic")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(pixel_values=x, **self.options).last_hidden_state

    def fingerprint(self) -> str:
        """sha256 of the weights and what the images go through, which says more than the path."""
        digest = hashlib.sha256(f"{self.size} {self.mean.tolist()} {self.std.tolist()}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()


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
    missing = [m for m in report["missing_keys"] if "pooler" not in m]  # which nothing here uses
    if missing:  # transformers only warns and leaves random numbers there
        raise UserError(f"{flag} {name}: {len(missing)} weights are missing, such as {sorted(missing)[0]!r}")
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise UserError(f"{flag} {name}: a model of {model.main_input_name}, expected one of images")
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
