"""What the study trains on, and what judges its samples: CIFAR-10 from a folder, or scikit-learn's digits.

A judge is a small classifier's hidden features; distances between Gaussians fitted to them are called FD, never FID.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsep.data import digits
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.functions import load_module

Images = npt.NDArray[np.uint8]
"""`(N, H, W, C)`."""
NOISY = 0.1
"""Share of wrong labels in the store `noisy`."""


@dataclass(frozen=True)
class Task:
    """A data set in stores, held-out images, and a judge."""

    name: str
    distance: str
    """What the judge's Frechet distance is called."""
    features: Callable[[Images], npt.NDArray[np.float32]]
    """Features `(N, D)` of images."""
    stores: dict[str, Path]
    """train, noisy (the same with a tenth of the labels wrong) and test."""
    train: Images
    test: Images
    note: str
    """What the data and its judge are."""


def open_task(name: str, cifar10: Path | None, folder: Path, rows: int | None) -> Task:
    """The data set `name`, its stores in `folder`; `rows` takes the first images of the training set only."""
    if name == "digits":
        train, test, features, note = _digits()
        distance = "FD-D64"
    else:
        if cifar10 is None:
            raise UserError("--cifar10 is missing, expected the folder of cifar10.py, train.npz and test.npz")
        path = cifar10 / "cifar10.py"
        if not path.is_file():
            raise UserError(f"--cifar10: {path} is missing, expected a module with load(split) and features(images)")
        module: Any = load_module("--cifar10", str(path))
        train, test = (module.load(split) for split in ("train", "test"))
        features, distance = module.features, "FD-R128"
        note = "CIFAR-10 from JPEG scans of quality 75: nothing compares with figures on the original"
    rows = min(rows or len(train[0]), len(train[0]))
    train = train[0][:rows], train[1][:rows].astype(np.int64)
    stores = _stores(folder / f"{name}-{rows}", train, test)
    return Task(name, distance, features, stores, train[0], test[0], f"{rows:,} training images. {note}.")


def _stores(folder: Path, train: tuple[Images, Any], test: tuple[Images, Any]) -> dict[str, Path]:
    x, y = train
    rng = np.random.default_rng(0)
    wrong = (y + rng.integers(1, y.max() + 1, len(y))) % (y.max() + 1)
    noisy = np.where(rng.random(len(y)) < NOISY, wrong, y)
    found = {}
    for name, images, labels in (("train", x, y), ("noisy", x, noisy), ("test", *test)):
        found[name] = folder / name
        if not (found[name] / "manifest.json").exists():
            rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
            write_store(found[name], kind="pixels", x=rows, y=labels.astype(np.int64), num_classes=int(y.max()) + 1)
    return found


def _digits() -> tuple[tuple[Images, Any], tuple[Images, Any], Callable[[Images], npt.NDArray[np.float32]], str]:
    x, y, *_ = digits.Digits().read(0, digits.Digits().rows)
    images, held = x.transpose(0, 2, 3, 1), digits.held_out()
    accuracy = digits.classifier().score(digits.as_inputs(images[held]), y[held])
    note = f"Scikit-learn's digits; the judge, which saw no test image, is right on {accuracy:.1%} of them"
    return (images[~held], y[~held]), (images[held], y[held]), digits.features, note
