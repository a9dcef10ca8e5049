"""The store: what was written comes back; what is damaged is named."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsep.data.shards import header
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


def shards(store: Path, **changes: object) -> None:
    """Change fields of the first shard's entry."""
    first, *rest = json.loads((store / "manifest.json").read_text())["shards"]
    edit(store, shards=[{**first, **changes}, *rest])


def without(store: Path, name: str) -> None:
    file = store / "manifest.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda s: (s / "manifest.json").unlink(), "no manifest.json there, expected a store or 'digits'"),
        (lambda s: (s / "manifest.json").write_text("{"), "manifest.json: cannot be read as JSON"),
        (lambda s: (s / "manifest.json").write_text("[1]"), "not the manifest of a store, expected 'format'"),
        (lambda s: edit(s, version=9), "manifest.json: version 9, expected 1"),
        (lambda s: edit(s, kind="videos"), "kind is 'videos', expected moments or samples or pixels"),
        (
            lambda s: edit(s, dtype="uint8"),
            "dtype is 'uint8', expected uint8 for pixels, float32 or float16 for latents",
        ),
        (lambda s: without(s, "scale"), "scale is None, expected a finite number"),
        (lambda s: edit(s, num_classes=0), "num_classes is 0, expected a count"),
        (lambda s: edit(s, shape=[4, 8]), "shape is [4, 8], expected three counts C, H, W"),
        (lambda s: edit(s, shape=[3, 4, 8]), "shard-00000.safetensors: float32 (16, 6, 8, 8) at offset"),
        (lambda s: edit(s, shape=[3, 4096, 4096]), "16 rows do not fit the"),
        (lambda s: edit(s, dtype="float16"), "float32 (16, 6, 8, 8) at offset 536, expected float16 (16, 6, 8, 8)"),
        (lambda s: edit(s, shards=[]), "'shards' is [], expected a list of at least one"),
        (lambda s: edit(s, shards=[{"file": "x"}]), "a shard is {'file': 'x'}, expected an object with file, rows"),
        (lambda s: shards(s, file="../x.safetensors"), "path '../x.safetensors' leaves the store's folder"),
        (lambda s: shards(s, file="a\nb"), r"a shard's file is 'a\nb', expected text in one line"),
        (lambda s: shards(s, columns="/etc/passwd"), "path '/etc/passwd' leaves the store's folder"),
        (lambda s: shards(s, rows=17), "17 rows do not fit the 25176 bytes of shard 'shard-00000.safetensors'"),
        (lambda s: shards(s, rows=15), "shard-00000.safetensors: labels is int64 (16,), expected int64 (15,)"),
        (lambda s: shards(s, rows=-1), "rows of shard 'shard-00000.safetensors' is -1, expected a count"),
        (lambda s: shards(s, offset=16), "shard-00000.safetensors: no tensor at offset 16"),
        (lambda s: shards(s, bytes=10**9), "shard-00000.safetensors: truncated or changed,"),
        (lambda s: shards(s, layout="tar"), "layout of shard 'shard-00000.safetensors' is 'tar'"),
        (lambda s: shard(s, 1).unlink(), "shard-00001.safetensors: cannot be read (No such file"),
        (lambda s: os.truncate(shard(s, 2), 3000), "shard-00002.safetensors: truncated, 3000 bytes found and"),
        (lambda s: os.truncate(shard(s), 20), "shard-00000.safetensors: not a safetensors file, or truncated"),
        (lambda s: shard(s).write_bytes(b"\x10" + bytes(7) + b"this is no JSON!" + bytes(99)), "JSONDecodeError"),
        (lambda s: edit(s, num_classes=2), "expected from 0 to 1 by the manifest"),
    ],
)
def test_damage_is_named(store: Path, how: Callable[[Path], object], message: str) -> None:
    how(store)
    with pytest.raises(UserError) as caught:
        Store(store)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_label_is_found_though_it_is_in_range(store: Path) -> None:
    column = header(shard(store, 1))["labels"]
    label = int(Store(store).shards[1].labels[3])
    with shard(store, 1).open("r+b") as file:
        file.seek(column.start + 3 * 8)
        file.write(bytes([(label + 1) % 5]))
    with pytest.raises(UserError, match="shard-00001.safetensors: labels or checksums are damaged"):
        Store(store)


def test_a_count_of_non_finite_rows_is_not_believed(tmp_path: Path) -> None:
    x = np.full((4, 1, 2, 2), np.nan, np.float32)
    write_store(tmp_path / "s", kind="samples", x=x, y=np.zeros(4, int), num_classes=1)
    shards(tmp_path / "s", non_finite=0)
    with pytest.raises(UserError, match="row 2 .sample 2. holds a value that is not finite"):
        Store(tmp_path / "s").read(np.array([2]))


def test_a_list_of_absolute_paths_is_refused(store: Path) -> None:
    size = 128 + 6 * 8 * 8 * 4
    (store / "list.txt").write_text("/etc/hostname\n" * 16)
    shards(store, layout="files", file="list.txt", bytes=size, offset=128)
    with pytest.raises(UserError, match="list.txt: lists an absolute path"):
        Store(store)


def test_a_link_that_leads_out_is_refused(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shard(store).rename(outside)
    shard(store).symlink_to(outside)
    with pytest.raises(UserError, match="leaves the store's folder"):
        Store(store)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_ends_in_our_error_or_opens(store: Path, data: st.DataObject) -> None:
    """Fields of a good manifest replaced by anything JSON can say."""
    file = store / "manifest.json"
    if not (store / "good").exists():
        (store / "good").write_bytes(file.read_bytes())
    value = json.loads((store / "good").read_text())
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    target = data.draw(st.sampled_from([value, value["shards"][0], value["shards"][2]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(anything)
    file.write_text(json.dumps(value))
    with contextlib.suppress(UserError):
        Store(store).read(np.arange(3))


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 700), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 20_000))
def test_any_shard_header_ends_in_our_error_or_opens(store: Path, place: int, byte: int, cut: int | None) -> None:
    good = store / "good"
    if not good.exists():
        good.write_bytes(shard(store).read_bytes())
    changed = bytearray(good.read_bytes())
    changed[place] = byte
    shard(store).write_bytes(changed if cut is None else changed[:cut])
    with contextlib.suppress(UserError):
        Store(store).read(np.arange(16))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 60), shard_rows=st.integers(1, 70), flips=st.booleans(), seed=st.integers(0, 99))
def test_any_cut_into_shards_gives_the_same_rows(rows: int, shard_rows: int, flips: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 2, 3, 3)).astype(np.float16), rng.integers(4, size=rows)
    with tempfile.TemporaryDirectory() as folder:
        mirror = x[..., ::-1].copy() if flips else None
        write_store(
            Path(folder) / "s", kind="samples", x=x, y=y, flip=mirror, num_classes=4, shard_rows=shard_rows
        )  # fmt: skip
        store = Store(Path(folder) / "s")
        assert len(store.shards) == -(-rows // shard_rows)
        ids = rng.permutation(rows)
        flip = rng.integers(0, 2, rows).astype(bool) & flips
        got = store.read(ids, flip if flips else None)
        truth = np.where(flip[:, None, None, None], x[ids][..., ::-1], x[ids])
        np.testing.assert_array_equal(got.x, truth)
        np.testing.assert_array_equal(got.y, y[ids])


def test_truncation_under_an_open_store_names_row_and_sample(store: Path) -> None:
    opened = Store(store)
    os.truncate(shard(store, 1), 5000)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: row 14 \(sample 30\) is truncated"):
        opened.read(np.array([0, 30]))
