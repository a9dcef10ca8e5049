import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from lsep.data import stage as stage_module
from lsep.data.shards import columns_crc32
from lsep.data.stage import stage
from lsep.data.store import Store, read_manifest
from lsep.data.writer import Header, write_manifest
from lsep.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the first shard's entry in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A store of layout `files`: five rows in .npy files of two folders."""
    folder = tmp_path / "listed"
    x = np.random.default_rng(1).normal(size=(5, 3, 4, 4)).astype(np.float32)
    names = [f"rows/{i % 2}/img {i}.npy" for i in range(5)]
    for name, row in zip(names, x, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, row)
    (folder / "files.txt").write_text("\n".join(names) + "\n")
    crc = np.array([zlib.crc32(row.tobytes()) for row in x], np.uint32)
    save_file({"labels": np.arange(5) % 2, "crc32": crc}, folder / "columns.safetensors")
    size = (folder / names[0]).stat().st_size
    entry = {
        "file": "files.txt", "rows": 5, "layout": "files", "offset": size - x[0].nbytes, "flip_offset": None,
        "bytes": size, "sha256": hashlib.sha256((folder / "files.txt").read_bytes()).hexdigest(),
        "columns": "columns.safetensors", "non_finite": 0,
        "columns_crc32": columns_crc32(folder / "columns.safetensors"),
    }  # fmt: skip
    write_manifest(folder, Header("samples", (3, 4, 4), "float32", 2), [entry])
    return folder


def test_a_staged_store_is_the_same_store(store: Path, tmp_path: Path) -> None:
    stage(f"file://{store}", tmp_path / "copy", progress=False)
    assert contents(tmp_path / "copy") == contents(store)
    ids = np.arange(43)
    np.testing.assert_array_equal(Store(tmp_path / "copy").read(ids).x, Store(store).read(ids).x)


def test_from_an_object_store(store: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in contents(store).items():
        memory.pipe(f"/bucket/{tmp_path.name}/{name}", data)
    stage(f"memory://bucket/{tmp_path.name}/", tmp_path / "copy", progress=False)
    assert contents(tmp_path / "copy") == contents(store)
    memory.rm(f"/bucket/{tmp_path.name}", recursive=True)


def test_a_store_of_listed_files(listed: Path, tmp_path: Path) -> None:
    stage(str(listed), tmp_path / "copy", progress=False)
    assert contents(tmp_path / "copy") == contents(listed)
    assert len(Store(tmp_path / "copy").read(np.arange(5)).x) == 5


def test_goes_on_after_a_partial_copy(store: Path, tmp_path: Path) -> None:
    """The whole shard stays as it is; one cut short, one with a flipped bit and a leftover temporary are put right."""
    copy = tmp_path / "copy"
    stage(str(store), copy, progress=False)
    entries = read_manifest(store)[1]
    whole, cut, flipped = (copy / e.file for e in entries)
    (copy / "manifest.json").unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    (copy / f".{cut.name}.part").write_bytes(b"left by a killed run")
    before = whole.stat().st_ino, whole.stat().st_mtime_ns
    stage(str(store), copy, progress=False)
    assert contents(copy) == contents(store)
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == before


def test_a_flipped_bit_at_the_source(store: Path, tmp_path: Path) -> None:
    entry = read_manifest(store)[1][1]
    data = bytearray((store / entry.file).read_bytes())
    data[len(data) // 2] ^= 1
    (store / entry.file).write_bytes(data)
    with pytest.raises(UserError, match=f"{entry.file}: sha256 [0-9a-f]{{64}} found and {entry.sha256} expected"):
        stage(str(store), tmp_path / "copy", progress=False)
    names = set(contents(tmp_path / "copy"))
    assert entry.file not in names and "manifest.json" not in names
    assert not [n for n in names if n.endswith(".part")]


def test_a_flipped_bit_in_a_listed_file(listed: Path, tmp_path: Path) -> None:
    victim = listed / "rows/1/img 3.npy"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=r"rows/1/img 3.npy: crc32 [0-9a-f]{8} of its row found and [0-9a-f]{8} exp"):
        stage(str(listed), tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert not (tmp_path / "copy" / "rows/1/img 3.npy").exists()
    victim.write_bytes(bytes(data[:-8]))
    with pytest.raises(UserError, match=f"{len(data) - 8} bytes found and {len(data)} expected"):
        stage(str(listed), tmp_path / "copy", progress=False)


@pytest.mark.parametrize("field", ["file", "columns"])
@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "x/../../secret", "a/../shard-00000.safetensors", "."])
def test_paths_that_leave_the_folder(field: str, name: str, store: Path, tmp_path: Path) -> None:
    edit(store, **{field: name})
    with pytest.raises(UserError, match="leaves the store's folder"):
        stage(str(store), tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy").exists()


def test_links_that_leave_the_folder(store: Path, tmp_path: Path) -> None:
    """At the source, where they would leak a file, and at the target, where they would overwrite one."""
    (tmp_path / "outside").mkdir()
    name = read_manifest(store)[1][0].file
    (store / "sub").symlink_to(tmp_path / "outside")
    (store / name).rename(tmp_path / "outside" / name)
    edit(store, file=f"sub/{name}", columns=f"sub/{name}")
    with pytest.raises(UserError, match="leaves the store's folder"):
        stage(str(store), tmp_path / "copy", progress=False)

    (store / "sub").unlink()
    (store / "sub").mkdir()
    (tmp_path / "outside" / name).rename(store / "sub" / name)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leaves the store's folder"):
        stage(str(store), tmp_path / "copy", progress=False)
    assert not list((tmp_path / "outside").iterdir())


def test_a_list_that_leaves_the_folder(listed: Path, tmp_path: Path) -> None:
    text = (listed / "files.txt").read_text().replace("rows/0/img 2.npy", "rows/../../secret.npy")
    (listed / "files.txt").write_text(text)
    edit(listed, sha256=hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(UserError, match=r"rows/../../secret.npy.* leaves the store's folder"):
        stage(str(listed), tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_another_store_is_not_overwritten(store: Path, listed: Path) -> None:
    before = contents(listed)
    with pytest.raises(UserError, match="of another store"):
        stage(str(store), listed, progress=False)
    assert contents(listed) == before


def test_missing_things_are_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/manifest.json: cannot be read"):
        stage(str(tmp_path / "nowhere"), tmp_path / "copy", progress=False)
    with pytest.raises(UserError, match="nosuch://x: cannot be opened"):
        stage("nosuch://x", tmp_path / "copy", progress=False)
    name = read_manifest(store)[1][2].file
    (store / name).unlink()
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        stage(str(store), tmp_path / "copy", progress=False)
    (store / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=f"^{store}/manifest.json: cannot be read as JSON"):
        stage(str(store), tmp_path / "copy", progress=False)


def test_a_folder_that_cannot_be_written(store: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("a file")
    with pytest.raises(UserError, match="copy: cannot be made"):
        stage(str(store), tmp_path / "copy", progress=False)


def test_a_full_disk(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = read_manifest(store)[1][0].file

    read = stage_module._sums

    def full(chunks: Iterable[bytes], item: stage_module.Item, sink: IO[Any] | None = None) -> stage_module.Sums:
        if item.name != name:
            return read(chunks, item, sink)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage_module, "_sums", full)
    with pytest.raises(UserError, match=f"{name}: cannot be written .No space left"):
        stage(str(store), tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_link_under_the_temporary_name_is_not_written_through(store: Path, tmp_path: Path) -> None:
    name = read_manifest(store)[1][0].file
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / f".{name}.part").symlink_to(tmp_path / "precious")
    stage(str(store), tmp_path / "copy", progress=False)
    assert (tmp_path / "precious").read_text() == "precious"
    assert contents(tmp_path / "copy") == contents(store)
