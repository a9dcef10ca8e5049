"""Images to evaluate: of an `.npz`, a folder, a store or a run, in their order, a batch at a time.

Pixels come as uint8 `(N, H, W, C)`; latents, for extractors that take them, as float32 `(N, C, H, W)` as a VAE decodes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lsep.data.forms_npy import each
from lsep.data.images import SUFFIXES, load_image
from lsep.data.latents import deviation_of_vae, of_vae
from lsep.data.manifest import Manifest, Source
from lsep.errors import UserError
from lsep.evaluate.archives import Archive
from lsep.parts import SETTINGS
from lsep.run import Run
from lsep.sample import GRID_MARK

_PIXELS = "uint8 images (N, H, W, 1 or 3)"
_LATENTS = "float32 latents (N, C, H, W)"
_GRID_NAME = re.compile(r"(grid|step-\d+).*\.png")
"""Names that grids of ours have; 50,000 files are not opened twice to look for one."""


@dataclass(frozen=True)
class Images:
    """`count` images of one `shape`: (H, W, C), of latents (C, H, W)."""

    source: str
    count: int
    shape: tuple[int, ...]
    latents: bool
    batches: Callable[[int], Iterator[np.ndarray]]
    """Called with a batch size: all of them in order."""
    notes: tuple[str, ...] = ()
    """What was passed over, for the warnings of a result."""


def open_images(path: str, latents: bool = False) -> Images:
    """The images at `path`: an .npz with `arr_0`, a run, a store or `digits`, or a folder of images at any depth.

    A folder that `lsep sample` wrote is its samples file. `latents`: latents are wanted. Raises UserError where the
    other is found.
    """
    folder = Path(path)
    if path == "digits" and not folder.exists():
        from lsep.data.digits import open_digits

        images = of_source(open_digits())
    elif folder.is_file():
        images = of_archive(Archive(folder))
    elif (folder / "config.json").is_file():
        images = of_archive(Archive(newest_samples(Run.existing(folder))))
    elif (folder / "manifest.json").is_file():
        from lsep.data.store import Store

        images = of_source(Store(folder))
    elif folder.is_dir():
        images = of_folder(folder) if (file := samples_file(folder)) is None else of_archive(Archive(file))
    else:
        raise UserError(f"{path}: not there, expected an .npz file, a folder of images, a store or a run")
    if images.latents != latents:
        found, wanted = ("latents", "images") if images.latents else ("images", "latents")
        hint = ": decode them with the VAE they come from first" if images.latents else ""
        raise UserError(f"{images.source}: holds {found}, expected {wanted} for this extractor{hint}")
    return images


def of_archive(archive: Archive) -> Images:
    """`arr_0` of an .npz."""
    header = archive.header("arr_0", "uf", 4, f"{_PIXELS} or {_LATENTS}")
    latents = header.dtype == np.float32
    if not latents and (header.dtype != np.uint8 or header.shape[3] not in (1, 3)):
        raise UserError(f"{archive.where('arr_0')} is {header.dtype} {header.shape}, expected {_PIXELS} or {_LATENTS}")
    return Images(str(archive.path), header.shape[0], header.shape[1:], latents, partial(archive.rows, "arr_0"))


def newest_samples(run: Run) -> Path:
    """The one .npz below RUN/samples of the latest step; raises UserError where there is none, or more than one."""
    files = sorted(run.samples.rglob("*.npz"))
    if not files:
        raise UserError(f"{run.samples}: no .npz below it, expected one: draw samples with lsep sample {run.path}")

    def step(file: Path) -> int:
        found = re.search(r"step-(\d+)", str(file.relative_to(run.samples)))
        return int(found[1]) if found else -1

    newest = [file for file in files if step(file) == max(map(step, files))]
    if len(newest) > 1:
        names = ", ".join(str(f.relative_to(run.path)) for f in newest[:5])
        raise UserError(
            f"{run.path}: {len(newest)} sets of samples of its latest step ({names}), expected one: name it"
        )
    return newest[0]


def samples_file(folder: Path) -> Path | None:
    """The one .npz of samples below a folder of `lsep sample`; None where it is a folder of images.

    Raises UserError where there is more than one, or images beside it that are not its grids.
    """
    if folder.resolve().name == "samples" and (folder.resolve().parent / "config.json").is_file():
        return newest_samples(Run.existing(folder.resolve().parent))
    below = (p for p in sorted(folder.rglob("*.npz")) if p.is_file() and not _hidden(p.relative_to(folder)))
    files = [p for p in below if _holds_samples(p)]
    if not files:
        if not _images_below(folder) and (parts := next(folder.rglob("*.npz.parts"), None)):
            raise UserError(f"{parts}: a sampling that is not finished; give its lsep sample command again to go on")
        return None
    grids = {p for file in files for p in (file.with_suffix(".png"), file.parent / "grid.png")}
    images = [p for p in _images_below(folder) if p not in grids and not _is_grid(p)]
    names = ", ".join(str(f.relative_to(folder)) for f in files[:5])
    if images:
        raise UserError(
            f"{folder}: {len(images)} images and {len(files)} files of samples ({names}), expected one or the other: "
            "name the file, or a folder of images alone"
        )
    if len(files) > 1:
        raise UserError(f"{folder}: {len(files)} sets of samples ({names}), expected one: name it")
    return files[0]


def _holds_samples(file: Path) -> bool:
    try:
        header = Archive(file).headers.get("arr_0")
    except UserError:
        return (file.parent / SETTINGS).is_file()  # ours, and damaged, which is said when it is read
    return header is not None and len(header.shape) == 4


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not _hidden(p.relative_to(folder)))


def _is_grid(path: Path) -> bool:
    """Whether an image of such a name is a grid of ours."""
    if not _GRID_NAME.fullmatch(path.name):
        return False
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get(GRID_MARK[0]) == GRID_MARK[1]
    except Exception:  # damaged, which is said when it is read: PIL raises anything
        return False


def of_folder(folder: Path) -> Images:
    """All images below a folder, sorted by path, in RGB; they must be of one size. Grids of ours are passed over."""
    below = _images_below(folder)
    paths = [p for p in below if not _is_grid(p)]
    if not paths:
        grids = f", but {len(below)} grids of samples" if below else ""
        raise UserError(f"{folder}: no images below it{grids}, expected some ({', '.join(SUFFIXES)})")
    first = np.asarray(load_image(paths[0])).shape

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            x = np.empty((len(part), *first), np.uint8)

            def fill(i: int, part: list[Path] = part, x: np.ndarray = x) -> None:
                image = np.asarray(load_image(part[i]))
                if image.shape != first:
                    raise UserError(
                        f"{part[i]}: {image.shape[1]} x {image.shape[0]} pixels, expected {first[1]} x {first[0]} as "
                        f"{paths[0].name}"
                    )
                x[i] = image

            each(fill, len(part))
            yield x

    left = len(below) - len(paths)
    notes = (f"{folder}: {left} {'grid' if left == 1 else 'grids'} of samples left out",) if left else ()
    return Images(str(folder), len(paths), first, False, batches, notes)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def of_source(source: Source) -> Images:
    """The rows of a store. Of moments a sample of each posterior, always the same."""
    m = source.manifest
    latents = m.kind != "pixels"
    c, h, w = m.shape

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, m.rows, size):
            ids = np.arange(start, min(start + size, m.rows))
            yield of_rows(source, ids)

    return Images(m.source, m.rows, m.shape if latents else (h, w, c), latents, batches)


def of_rows(source: Source, ids: np.ndarray) -> np.ndarray:
    """Rows `ids` of a store as an extractor takes them: latents as their VAE encodes them."""
    x, kind = source.read(ids).x, source.manifest.kind
    if kind == "pixels":
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    import torch

    def taken_back(part: np.ndarray, way: Callable[[torch.Tensor, Manifest], torch.Tensor] = of_vae) -> np.ndarray:
        return way(torch.from_numpy(part), source.manifest).numpy()

    if kind == "samples":
        return taken_back(x.astype(np.float32))
    from lsep.interpolant import Stream
    from lsep_kernels.reference import normal

    mean, std = x.astype(np.float32).reshape(len(x), 2, *source.manifest.shape).swapaxes(0, 1)
    noise = normal(0, Stream.POSTERIOR, 0, torch.from_numpy(ids), source.manifest.shape)
    return taken_back(mean) + taken_back(std, deviation_of_vae) * noise.numpy()
