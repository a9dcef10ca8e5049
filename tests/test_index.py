"""In-place use: the store reads the rows where they lie, bit for bit, and refuses what it cannot express."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_forms import LABELS, ROWS, make_fast_dit, make_images, make_lightningdit, make_repa, moments, npy

from lsep.data import index as module
from lsep.data.forms import EDM2_MEAN, EDM2_STD, open_form
from lsep.data.index import index
from lsep.data.store import Store
from lsep.errors import UserError

IDS = np.array([10, 0, 3, 4, 9, 9, 1])


def entries(folder: Path) -> list[dict]:
    shards: list[dict] = json.loads((folder / "manifest.json").read_text())["shards"]
    return shards


def expect_rows(folder: Path, x: np.ndarray, labels: np.ndarray) -> None:
    rows = Store(folder).read(IDS)
    assert rows.x.dtype == x.dtype
    np.testing.assert_array_equal(rows.x, x[IDS])
    np.testing.assert_array_equal(rows.y, labels[IDS])


@pytest.mark.parametrize("leading", [False, True])
def test_repa(tmp_path: Path, leading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_PER_ENTRY", 4)
    monkeypatch.setattr(module, "_CHUNK", 3)
    x = moments()
    make_repa(tmp_path, x[:, None] if leading else x)
    before = sorted(tmp_path.rglob("*.npy"))
    assert index(tmp_path, progress=False) == tmp_path / "manifest.json"
    expect_rows(tmp_path, x, LABELS)
    m = Store(tmp_path).manifest
    assert (m.kind, m.shape, m.scale, m.num_classes, m.flips) == ("moments", (4, 4, 4), 0.18215, 7, False)
    assert [e["rows"] for e in entries(tmp_path)] == [4, 4, 3]
    assert sorted(tmp_path.rglob("*.npy")) == before
    index(tmp_path, progress=False)  # again: the same, and its own files do not disturb it
    expect_rows(tmp_path, x, LABELS)


def test_fast_dit(tmp_path: Path) -> None:
    x = make_fast_dit(tmp_path)
    index(tmp_path, progress=False)
    order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    expect_rows(tmp_path, x[order], LABELS[order])
    assert Store(tmp_path).manifest.scale == 1.0


def test_speedrundit(tmp_path: Path) -> None:
    x = np.random.default_rng(5).normal(size=(ROWS, 1, 32, 2, 2)).astype(np.float32)
    make_repa(tmp_path, x, base="vae-in", name="img-latents")
    index(tmp_path, progress=False)
    expect_rows(tmp_path, x[:, 0], LABELS)
    assert Store(tmp_path).manifest.scale == 0.3099


def test_lightningdit(tmp_path: Path) -> None:
    x, flip = make_lightningdit(tmp_path, stats=False)
    with pytest.raises(UserError, match="expected it or --scale"):
        index(tmp_path, progress=False)
    assert not (tmp_path / "manifest.json").exists()
    index(tmp_path, scale=0.18215, progress=False)
    expect_rows(tmp_path, x, LABELS)
    mirrored = Store(tmp_path).read(IDS, np.array([True, False] * 3 + [True]))
    np.testing.assert_array_equal(mirrored.x[::2], flip[IDS[::2]])
    np.testing.assert_array_equal(mirrored.x[1::2], x[IDS[1::2]])
    assert Store(tmp_path).manifest.scale == 0.18215
    assert open_form(tmp_path, scale=1.0).rows == ROWS  # the sidecars are not taken for shards


def test_lightningdit_with_one_mean_and_std(tmp_path: Path) -> None:
    """(z - mean) / std * multiplier is (z - shift) * scale."""
    make_lightningdit(tmp_path, stats=False)
    torch.save(
        {"mean": torch.full((1, 32, 1, 1), 0.5), "std": torch.full((1, 32, 1, 1), 4.0)}, tmp_path / "latents_stats.pt"
    )
    index(tmp_path, scale=3.0, progress=False)
    m, z = Store(tmp_path).manifest, Store(tmp_path).read(IDS).x
    source = open_form(tmp_path, scale=3.0)
    np.testing.assert_allclose((z - m.shift) * m.scale, source.read(0, ROWS).x[IDS] * source.header.scale, rtol=1e-5)


def test_damage_after_the_index_is_found(tmp_path: Path) -> None:
    make_repa(tmp_path, moments())
    index(tmp_path, progress=False)
    file = tmp_path / "vae-sd/00000/img-mean-std-00000003.npy"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="00000003.npy: row 3 \\(sample 3\\) is damaged"):
        Store(tmp_path).read(IDS)


def test_rows_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    x = moments()
    x[2, 0, 0, 0], x[7, 5, 1, 1], x[7, 0, 0, 0] = np.nan, np.inf, np.nan
    make_repa(tmp_path, x)
    index(tmp_path, progress=False)
    assert [e["non_finite"] for e in entries(tmp_path)] == [2]
    with pytest.raises(UserError, match="not finite"):
        Store(tmp_path).read(np.array([7]))
    folder = tmp_path / "shards"
    folder.mkdir()
    z = np.zeros((2, 5, 4, 2, 2), np.float32)
    z[0, 1, 0, 0, 0], z[1, 1, 0, 0, 0], z[1, 3, 0, 0, 0] = np.nan, np.nan, np.inf
    save_file({"latents": z[0], "latents_flip": z[1], "labels": LABELS[:5]}, folder / "a.safetensors")
    index(folder, scale=1.0, progress=False)
    assert [e["non_finite"] for e in entries(folder)] == [2]


def test_what_has_to_be_packed(tmp_path: Path) -> None:
    make_repa(tmp_path / "edm2", moments(mean=EDM2_MEAN, std=EDM2_STD))
    make_lightningdit(tmp_path / "shards")
    make_images(tmp_path / "images")
    make_repa(tmp_path / "fortran", moments())
    make_repa(tmp_path / "long", moments())
    name = "vae-sd/00001/img-mean-std-00000006.npy"
    npy(tmp_path / "fortran" / name, np.asfortranarray(moments()[6]))
    with (tmp_path / "long" / name).open("wb") as file:
        np.lib.format.write_array(file, moments()[6], version=(2, 0))
    data = (tmp_path / "long" / name).read_bytes()
    padded = int.from_bytes(data[8:12], "little") + 64  # a longer header, still a whole file
    body = data[12 : 12 + padded - 64].rstrip() + b" "
    header = body.ljust(padded - 1) + b"\n"
    (tmp_path / "long" / name).write_bytes(data[:8] + padded.to_bytes(4, "little") + header + data[-512:])
    for folder, message in {
        "edm2": "form 'edm2' is normalised by channel, .*use 'lsep data pack'",
        "shards": "latents_stats.pt: mean and std differ between channels, .*use 'lsep data pack'",
        "images": "form 'imagefolder' holds no latents",
        "fortran": "00000006.npy: values in Fortran order",
        "long": "00000006.npy: values at byte 192 of 704, expected 128 of 640",
    }.items():
        with pytest.raises(UserError, match=message):
            index(tmp_path / folder, progress=False)
        assert not (tmp_path / folder / "manifest.json").exists()
    for folder in ("fortran", "long"):
        np.testing.assert_array_equal(open_form(tmp_path / folder).read(0, ROWS).x, moments())


def test_files_outside_the_folder_and_foreign_manifests_are_refused(tmp_path: Path) -> None:
    make_repa(tmp_path / "real", moments())
    (tmp_path / "set").mkdir()
    (tmp_path / "set/vae-sd").symlink_to(tmp_path / "real/vae-sd")
    with pytest.raises(UserError, match="leaves the store's folder"):
        index(tmp_path / "set", progress=False)
    (tmp_path / "real/manifest.json").write_text('{"name": "my web page"}')
    with pytest.raises(UserError, match="manifest.json: a file of another program"):
        index(tmp_path / "real", progress=False)
    assert "my web page" in (tmp_path / "real/manifest.json").read_text()
