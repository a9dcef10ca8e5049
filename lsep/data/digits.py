"""The quickstart's data: scikit-learn's digits, 1,797 real handwritten 8 x 8 images that come inside the package.

`agreement` judges samples of them: a 3-nearest-neighbour classifier on the real images against the classes asked for.
"""

import numpy as np

from lsep.data.manifest import Flips, Ids, Manifest, Rows


class Digits:
    """All digits as uint8 pixels (1, 8, 8), in memory."""

    def __init__(self) -> None:
        self._x, self._y = _load()
        self.manifest = Manifest(
            source="digits",
            kind="pixels",
            shape=(1, 8, 8),
            rows=len(self._x),
            num_classes=10,
            probe_classes=10,
            dtype="uint8",
            class_names=tuple(str(i) for i in range(10)),
        )

    def read(self, ids: Ids, flips: Flips | None = None, out: np.ndarray | None = None) -> Rows:
        x = np.take(self._x, ids, axis=0, out=out)  # digits have no mirror images, so there are no flips
        return Rows(x, self._y[ids], self._y[ids])


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
