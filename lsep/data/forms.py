"""The data sets users bring, as sources of blocks for `writer.build`: recognised from their layout, or named.

    open_form(path, form=None) -> BlockSource       form is one of FORMS

Nothing is guessed: what fits two forms, or none, is an error that asks for `--form`.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lsep.data import FORMS, Labels, pictures_parquet, pictures_tar
from lsep.data.digits import Digits
from lsep.data.forms_npy import NpyRows, count_classes, each, json_labels, npy_array
from lsep.data.forms_shards import LightningDiT
from lsep.data.images import SUFFIXES
from lsep.data.latents import SD_SCALE, Latents, raw
from lsep.data.manifest import Ids
from lsep.data.pictures import open_pictures, said
from lsep.data.shards import header as read_header
from lsep.data.squares import OnCorrupt, PixelRows, Squares
from lsep.data.tree import Tree
from lsep.data.writer import BlockSource
from lsep.errors import UserError, nearest

_MEAN_STD, _LATENTS = r"img-mean-std-.*\.npy", r"img-latents-.*\.npy"
_FOLDERS = {"repa": "vae-sd", "edm2": "vae-sd", "speedrundit": "vae-in"}
# Published statistics of the raw SD latents that EDM2 normalises with, by channel, and the deviation it aims at.
EDM2_MEAN = np.array([5.81, 3.25, 0.12, -2.15], np.float32)
EDM2_STD = np.array([4.17, 4.62, 3.71, 3.28], np.float32)
EDM2_TARGET = np.float32(0.5)
_NEAR = 1.5  # a channel's mean belongs to a form when it is this near to the form's; the two regions are apart


def recognise(path: str | Path) -> str:
    """The form's name from the layout; raises UserError when nothing or more than one form fits."""
    if str(path) == "digits" and not Path(path).exists():
        return "digits"
    folder = Path(path)
    if pictures_tar.files(folder) or pictures_parquet.files(folder):
        return "imagefolder"
    tree = Tree(folder, "latents or images")
    if folder.is_dir():
        shards = sorted(folder.glob("*.safetensors"))
        if shards and "latents" in read_header(shards[0]):
            return "lightningdit"
        if _feature_folders(folder):
            return "fast-dit"
    for base in ("vae-sd", "vae-in", ""):
        if tree.has_folder(base) if base else tree.has("dataset.json"):
            if names := tree.list(base, _MEAN_STD):
                return _repa_or_edm2(tree, names)
            if tree.list(base, _LATENTS):
                return "speedrundit"
    if folder.is_dir() and tree.has("manifest.json"):
        raise UserError(f"{folder}: has a manifest.json, so it is a store already, expected data to pack")
    if _holds_images(tree):
        return "imagefolder"
    raise UserError(f"{folder}: the layout is of no known form, expected --form with one of {', '.join(FORMS)}")


def open_form(
    path: str | Path,
    form: str | None = None,
    size: int | None = None,
    scale: float | None = None,
    num_classes: int | None = None,
    labels: Labels = "auto",
    on_corrupt: OnCorrupt = "error",
) -> BlockSource:
    """The data at `path` as a source of blocks; `form` None recognises it.

    `size`: side in pixels of `imagefolder`'s squares; `labels`: where theirs are, see `open_pictures`; `on_corrupt`:
    whether one that cannot be read ends it or is left out. `scale`: instead of the form's own (of `lightningdit` with
    its statistics: the multiplier after them). `num_classes`: instead of the largest label + 1.
    """
    if form is None:
        form = recognise(path)
    if form not in FORMS:
        raise UserError(f"--form {form!r} is not known{nearest(form, FORMS)}")
    for flag, value, default in (("--labels", labels, "auto"), ("--on-corrupt", on_corrupt, "error")):
        if value != default and form != "imagefolder":
            raise UserError(f"{flag} {value} with form {form!r}, expected it only with 'imagefolder'")
    if size is not None and (form != "imagefolder" or size < 1):
        raise UserError(f"--size {size} with form {form!r}, expected at least 1, and only with 'imagefolder'")
    if scale is not None and (form in ("edm2", "imagefolder", "digits") or not 0 < scale < float("inf")):
        raise UserError(f"--scale {scale} with form {form!r}, expected a positive number where a form leaves it open")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"--num-classes {num_classes}, expected at least 1")
    if form == "imagefolder":
        return open_images(Path(path), size, num_classes, labels, on_corrupt)
    if form == "digits":
        if num_classes not in (None, Digits.header.num_classes):
            raise UserError(f"--num-classes {num_classes} with form 'digits', expected {Digits.header.num_classes}")
        return Digits()
    return _OPEN[form](Path(path), scale, num_classes)


def _open_moments(path: Path, scale: float, num_classes: int | None, form: str) -> NpyRows:
    tree, base, names, labels = _named(path, form, _MEAN_STD)
    if base and tree.has_folder("images"):
        _check_images(tree, names, labels)
    means = channel_means(tree, names)
    if means[4:].mean() < -1:
        raise UserError(
            f"{tree.where(names[0])}: channels 4 to 7 average {means[4:].mean():.2f}, expected standard deviations "
            f"(these look like log-variances)"
        )
    classes = _classes(labels, num_classes, tree.where(_join(base, "dataset.json")), names)
    if form == "repa":
        return NpyRows(tree, names, labels, "moments", 8, scale, classes, latents=lambda c: raw(c, SD_SCALE))
    mean, std = (tuple(map(float, v)) for v in (EDM2_MEAN, EDM2_STD))
    latents = Latents(mean, std, float(EDM2_TARGET), SD_SCALE)
    return NpyRows(tree, names, labels, "moments", 8, scale, classes, _normalise_edm2, lambda c: latents)


def open_repa(path: Path, scale: float | None, num_classes: int | None) -> NpyRows:
    """REPA's moments: mean and std of an SD VAE, unscaled; the model sees 0.18215 times a sample."""
    return _open_moments(path, SD_SCALE if scale is None else scale, num_classes, "repa")


def open_edm2(path: Path, scale: float | None, num_classes: int | None) -> NpyRows:
    """EDM2's moments, folder or zip archive, **normalised by channel as they are read**: with EDM2's published raw
    mean m and deviation s, mean' = (mean - m) / s * 0.5 and std' = std / s * 0.5; scale is 1 and shift 0. A store's
    scale and shift are the same for all channels, so they cannot say this."""
    return _open_moments(path, 1.0, num_classes, "edm2")


def _normalise_edm2(x: np.ndarray) -> np.ndarray:
    factor = (EDM2_TARGET / EDM2_STD)[:, None, None]
    values = x.astype(np.float32)
    values[:, :4] = (values[:, :4] - EDM2_MEAN[:, None, None]) * factor
    values[:, 4:] *= factor
    return values.astype(x.dtype)


def open_speedrundit(path: Path, scale: float | None, num_classes: int | None) -> NpyRows:
    """SpeedrunDiT's samples; the model sees 0.3099 times a sample."""
    tree, base, names, labels = _named(path, "speedrundit", _LATENTS)
    classes = _classes(labels, num_classes, tree.where(_join(base, "dataset.json")), names)
    return NpyRows(tree, names, labels, "samples", None, 0.3099 if scale is None else scale, classes)


def open_fast_dit(path: Path, scale: float | None, num_classes: int | None) -> NpyRows:
    """fast-DiT's samples, stored already times 0.18215 (so scale is 1); rows in the order of the names as strings."""
    folders = _feature_folders(path)
    if len(folders) != 1:
        raise UserError(
            f"{path}: {len(folders)} pairs of folders *_features and *_labels found, expected imagenet256_features "
            f"and imagenet256_labels"
        )
    features, labels_folder = folders[0]
    tree = Tree(path)
    names, labelled = tree.list(features, r"[^.].*\.npy"), tree.list(labels_folder, r"[^.].*\.npy")
    if not names:
        raise UserError(f"{path / features}: no .npy files inside, expected one for each row")
    odd = {n.removeprefix(features) for n in names} ^ {n.removeprefix(labels_folder) for n in labelled}
    if odd:
        raise UserError(
            f"{path}: {len(names)} files in {features} and {len(labelled)} in {labels_folder}, expected the same names "
            f"in both; {min(odd)[1:]!r} is in one only"
        )
    labels = np.empty(len(names), np.int64)

    def fill(i: int) -> None:
        where = tree.where(labelled[i])
        label = npy_array(tree.read(labelled[i]), where)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UserError(f"{where}: {label.dtype} {label.shape} found, expected one label, int64 (1,)")
        labels[i] = label.item()

    each(fill, len(names))
    classes = count_classes(labels, num_classes, lambda i: tree.where(labelled[i]))
    return NpyRows(
        tree, names, labels, "samples", 4, 1.0 if scale is None else scale, classes,
        latents=lambda c: replace(raw(c, SD_SCALE), factor=SD_SCALE),
    )  # fmt: skip


_OPEN: dict[str, Callable[[Path, float | None, int | None], BlockSource]] = {
    "repa": open_repa,
    "edm2": open_edm2,
    "lightningdit": LightningDiT,
    "fast-dit": open_fast_dit,
    "speedrundit": open_speedrundit,
}


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _classes(labels: Ids | None, given: int | None, listing: str, names: list[str]) -> int:
    """Number of classes, of a set without labels one; `listing` is the file that says the labels."""
    if labels is None:
        if given is not None:
            raise UserError(f"--num-classes {given}: {listing} says that there are no labels, expected no such flag")
        return 1
    return count_classes(labels, given, lambda i: f"{listing}: {names[i]}")


def _named(path: Path, form: str, pattern: str) -> tuple[Tree, str, list[str], Ids | None]:
    """Tree, folder of the latents inside it, their names in sorted order, and their labels from dataset.json."""
    tree = Tree(path)
    base = _FOLDERS[form] if tree.has_folder(_FOLDERS[form]) else ""
    names = tree.list(base, pattern)
    if not names:
        example = pattern.replace(".*", "00000000").replace("\\", "")
        raise UserError(f"{tree.where(base) if base else path}: no latents inside, expected files as 00000/{example}")
    return tree, base, names, json_labels(tree, _join(base, "dataset.json"), base, names)


def _check_images(tree: Tree, names: list[str], labels: Ids | None) -> None:
    """REPA pairs images and latents by sorted order: their counts, numbers and labels have to agree."""
    images = tree.list("images", r"img[^.]*\.(png|jpg|jpeg|webp|npy)")
    where = tree.where("images")
    if len(images) != len(names):
        raise UserError(f"{where}: {len(images)} images found, expected {len(names)}, one for each latent")
    for image, name in zip(images, names, strict=True):
        if _number(image) != _number(name):
            raise UserError(f"{tree.where(image)}: found where {name!r} needs its image, expected the same number")
    if tree.has("images/dataset.json"):
        of_images = json_labels(tree, "images/dataset.json", "images", images)
        if of_images is None or labels is None:
            return
        wrong = np.flatnonzero(of_images != labels)
        if len(wrong):
            i = int(wrong[0])
            raise UserError(
                f"{tree.where('images/dataset.json')}: label {of_images[i]} for {images[i]!r}, expected {labels[i]} "
                f"as for {names[i]!r}"
            )


def _number(name: str) -> str:
    return "".join(c for c in name.rpartition("/")[2].partition(".")[0] if c.isdigit())


def channel_means(tree: Tree, names: list[str], rows: int = 256) -> np.ndarray:
    """Means by channel `(8,)` of up to `rows` finite rows, spread over the set, as its order is often by class."""
    picked = np.linspace(0, len(names) - 1, min(rows, len(names))).astype(int)
    means = np.full((len(picked), 8), np.nan)

    def fill(i: int) -> None:
        name = names[picked[i]]
        x = npy_array(tree.read(name), tree.where(name))
        if x.shape[-3:-2] != (8,) or x.ndim != 3 + (x.shape[0] == 1) or x.dtype.kind != "f":
            expected = "float32 (8, H, W) or (1, 8, H, W)"
            raise UserError(f"{tree.where(name)}: {x.dtype} {x.shape} found, expected {expected}")
        means[i] = x.reshape(8, -1).mean(1, dtype=np.float64)

    each(fill, len(picked))
    finite = means[np.isfinite(means).all(1)]
    return finite.mean(0) if len(finite) else means[0]


def _repa_or_edm2(tree: Tree, names: list[str]) -> str:
    """REPA's and EDM2's latents have the same layout; the means of their channels are apart."""
    means = channel_means(tree, names)[:4]
    if np.abs(means - EDM2_MEAN).max() < _NEAR:
        return "edm2"
    if np.abs(means).max() < _NEAR:
        return "repa"
    raise UserError(
        f"{tree.path}: channel means {np.round(means, 2).tolist()} found, expected near {EDM2_MEAN.tolist()} (EDM2) or "
        f"within {_NEAR} of 0 (REPA): say --form edm2 or --form repa"
    )


def _feature_folders(path: Path) -> list[tuple[str, str]]:
    """Names of fast-DiT's pairs of folders."""
    try:
        found = {e.name for e in os.scandir(path) if e.is_dir()}
    except OSError as error:
        raise UserError(f"{path}: cannot be opened as a folder ({error.strerror})") from None
    pairs = [(n, n.removesuffix("_features") + "_labels") for n in sorted(found) if n.endswith("_features")]
    return [pair for pair in pairs if pair[1] in found]


def _holds_images(tree: Tree) -> bool:
    return any(
        name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))
        for name in tree.list("", r"(?s)[^.].*")
    )


def open_images(
    path: Path, size: int | None, num_classes: int | None, labels: Labels = "auto", on_corrupt: OnCorrupt = "error"
) -> PixelRows:
    """Images of any kind that `pictures.open_pictures` takes, as pixels after ADM's centre crop."""
    if size is None:
        raise UserError(f"{path}: a set of images needs --size, expected the side of the squares in pixels")
    pictures = open_pictures(path, labels)
    for line in said(path, pictures.listed):
        print(line, file=sys.stderr)
    classes = pictures.listed.num_classes
    if num_classes is not None and pictures.listed.labelled:
        classes = count_classes(pictures.listed.labels, num_classes, pictures.where)
    elif num_classes is not None:
        raise UserError(f"--num-classes {num_classes}: {path} has no labels, expected no such flag")
    return PixelRows(Squares(pictures, size, on_corrupt), classes)
