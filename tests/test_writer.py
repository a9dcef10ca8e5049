"""Writing a store: whole shards, resumable, the same bytes whatever happened on the way."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsep.data.manifest import Ids
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build, write_store
from lsep.errors import UserError

SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_writer import Counting
from lsep.data.writer import build
build(Counting(pause=float(sys.argv[2])), Path(sys.argv[1]), 10, int(sys.argv[3]), int(sys.argv[4]), progress=False)
"""


class Counting:
    """64 rows with their own number in them, mirror images and paths."""

    header = Header("samples", (1, 8, 8), "float32", 5, class_names=tuple("abcde"), flips=True)
    rows = 64

    def __init__(self, pause: float = 0.0, fail_at: int | None = None) -> None:
        self.pause, self.fail_at = pause, fail_at

    def read(self, start: int, stop: int) -> Block:
        time.sleep(self.pause)
        if self.fail_at is not None and start >= self.fail_at:
            raise KeyboardInterrupt
        y: Ids = np.arange(start, stop)
        x = np.repeat(y.astype(np.float32), 64).reshape(-1, 1, 8, 8)
        return Block(x, y % 5, flip=-x, paths=[f"a/{i}.png" for i in y])


def command(out: Path, pause: float, rank: int = 0, world: int = 1) -> list[str]:
    code = SLOW.format(tests=str(Path(__file__).parent))
    return [sys.executable, "-c", code, str(out), str(pause), str(rank), str(world)]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    build(Counting(), tmp_path / "whole", 10, progress=False)
    return files(tmp_path / "whole")


def test_rows_come_back(tmp_path: Path, whole: dict[str, bytes]) -> None:
    store = Store(tmp_path / "whole")
    ids = np.array([63, 0, 9, 10, 31])
    flips = np.array([True, False, True, False, True])
    rows = store.read(ids, flips)
    assert rows.x[:, 0, 0, 0].tolist() == [-63, 0, -9, 10, -31]
    assert rows.y.tolist() == [3, 0, 4, 0, 1]
    assert store.manifest.flips and store.manifest.class_names == tuple("abcde")


def test_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out, 0.3))
    while not (out / "shard-00001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    (out / ".shard-00002.safetensors.tmp").write_bytes(b"half a shard")  # what a kill in the write itself leaves
    first = (out / "shard-00000.safetensors").stat().st_mtime_ns
    build(Counting(), out, 10, progress=False)
    assert files(out) == whole
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == first


def test_several_processes_write_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "ranks"
    processes = [subprocess.Popen(command(out, 0.0, rank, 3)) for rank in range(3)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0, 0]
    assert files(out) == whole


def test_full_disk_keeps_the_shards_before(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "full"
    limited = subprocess.run(
        command(out, 0.0),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    assert limited.returncode != 0
    assert "shard-00000.safetensors: the shard could not be written (" in limited.stderr
    assert "File too large" in limited.stderr and not list(out.glob(".*"))
    assert sorted(files(out)) == ["build.json"]
    build(Counting(), out, 10, progress=False)
    assert files(out) == whole


def test_a_folder_in_use_is_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match="holds a finished store already"):
        build(Counting(), tmp_path / "whole", 10, progress=False)
    build(Counting(), tmp_path / "whole", 10, rank=1, world=2, progress=False)  # rank 0 was faster
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and no unfinished build"):
        build(Counting(), tmp_path / "thesis", 10, progress=False)
    with pytest.raises(KeyboardInterrupt):
        build(Counting(fail_at=20), tmp_path / "other", 10, progress=False)
    with pytest.raises(UserError, match="holds an unfinished build of something else"):
        build(Counting(), tmp_path / "other", 20, progress=False)


def test_another_source_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(Counting(fail_at=20), tmp_path / "s", 10, progress=False, identity="a")
    with pytest.raises(UserError, match="holds an unfinished build of something else"):
        build(Counting(), tmp_path / "s", 10, progress=False, identity="b")


def test_what_no_store_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    x, y = np.zeros((3, 1, 2, 2)), np.zeros(3, int)
    with pytest.raises(UserError, match="samples of type float64, expected uint8 for pixels, float32 or float16"):
        write_store(tmp_path / "s", kind="samples", x=x, y=y, num_classes=1)
    with pytest.raises(UserError, match="y has 2 rows, expected 3 as x"):
        write_store(tmp_path / "s", kind="samples", x=x.astype(np.float32), y=y[:2], num_classes=1)
    assert not (tmp_path / "s").exists()


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    x = np.zeros((3, 1, 2, 2), np.float32)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: labels of row 2 is 7, expected from 0 to 6"):
        write_store(tmp_path / "s", kind="samples", x=x, y=np.array([0, 6, 7]), num_classes=7)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_read_only_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build(Counting(), tmp_path / "file" / "store", 10, progress=False)
