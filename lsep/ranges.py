"""Named ranges of a step, for profilers: `lsep.profile` switches them on, everywhere else they are nothing.

Eager code marks its rooms with `with span("attention"):`. A span becomes a range of torch's profiler and, on a GPU, an
NVTX range that Nsight Systems and Nsight Compute show and filter by. Inside `torch.compile` it is always nothing: the
graph stays one, has no guard on the switch, and is the same with and without a profiler.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.compiler import is_compiling

_NOTHING = nullcontext()
_recording = _nvtx = False


def span(name: str, index: int | None = None) -> AbstractContextManager[None]:
    """The range `name`, or `name index`, around a with-block."""
    # is_compiling comes first: Dynamo folds it, and never sees the switch.
    if is_compiling() or not _recording:
        return _NOTHING
    return _range(name if index is None else f"{name} {index}")


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Spans are ranges inside this block."""
    global _recording, _nvtx
    before = _recording, _nvtx
    _recording, _nvtx = True, device.type == "cuda"
    try:
        yield
    finally:
        _recording, _nvtx = before


@contextmanager
def _range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name):
        if _nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if _nvtx:
                torch.cuda.nvtx.range_pop()
