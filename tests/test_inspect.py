"""`lsep data check` finds every kind of damage; `info` counts and compares with the scale."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsep.data.inspect import describe, picture, problems
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build, write_store


class Named:
    """20 samples whose path column is given."""

    header = Header("samples", (2, 4, 4), "float32", 3, scale=0.5)
    rows = 20

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def read(self, start: int, stop: int) -> Block:
        x = np.random.default_rng(0).normal(size=(20, 2, 4, 4)).astype(np.float32) * 2
        return Block(x[start:stop], np.arange(start, stop) % 3, paths=self.paths[start:stop])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    build(Named([f"{i}.png" for i in range(20)]), tmp_path / "s", 8, progress=False)
    return tmp_path / "s"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def found(path: Path) -> list[str]:
    return list(problems(path, progress=False))


def test_a_whole_store_has_none(good: Path) -> None:
    assert found(good) == []


def test_damaged_rows_and_shards_are_all_listed(good: Path) -> None:
    shard = Store(good).shards[1]
    for row in (2, 5):
        overwrite(shard.path, shard.entry.offset + row * 128, b"\xff")
    text = found(good)
    assert len(text) == 3
    assert "shard-00001.safetensors: sha256 is" in text[0]
    assert "row 2 (sample 10) is damaged, crc32" in text[1]
    assert "row 5 (sample 13) is damaged, crc32" in text[2]


def test_missing_shard(good: Path) -> None:
    (good / "shard-00001.safetensors").unlink()
    assert [t for t in found(good) if "shard-00001.safetensors: cannot be read" in t]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    x = np.zeros((5, 1, 2, 2), np.float32)
    x[3, 0, 0, 0] = np.inf
    write_store(tmp_path / "s", kind="samples", x=x, y=np.zeros(5, int), num_classes=1)
    assert [t.split(": ")[1] for t in found(tmp_path / "s")] == ["row 3 (sample 3) holds a value that is not finite"]


def test_doubled_paths(tmp_path: Path) -> None:
    build(Named([f"{i % 19}.png" for i in range(20)]), tmp_path / "s", 8, progress=False)
    (text,) = found(tmp_path / "s")
    assert "shard-00002.safetensors: row 3 is '0.png', which" in text and "shard-00000.safetensors row 0 holds" in text


def test_labels_edited_by_hand(good: Path) -> None:
    file = good / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_classes": 2}))
    assert any("labels of row 2 is 2, expected from 0 to 1" in t for t in found(good))


def test_description(good: Path) -> None:
    text = describe(str(good))
    assert "20 samples of 2 x 4 x 4, float32, 3 shards" in text
    assert "3 classes of 6 to 7 rows, 0 without any" in text and "  0: 7" in text
    x = Store(good).read(np.arange(20)).x * 0.5
    assert f"channel 1: mean {x[:, 1].mean():+.3f}, std {x[:, 1].std():.3f}" in text
    assert "right?" not in text


def test_statistics_of_moments_and_a_wrong_scale(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.normal(size=(50, 1, 8, 8)) * 3, np.full((50, 1, 8, 8), 4.0)], 1).astype(np.float32)
    write_store(tmp_path / "a", kind="moments", x=moments, y=np.zeros(50, int), num_classes=1, scale=0.2)
    assert "std 1.00" in describe(str(tmp_path / "a"))  # 0.2 sqrt(3^2 + 4^2)
    write_store(tmp_path / "b", kind="moments", x=moments, y=np.zeros(50, int), num_classes=1, scale=1.0)
    assert "where the scale should bring about 1: is 1 right?" in describe(str(tmp_path / "b"))


def test_picture(good: Path, tmp_path: Path) -> None:
    picture(str(good), tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (4 * 5 * 12, 4 * 5 * 12)
