"""All loaders give the batches of `order`, bit for bit; damaged rows are named or replaced alike."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lsep.config import DataConfig
from lsep.data.loader import Loader, choose, has_dali, open_source
from lsep.data.manifest import CorruptRow, Manifest, Rows
from lsep.data.order import batch_ids, following, mirrored
from lsep.data.reader import Sequence
from lsep.data.store import Store
from lsep.data.writer import write_store
from lsep.errors import UserError

CPU = torch.device("cpu")
LOADERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="DALI missing")), "resident"]


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    """45 samples of 2 x 4 x 4 float16 with mirror images, in shards of 10."""
    x = np.random.default_rng(0).normal(size=(45, 2, 4, 4)).astype(np.float16)
    write_store(
        tmp_path / "flipped",
        kind="samples",
        x=x,
        flip=x[..., ::-1].copy(),
        y=np.arange(45) % 7,
        num_classes=7,
        shard_rows=10,
    )
    return tmp_path / "flipped"


def load(path: Path, kind: str, first: int = 0, last: int = 11, accumulate: int = 1, **data: object) -> tuple:
    """All steps' micro-batches, copied, and the number of rows replaced."""
    config = DataConfig(path=str(path), loader=kind, **data)  # type: ignore[arg-type]
    skip = config.on_corrupt == "skip"
    loader = Loader(Sequence(open_source(config), 3, 12, accumulate, first, last, skip), config, CPU)
    return [[tuple(b.clone().tensors()) for b in step] for step in loader], loader.skipped


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 4, 50])
def test_batches_are_those_of_the_order(flipped: Path, kind: str, accumulate: int, prefetch: int) -> None:
    """Eleven steps of three epochs, begun in the middle of one."""
    source = Store(flipped)
    steps, skipped = load(flipped, kind, 2, 13, accumulate, prefetch=prefetch)
    assert len(steps) == 11 and skipped == 0
    for step, batches in enumerate(steps, start=2):
        assert len(batches) == accumulate
        for shard, (x, y, probe_y, ids) in enumerate(batches):
            expected = batch_ids(step, 45, 12, 3, shard, accumulate)
            rows = source.read(expected, mirrored(45, 3, step // 3)[expected])
            assert ids.tolist() == expected.tolist()
            assert x.dtype == torch.float16
            np.testing.assert_array_equal(x.numpy(), rows.x)
            assert y.tolist() == probe_y.tolist() == rows.y.tolist()


@pytest.mark.parametrize("kind", LOADERS)
def test_damage_ends_the_run_or_is_skipped(flipped: Path, kind: str) -> None:
    """One flipped bit in each variant of two rows: raise names the row, skip takes the next in order, all alike."""
    damaged = {4, 23}
    for sample in damaged:
        shard = Store(flipped).shards[sample // 10]
        for base in (shard.entry.offset, shard.entry.flip_offset):
            assert base is not None
            with shard.path.open("r+b") as file:
                file.seek(base + (sample % 10) * 64 + 5)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptRow, match=r"shard-0000[02].safetensors: row [34] \(sample (4|23)\) is damaged, crc32"):
        load(flipped, kind)
    steps, skipped = load(flipped, kind, 0, 9, on_corrupt="skip")
    expected, replaced = [], 0
    for step in range(9):
        ids = []
        for sample in batch_ids(step, 45, 12, 3).tolist():
            replaced += sample in damaged
            ids.append(next(s for s in (sample, *following(sample, 45, 3, step // 3)) if s not in damaged))
        expected.append(ids)
    assert [b[0][3].tolist() for b in steps] == expected
    assert skipped == replaced > 0


def test_unchecked_rows_are_still_tested_for_finite_values(flipped: Path) -> None:
    shard = Store(flipped).shards[1]
    with shard.path.open("r+b") as file:
        file.seek(shard.entry.offset + 64)
        file.write(np.array([np.inf], np.float16).tobytes())
    flips = np.zeros(1, bool)
    with pytest.raises(CorruptRow, match=r"row 1 \(sample 11\) holds a value that is not finite"):
        Store(flipped, check_rows=False).read(np.array([11]), flips)
    with pytest.raises(CorruptRow, match="crc32"):
        Store(flipped).read(np.array([11]), flips)


def test_non_finite_rows_that_were_packed_are_found(tmp_path: Path) -> None:
    x = np.zeros((20, 1, 2, 2), np.float32)
    x[13, 0, 1, 1] = np.nan
    write_store(tmp_path / "s", kind="samples", x=x, y=np.zeros(20, int), num_classes=1, shard_rows=8)
    store = Store(tmp_path / "s")
    assert [e.non_finite for e in store.entries] == [0, 1, 0]
    with pytest.raises(CorruptRow, match=r"row 5 \(sample 13\) holds a value that is not finite"):
        store.read(np.arange(20))


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=LOADERS[1].marks)])  # type: ignore[attr-defined]
@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_a_shard_lost_in_mid_run(flipped: Path, kind: str, how: str) -> None:
    """Truncated: an error that names the row, no SIGBUS. Deleted: the open file goes on, as the system keeps it."""
    config = DataConfig(path=str(flipped), loader=kind, prefetch=1)  # type: ignore[arg-type]
    steps = iter(Loader(Sequence(open_source(config), 0, 12, 1, 0, 200), config, CPU))
    next(steps)
    for shard in flipped.glob("shard-*"):
        os.truncate(shard, 900) if how == "truncate" else shard.unlink()
    if how == "delete":
        assert sum(1 for _ in steps) == 199
        with pytest.raises(UserError, match=r"shard-00000.safetensors: cannot be read"):
            open_source(config)
        return
    with pytest.raises(
        CorruptRow, match=r"shard-0000\d.safetensors: row \d \(sample \d+\) is truncated, \d+ of 64 bytes"
    ):
        list(steps)


class Failing:
    manifest = Manifest("broken", "samples", (1, 2, 2), 40, 2, 2)

    def read(self, ids: np.ndarray, flips: object = None, out: np.ndarray | None = None) -> Rows:
        raise UserError("the disk is on fire")


@pytest.mark.parametrize("kind", LOADERS)
def test_reader_errors_arrive(kind: str) -> None:
    config = DataConfig(loader=kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the disk is on fire"):
        list(Loader(Sequence(Failing(), 0, 4, 1, 0, 10), config, CPU))


def test_all_rows_damaged_is_an_error(flipped: Path) -> None:
    for shard in Store(flipped).shards:
        with shard.path.open("r+b") as file:
            file.seek(shard.entry.offset)
            file.write(bytes(2 * 64 * shard.entry.rows))
    shutil.copytree(flipped, flipped.with_name("copy"))
    for kind in ("torch", "resident"):
        with pytest.raises(UserError, match=r"sample \d+ and the 44 after it in order are damaged"):
            load(flipped, kind, on_corrupt="skip")


def test_open_source() -> None:
    assert open_source(DataConfig(path="digits")).manifest.num_classes == 10
    with pytest.raises(UserError, match="--data.path is missing"):
        open_source(DataConfig())
    with pytest.raises(UserError, match="--data.path /nowhere: no manifest.json there"):
        open_source(DataConfig(path="/nowhere"))


def test_choice(flipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Store(flipped)
    assert choose(DataConfig(), source, CPU) == "resident"
    monkeypatch.setattr("lsep.data.loader._SMALL", 1000)
    assert choose(DataConfig(), source, CPU) == "torch"
    monkeypatch.setattr("lsep.data.loader.has_dali", lambda: False)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        choose(DataConfig(loader="dali"), source, CPU)
