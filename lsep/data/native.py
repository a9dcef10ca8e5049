"""The C function of csrc/rows.c, when it was built: a whole batch is read and checked outside the interpreter's lock.

`pip install` builds it where a C compiler is found and goes on without where none is; `store` does the same in Python.
"""

import ctypes
import importlib.util
import os
from functools import cache

import numpy as np

_REASONS = {
    1: lambda found, size, crc: f"cannot be opened ({os.strerror(found)})",
    2: lambda found, size, crc: f"is truncated, {found} of {size} bytes found",
    3: lambda found, size, crc: f"is damaged, crc32 {found:08x} found and {crc:08x} expected",
    4: lambda found, size, crc: "holds a value that is not finite",
}


@cache
def library() -> ctypes.CDLL | None:
    """The built library, or None; LSEP_NATIVE=0 leaves it aside."""
    spec = importlib.util.find_spec("lsep._rows")
    if spec is None or spec.origin is None or os.environ.get("LSEP_NATIVE") == "0":
        return None
    try:
        found = ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None
    found.lsep_read_rows.restype = ctypes.c_int64
    found.lsep_crc32.restype = ctypes.c_uint32
    return found


def read_rows(
    fds: np.ndarray,
    paths: list[bytes] | None,
    offsets: np.ndarray,
    sizes: np.ndarray,
    out: np.ndarray,
    crc: np.ndarray | None,
) -> tuple[int, str] | None:
    """Fill `out` `(N, ...)`: row i from `offsets[i]` of `fds[i]`, or of `paths[i]` where the descriptor is -1.

    fds int32, offsets int64, sizes int64 (what a file of `paths` must have), crc uint32 `(N,)` or None. Returns the
    first bad row with what is wrong, or None; a value that is not finite is wrong.
    """
    lib = library()
    assert lib is not None and out.flags.c_contiguous
    size = out.nbytes // len(out)
    names = None if paths is None else (ctypes.c_char_p * len(paths))(*paths)
    reason, found = ctypes.c_int32(), ctypes.c_int64()
    bad = lib.lsep_read_rows(
        _pointer(fds), names, _pointer(offsets), _pointer(sizes), ctypes.c_int64(len(out)), ctypes.c_int64(size),
        _pointer(out), None if crc is None else _pointer(crc), ctypes.c_int32(out.itemsize),
        ctypes.byref(reason), ctypes.byref(found),
    )  # fmt: skip
    if bad == len(out):
        return None
    if reason.value == 5:
        return bad, f"has {found.value} bytes, expected a file of {int(sizes[bad])}"
    return bad, _REASONS[reason.value](found.value, size, 0 if crc is None else int(crc[bad]))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
