"""The store: what was written comes back; what is damaged is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lsep.data.store import Store
from lsep.data.writer import write_store
from lsep.errors import UserError


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_across_shards(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(37, 8, 4, 4)).astype(dtype), rng.integers(9, size=37), rng.integers(4, size=37)
    write_store(tmp_path, kind="moments", x=x, y=y, num_classes=9, probe_y=z, probe_classes=4, scale=0.2, shard_rows=10)
    store = Store(tmp_path)
    m = store.manifest
    assert (m.kind, m.shape, m.rows, m.num_classes, m.probe_classes, m.scale) == ("moments", (4, 4, 4), 37, 9, 4, 0.2)
    ids = np.array([36, 0, 9, 10, 29, 30, 3])
    rows = store.read(ids)
    assert rows.x.dtype == dtype
    np.testing.assert_array_equal(rows.x, x[ids])
    np.testing.assert_array_equal(rows.y, y[ids])
    np.testing.assert_array_equal(rows.probe_y, z[ids])


def test_without_a_probe_column_the_probe_reads_the_label(tmp_path: Path) -> None:
    write_store(tmp_path, kind="pixels", x=np.zeros((5, 3, 4, 4), np.uint8), y=np.arange(5), num_classes=6)
    store = Store(tmp_path)
    assert store.manifest.probe_classes == 6
    assert store.read(np.arange(5)).probe_y.tolist() == [0, 1, 2, 3, 4]


def test_probe_classes_without_a_column(tmp_path: Path) -> None:
    write_store(
        tmp_path, kind="pixels", x=np.zeros((5, 3, 4, 4), np.uint8), y=np.arange(5), num_classes=6, probe_classes=3
    )
    with pytest.raises(
        UserError, match="probe_classes is 3 and the shards hold no 'probe_labels', expected num_classes, 6"
    ):
        Store(tmp_path)


def edit(store: Path, **changes: object) -> None:
    file = store / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shard(store: Path, i: int = 0) -> Path:
    return store / f"shard-{i:05d}.safetensors"


def damage(store: Path, how: str) -> None:
    if how == "no manifest":
        (store / "manifest.json").unlink()
    elif how == "no JSON":
        (store / "manifest.json").write_text("{")
    elif how == "version":
        edit(store, version=9)
    elif how == "kind":
        edit(store, kind="videos")
    elif how == "no scale":
        manifest = json.loads((store / "manifest.json").read_text())
        del manifest["scale"]
        (store / "manifest.json").write_text(json.dumps(manifest))
    elif how == "shape":
        edit(store, shape=[4, 8, 8])
    elif how == "no shards":
        edit(store, shards=[])
    elif how == "escape":
        edit(store, shards=[{"file": "../other.safetensors", "rows": 3}])
    elif how == "missing shard":
        shard(store, 1).unlink()
    elif how == "truncated":
        os.truncate(shard(store, 2), 3000)
    elif how == "truncated header":
        os.truncate(shard(store), 20)
    elif how == "not safetensors":
        shard(store).write_bytes(b"\x10" + b"\0" * 7 + b"this is no JSON!" + b"x" * 99)
    elif how == "label":
        edit(store, num_classes=2)
    elif how == "rows":
        edit(store, shards=[{"file": "shard-00000.safetensors", "rows": 17}])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no manifest", "no manifest.json there, expected a store or 'digits'"),
        ("no JSON", "manifest.json: cannot be read as JSON"),
        ("version", "manifest.json: version 9, expected 1"),
        ("kind", "manifest.json: kind 'videos', expected 'moments'"),
        ("no scale", "manifest.json: KeyError 'scale'"),
        ("shape", "shard-00000.safetensors: moments has shape (16, 6, 8, 8), expected (16, 8, 8, 8)"),
        ("no shards", "expected at least one shard"),
        ("escape", "'../other.safetensors' leaves the store's folder"),
        ("missing shard", "shard-00001.safetensors: the manifest names this shard, but it cannot be opened"),
        ("truncated", "shard-00002.safetensors: truncated, 3000 bytes found"),
        ("truncated header", "shard-00000.safetensors: not a safetensors file, or truncated"),
        ("not safetensors", "shard-00000.safetensors: expected a safetensors file with a 'moments' tensor"),
        ("label", "expected from 0 to 1 by the manifest"),
        ("rows", "has shape (16, 6, 8, 8), expected (17, 6, 8, 8)"),
    ],
)
def test_damage_is_named(store: Path, how: str, message: str) -> None:
    damage(store, how)
    with pytest.raises(UserError) as caught:
        Store(store)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncation_under_an_open_store_names_row_and_sample(store: Path) -> None:
    opened = Store(store)
    os.truncate(shard(store, 1), 5000)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: row 14 \(sample 30\) is truncated"):
        opened.read(np.array([0, 30]))
