"""The quickstart's data: scikit-learn's digits, 1,797 real handwritten 8 x 8 images that come inside the package.

They go through a store like any other data (`open_digits`). `agreement` judges samples of them: a 3-nearest-neighbour
classifier on the real images against the classes asked for; `features` gives what a Frechet distance is taken over.
"""

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lsep.data.manifest import Ids
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build
from lsep.errors import UserError
from lsep.voice import heard


class Digits:
    """All digits as uint8 pixels (1, 8, 8), as a source of blocks."""

    header = Header("pixels", (1, 8, 8), "uint8", 10, class_names=tuple(str(i) for i in range(10)))

    def __init__(self) -> None:
        self._x, self._y = _load()
        self.rows = len(self._x)

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        return Block(self._x[start:stop], self._y[start:stop])


def open_digits() -> Store:
    """The store of the digits in the user's cache folder, written there on first use.

    Where that folder cannot be written they are in a temporary one, which goes with the process.
    """
    try:
        return _cached(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsep")
    except (OSError, UserError, RuntimeError) as error:  # RuntimeError: of a user without a home
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return _cached(_temporary(reason))


@functools.cache
def _temporary(reason: str) -> Path:
    """A folder of this process alone, under a name that nobody could take before."""
    temporary = Path(tempfile.mkdtemp(prefix="lsep-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    if heard("warning"):
        print(
            f"lsep: warning: the cache folder cannot be used ({reason}): the digits are written to {temporary}, which "
            "goes with this process; set XDG_CACHE_HOME to keep them",
            file=sys.stderr,
        )
    return temporary


def _cached(cache: Path) -> Store:
    folder = cache / "digits"
    with contextlib.suppress(UserError):  # not there yet, damaged, or of another version: made anew
        return Store(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            build(Digits(), Path(temporary) / "new", progress=False)
            with contextlib.suppress(FileNotFoundError):
                folder.rename(Path(temporary) / "old")
            with contextlib.suppress(FileExistsError):  # another process was faster
                (Path(temporary) / "new").rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return Store(folder)


def _load() -> tuple[np.ndarray, Ids]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the set counts ink from 0 to 16
    return images[:, None], digits.target.astype(np.int64)


def agreement(images: np.ndarray, labels: Ids) -> float:
    """Share of uint8 images `(N, 8, 8, 1)` to which a 3-NN classifier on the real digits gives their label `(N,)`."""
    from sklearn.neighbors import KNeighborsClassifier

    x, y = _load()
    classifier = KNeighborsClassifier(3).fit(x.reshape(len(x), -1).astype(np.float32), y)
    return float((classifier.predict(images.reshape(len(images), -1).astype(np.float32)) == labels).mean())


def held_out() -> np.ndarray:
    """Which digits `features` has not seen: every fifth, a mask `(1797,)`."""
    return np.arange(len(_load()[0])) % 5 == 4


def features(images: np.ndarray) -> np.ndarray:
    """Features `(N, 64)` float32 of uint8 images `(N, 8, 8, 1)`: the hidden layer of a small classifier of digits."""
    judge = classifier()
    hidden = as_inputs(images) @ judge.coefs_[0] + judge.intercepts_[0]
    return np.maximum(hidden, 0).astype(np.float32)


def as_inputs(images: np.ndarray) -> np.ndarray:
    """What `classifier` takes: pixels `(N, 64)` from 0 to 1."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


@functools.cache
def classifier() -> Any:
    """One hidden layer of 64 units, fitted to the digits that are not held out; the same at every call."""
    from sklearn.neural_network import MLPClassifier

    x, y = _load()
    seen = ~held_out()
    return MLPClassifier((64,), random_state=0, max_iter=600, tol=1e-3).fit(as_inputs(x[seen]), y[seen])
