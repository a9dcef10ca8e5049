"""The quickstart's data and its judge."""

import numpy as np

from lsep.data.digits import Digits, agreement


def test_digits_are_real_images() -> None:
    source = Digits()
    rows = source.read(np.arange(source.manifest.rows))
    assert rows.x.shape == (1797, 1, 8, 8) and rows.x.dtype == np.uint8
    assert rows.x.min() == 0 and rows.x.max() == 255
    assert np.bincount(rows.y).min() >= 170


def test_agreement_tells_digits_from_noise() -> None:
    rows = Digits().read(np.arange(300))
    images = rows.x.transpose(0, 2, 3, 1)
    assert agreement(images, rows.y) > 0.97
    assert agreement(images, (rows.y + 1) % 10) < 0.03
    noise = np.random.default_rng(0).integers(256, size=images.shape).astype(np.uint8)
    assert agreement(noise, rows.y) < 0.3
