"""Where features come from: Inception, or any function that is named `module:function` or `path/to/file.py:function`.

The contract of such a function. It is called with a batch of images, a uint8 array `(N, H, W, C)`, and returns
features `(N, D)`, a tensor or an array; or a dictionary or NamedTuple of `features` and, where it has them, `spatial`
`(N, S)` for sFID and `logits` `(N, classes)` for the inception score. Values are finite. The same image gives the same
features in every batch.

* with a parameter `device` it gets the torch.device of --device;
* with a parameter `weights` it gets the path of --weights;
* with an attribute `latents = True` it is called with latents instead, float32 `(N, C, H, W)` as a VAE decodes them.

Its source file and its weights are known by their sha256, so that features of two versions are not compared.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep.errors import UserError, shown
from lsep.evaluate import Precision
from lsep.functions import load_function


class Features(NamedTuple):
    """Of N images: `features` (N, D); `spatial` (N, S) and `logits` (N, classes) where there are such."""

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Identity:
    """What makes two sets of features comparable."""

    name: str
    source_sha256: str | None
    """Of the file that defines the function; None for Inception, whose weights say it all."""
    weights_sha256: str | None

    def differs(self, other: "Identity") -> str | None:
        """The first difference as `"name 'a' and 'b'"`, or None."""
        mine, theirs = asdict(self), asdict(other)
        return next((f"{k} {shown(mine[k])} and {shown(theirs[k])}" for k in mine if mine[k] != theirs[k]), None)


@dataclass(frozen=True)
class Extractor:
    """A function from images to features, whose answers are checked."""

    identity: Identity
    precision: Precision
    device: torch.device
    call: Callable[[np.ndarray], Any]
    latents: bool = False
    """It is called with latents."""

    @property
    def inception(self) -> bool:
        """Whether figures may bear the names FID and sFID."""
        return self.identity.name == "inception"

    @torch.no_grad()
    def __call__(self, batch: np.ndarray) -> Features:
        """Features of a batch on `device`; raises UserError where the function breaks its contract."""
        given = self.call(batch)
        if isinstance(given, tuple) and hasattr(given, "_asdict"):
            given = given._asdict()
        parts = given if isinstance(given, dict) else {"features": given}
        unknown = set(parts) - set(Features._fields)
        if unknown or "features" not in parts:
            raise UserError(
                f"--features {self.identity.name}: returned {shown(sorted(map(str, parts)))}, expected 'features' and, "
                "where it has them, 'spatial' and 'logits'"
            )
        return Features(**{k: self._checked(k, v, len(batch)) for k, v in parts.items() if v is not None})

    def _checked(self, name: str, value: Any, rows: int) -> Tensor:
        where = f"--features {self.identity.name}: {name}"
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor) or value.is_complex():
            raise UserError(f"{where} is of type {type(value).__name__}, expected a tensor or an array of numbers")
        if value.ndim != 2 or len(value) != rows or not value.shape[1]:
            raise UserError(f"{where} has shape {tuple(value.shape)} for {rows} images, expected ({rows}, D)")
        value = value.detach().to(self.device, torch.float64 if self.precision == "fp64" else torch.float32)
        if not value.isfinite().all():
            raise UserError(f"{where} holds values that are not finite, expected finite ones")
        return value


def open_extractor(name: str, weights: Path | None, precision: Precision, device: torch.device) -> Extractor:
    """The extractor behind `--features`; raises UserError where it, or its weights, cannot be had."""
    if name == "inception":
        from lsep.evaluate.inception import open_inception

        return open_inception(weights, precision, device)
    function = load_function("--features", name, also="inception, ")
    place, _, function_name = name.rpartition(":")
    takes = inspect.signature(function).parameters
    given: dict[str, Any] = {"device": device} if "device" in takes else {}
    if weights is not None:
        if "weights" not in takes:
            raise UserError(f"--weights {weights}: the function {function_name!r} has no parameter `weights`")
        given["weights"] = weights
    own = inspect.unwrap(function)
    file = inspect.getsourcefile(own) if inspect.isfunction(own) else None
    identity = Identity(
        f"{Path(place).name}:{function_name}",
        sha256(Path(file)) if file else None,
        sha256(weights) if weights else None,
    )
    return Extractor(identity, precision, device, partial(function, **given), bool(getattr(function, "latents", False)))


def sha256(path: Path) -> str:
    """Of a file; raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
