"""From ids to batches on the device: a thread reads ahead, the copy to a GPU is asynchronous.

The loader has no state of its own: batch `step` is a function of (seed, step), see `order`.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lsep.data import order
from lsep.data.digits import Digits
from lsep.data.manifest import Source
from lsep.data.store import Store
from lsep.errors import UserError


class Batch(NamedTuple):
    """A micro-batch on the device: x `(B, *row_shape)`, int64 labels y and probe_y `(B,)`, int64 sample ids `(B,)`."""

    x: Tensor
    y: Tensor
    probe_y: Tensor
    id: Tensor


def open_source(path: str | None) -> Source:
    """The data set at `--data.path`: a store's folder, or `digits`."""
    if path is None:
        raise UserError("--data.path is missing, expected the folder of a store (with manifest.json) or 'digits'")
    if path == "digits":
        return Digits()
    return Store(path)


def steps_of_batches(
    source: Source,
    seed: int,
    batch_size: int,
    accumulate: int,
    first: int,
    last: int,
    device: torch.device,
    prefetch: int,
) -> Iterator[list[Batch]]:
    """For each step from `first` to `last - 1` its micro-batches, read up to `prefetch` steps ahead."""

    def read(step: int) -> list[Batch]:
        batches = []
        for shard in range(accumulate):
            ids = order.batch_ids(step, source.manifest.rows, batch_size, seed, shard, accumulate)
            rows = source.read(ids)
            parts = [torch.from_numpy(a) for a in (*rows, ids)]
            batches.append(Batch(*(p.pin_memory() if device.type == "cuda" else p for p in parts)))
        return batches

    # One thread keeps the order of errors; it is never joined on an error, so a slow read cannot hold up the message.
    pool = ThreadPoolExecutor(1, thread_name_prefix="lsep-loader")
    try:
        ahead: deque[Future[list[Batch]]] = deque(
            pool.submit(read, s) for s in range(first, min(last, first + prefetch))
        )
        for step in range(first, last):
            ready = ahead.popleft().result()
            if step + prefetch < last:
                ahead.append(pool.submit(read, step + prefetch))
            yield [Batch(*(p.to(device, non_blocking=True) for p in batch)) for batch in ready]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
