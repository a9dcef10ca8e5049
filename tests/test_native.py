"""csrc/rows.c does what the Python loop does: the same checksums, rows and complaints."""

import ctypes
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from lsep.data.native import library, read_rows
from lsep.data.store import read_rows_in_python

pytestmark = pytest.mark.skipif(library() is None, reason="csrc/rows.c was not built")


def test_crc32_is_zlibs() -> None:
    lib, rng = library(), np.random.default_rng(0)
    assert lib is not None
    for n in [*range(300), 16_383, 16_384, 100_001]:  # every tail of the 64- and 16-byte steps
        data = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
        assert lib.lsep_crc32(data, ctypes.c_int64(n)) == zlib.crc32(data), n


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
@pytest.mark.parametrize(
    "how", ["whole", "damaged", "truncated", "infinite", "nan", "missing", "directory", "grown", "link"]
)
def test_both_ways_agree(tmp_path: Path, dtype: type, how: str) -> None:
    """Rows 0 to 5 lie in one file, rows 6 and 7 in files of their own."""
    x = np.random.default_rng(0).integers(0, 100, (8, 5, 7)).astype(dtype)
    if how in ("infinite", "nan") and dtype is not np.uint8:
        x[4, 2, 3] = -np.inf if how == "infinite" else np.nan
    size = x[0].nbytes
    (tmp_path / "many").write_bytes(b"head" + x[:6].tobytes())
    for i in (6, 7):
        (tmp_path / f"{i}").write_bytes(b"head" + x[i].tobytes())
    crc = np.array([zlib.crc32(row.tobytes()) for row in x], np.uint32)
    if how == "damaged":
        crc[3] ^= 1
    elif how == "truncated":
        os.truncate(tmp_path / "many", 4 + 5 * size - 1)
    elif how == "grown":
        with (tmp_path / "7").open("ab") as file:
            file.write(b"x")
    elif how in ("missing", "directory", "link"):
        (tmp_path / "7").unlink()
        if how == "link":
            (tmp_path / "7").symlink_to(tmp_path / "6")
        if how == "directory":
            (tmp_path / "7").mkdir()
    paths = [b""] * 6 + [os.fsencode(tmp_path / "6"), os.fsencode(tmp_path / "7")]
    with (tmp_path / "many").open("rb") as file:
        fds = np.array([file.fileno()] * 6 + [-1, -1], np.int32)
        offsets = np.array([4 + i * size for i in range(6)] + [4, 4], np.int64)
        found = []
        for read in (read_rows, read_rows_in_python):
            for sums in (crc, None):
                out = np.zeros_like(x)
                bad = read(fds, paths, offsets, np.full(8, 4 + size), out, sums)
                found.append(bad)
                if bad is None:
                    np.testing.assert_array_equal(out, x)
    assert (found[0] is None) == (found[2] is None) and (found[1] is None) == (found[3] is None)
    assert found[:2] == found[2:]
    expected = {
        "damaged": 3,
        "truncated": 4,
        "missing": 7,
        "directory": 7,
        "grown": 7,
        "link": 7,
        "infinite": 4,
        "nan": 4,
    }.get(how)
    if expected is not None and not (how in ("infinite", "nan") and dtype is np.uint8):
        assert found[0] is not None and found[0][0] == expected
    else:
        assert found[0] is None
