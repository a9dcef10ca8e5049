"""What samples are compared with: statistics from a file, ADM's or our own, or computed from images.

Our file is an `.npz` with mu, sigma (and mu_s, sigma_s) in float64, `features` of up to 10,000 images for precision,
recall and KID, and `lsep`, JSON with the extractor's identity: statistics of one are not compared with features of
another. ADM's `VIRTUAL_*.npz` has the same names without `lsep`, and its images as `arr_0`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsep.errors import UserError, shown, told
from lsep.evaluate.archives import Archive, text, write
from lsep.evaluate.extract import extract
from lsep.evaluate.features import Extractor, Identity
from lsep.evaluate.frechet import Gaussian, frechet_distance
from lsep.evaluate.images import Images, of_archive, open_images

KEEP = 10_000
"""Features kept of a reference: as many as ADM's have images."""
FORMAT, VERSION = "lsep-reference", 1
_INCEPTION = {"mu": 2048, "mu_s": 2023}


@dataclass
class Reference:
    """Statistics of a reference set, on the extractor's device."""

    source: str
    pool: Gaussian
    count: int | None
    """Images behind the statistics; None where the file does not say it."""
    spatial: Gaussian | None = None
    features: Tensor | None = None
    precision: str | None = None
    """Of the extractor; None where the file does not say it."""
    floor: float | None = None
    """Frechet distance between two halves of the set: what no better samples of half as many images would have."""
    shape: tuple[int, ...] | None = None
    """Of an image (H, W, C), or a latent (C, H, W); None where the file does not say it."""
    notes: tuple[str, ...] = ()
    """See `Images`."""


def compute(images: Images, extractor: Extractor, batch_size: int, keep: int = KEEP) -> Reference:
    """The statistics of a set of images, in one pass."""
    found = extract(images, extractor, batch_size, keep)
    floor = None
    if min(half.count for half in found.halves) >= 2:
        first, second = (half.gaussian() for half in found.halves)
        floor = frechet_distance(first, second)
    spatial = None if found.spatial is None else found.spatial.gaussian()
    return Reference(
        images.source, found.moments.gaussian(), images.count, spatial, found.features, extractor.precision, floor,
        images.shape, images.notes,
    )  # fmt: skip


def save(reference: Reference, extractor: Extractor, path: Path) -> None:
    """Write our file."""
    about = {
        "format": FORMAT, "version": VERSION, "source": reference.source, "count": reference.count,
        "precision": reference.precision, "floor": reference.floor, "shape": reference.shape,
        **asdict(extractor.identity),
    }  # fmt: skip
    arrays: dict[str, Any] = {"mu": reference.pool.mean, "sigma": reference.pool.cov}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    if reference.features is not None:
        arrays["features"] = reference.features
    write(path, {**{k: v.cpu().numpy() for k, v in arrays.items()}, "lsep": np.array(json.dumps(about))})


def open_reference(path: str, extractor: Extractor, batch_size: int, features: bool = True) -> Reference:
    """The reference at `path`: a file of statistics, or images of any kind that `open_images` takes.

    `features`: those of its images are wanted, for precision, recall and KID. Raises UserError where the statistics
    are another extractor's.
    """
    if not Path(path).is_file():
        return compute(open_images(path, extractor.latents), extractor, batch_size)
    archive = Archive(Path(path))
    if "lsep" in archive.headers:
        return load(archive, extractor)
    if "mu" in archive.headers and (extractor.inception or "arr_0" not in archive.headers):
        return _of_adm(archive, extractor, batch_size, features)
    if "arr_0" not in archive.headers:
        archive.header("mu", "f", 1, "mu and sigma, or images as arr_0")  # raises
    return compute(open_images(path, extractor.latents), extractor, batch_size)


def statistics(path: str, extractor: Extractor) -> Reference:
    """The statistics in a file, of which no images are looked at; raises UserError where there are none."""
    archive = Archive(Path(path))
    if "lsep" in archive.headers:
        return load(archive, extractor)
    archive.header("mu", "f", 1, "statistics mu and sigma, as lsep evaluate reference writes them")
    return _of_adm(archive, extractor, 1, features=False)


def load(archive: Archive, extractor: Extractor) -> Reference:
    """Our file."""
    about = _about(archive)
    identity = Identity(about["name"], about.get("source_sha256"), about.get("weights_sha256"))
    if difference := identity.differs(extractor.identity):
        raise UserError(f"{archive.path}: its statistics and these features are of two extractors ({difference})")
    pool = _gaussian(archive, "mu", "sigma", extractor.device)
    spatial = _gaussian(archive, "mu_s", "sigma_s", extractor.device) if "mu_s" in archive.headers else None
    features = None
    if "features" in archive.headers:
        wanted = f"floats (N, {pool.width}) as mu"
        if archive.header("features", "f", 2, wanted).shape[1] != pool.width:
            raise UserError(
                f"{archive.where('features')} is of width {archive.headers['features'].shape[1]}, expected {wanted}"
            )
        features = _tensor(archive, "features", extractor.device)
    return Reference(
        str(about["source"]), pool, about["count"], spatial, features, str(about["precision"]), about["floor"],
        None if about.get("shape") is None else tuple(about["shape"]),
    )  # fmt: skip


def _about(archive: Archive) -> dict[str, Any]:
    where = archive.where("lsep")
    try:
        about = json.loads(text(archive, "lsep"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON ({told(error)})") from None
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{where} is {shown(about)}, expected format {FORMAT!r} of version {VERSION}")
    kinds = {"name": (str,), "source": (str,), "precision": (str,), "count": (int,), "floor": (float, type(None))}
    for key, fits in kinds.items():
        if type(about.get(key)) not in fits:
            raise UserError(f"{where}: {key} is {shown(about.get(key))}, expected {fits[0].__name__}")
    shape = about.get("shape")  # not said by earlier versions
    if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape)):
        raise UserError(f"{where}: shape is {shown(shape)}, expected three counts")
    return about


def _of_adm(archive: Archive, extractor: Extractor, batch_size: int, features: bool) -> Reference:
    """Inception's statistics in ADM's form; those of its images, where there are some, come from the extractor."""
    if not extractor.inception:
        raise UserError(
            f"{archive.path}: statistics that name no extractor, so Inception's, expected ones of "
            f"{extractor.identity.name} (lsep evaluate reference writes them)"
        )
    for name, width in _INCEPTION.items():
        if name in archive.headers and archive.headers[name].shape != (width,):
            raise UserError(f"{archive.where(name)} is {archive.headers[name].shape}, expected ({width},) of Inception")
    pool = _gaussian(archive, "mu", "sigma", extractor.device)
    spatial = _gaussian(archive, "mu_s", "sigma_s", extractor.device) if "mu_s" in archive.headers else None
    kept, shape = None, None
    if "arr_0" in archive.headers:
        shape = archive.headers["arr_0"].shape[1:]
    if features and shape is not None:
        kept = extract(of_archive(archive), extractor, batch_size, KEEP).features
    return Reference(str(archive.path), pool, None, spatial, kept, shape=shape)


def _gaussian(archive: Archive, mean: str, cov: str, device: torch.device) -> Gaussian:
    width = archive.header(mean, "f", 1, "a mean (D,) of floats").shape[0]
    wanted = f"a covariance ({width}, {width}) of floats"
    if archive.header(cov, "f", 2, wanted).shape != (width, width):
        raise UserError(f"{archive.where(cov)} is {archive.headers[cov].shape}, expected {wanted}")
    return Gaussian(*(_tensor(archive, name, device).double() for name in (mean, cov)))


def _tensor(archive: Archive, name: str, device: torch.device) -> Tensor:
    values = archive.read(name)
    if not np.isfinite(values).all():
        raise UserError(f"{archive.where(name)} holds values that are not finite, expected finite ones")
    return torch.from_numpy(values.astype(np.float64 if values.dtype.itemsize == 8 else np.float32)).to(device)
