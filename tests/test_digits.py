"""The quickstart's data and its judge."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from lsep.data import digits
from lsep.data.digits import Digits, agreement, open_digits


def test_digits_are_real_images() -> None:
    rows = Digits().read(0, Digits().rows)
    assert rows.x.shape == (1797, 1, 8, 8) and rows.x.dtype == np.uint8
    assert rows.x.min() == 0 and rows.x.max() == 255
    assert np.bincount(rows.y).min() >= 170


def test_agreement_tells_digits_from_noise() -> None:
    rows = Digits().read(0, 300)
    images = rows.x.transpose(0, 2, 3, 1)
    assert agreement(images, rows.y) > 0.97
    assert agreement(images, (rows.y + 1) % 10) < 0.03
    noise = np.random.default_rng(0).integers(256, size=images.shape).astype(np.uint8)
    assert agreement(noise, rows.y) < 0.3


def test_features_are_what_the_judge_decides_on() -> None:
    x, y, *_ = Digits().read(0, 1797)
    images, held = x.transpose(0, 2, 3, 1), digits.held_out()
    hidden, judge = digits.features(images[held]), digits.classifier()
    assert hidden.shape == (359, 64) and hidden.dtype == np.float32 and hidden.min() == 0
    decided = (hidden @ judge.coefs_[1] + judge.intercepts_[1]).argmax(1)
    np.testing.assert_array_equal(decided, judge.predict(digits.as_inputs(images[held])))
    assert (decided == y[held]).mean() > 0.95


def test_the_store_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_digits()
    assert [p.name for p in (tmp_path / "lsep").iterdir()] == ["digits"]
    before = store.shards[0].path.stat().st_mtime_ns
    assert open_digits().shards[0].path.stat().st_mtime_ns == before
    (tmp_path / "lsep" / "digits" / "manifest.json").write_text("{}")  # of another version
    store = open_digits()
    rows, truth = store.read(np.arange(1797)), Digits().read(0, 1797)
    np.testing.assert_array_equal(rows.x, truth.x)
    np.testing.assert_array_equal(rows.y, truth.y)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digits are in a temporary folder of this process alone then, and a line says so."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    digits._temporary.cache_clear()
    store = open_digits()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be written (Not a directory)" in err and "set XDG_CACHE_HOME" in err
    assert store.manifest.rows == 1797 and store.path.is_relative_to(tmp_path)
    (folder,) = tmp_path.glob("lsep-*")
    assert folder.stat().st_mode & 0o777 == 0o700 and str(folder) in err
    assert open_digits().path == store.path and capsys.readouterr().err == ""
