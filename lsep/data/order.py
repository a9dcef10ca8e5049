"""Which sample comes when: a pure function of (seed, step), so the loader's whole state is the step.

Every epoch is a full permutation; the tail that does not fill a batch is left out. A global batch is dealt to `shards`
(devices times micro-batches) like cards, position g to shard g mod shards: it is the same for any number of them.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from lsep.data.manifest import Flips, Ids


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return rows // batch_size


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 0, stream]))


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Ids:
    """The epoch's order of all ids `(rows,)`."""
    return _generator(seed, epoch, 0).permutation(rows)


@lru_cache(maxsize=2)
def mirrored(rows: int, seed: int, epoch: int) -> Flips:
    """Which ids are mirrored in this epoch `(rows,)`, each with probability 1/2."""
    return _generator(seed, epoch, 1).integers(0, 2, rows, dtype=np.uint8).astype(bool)


def batch_ids(step: int, rows: int, batch_size: int, seed: int, shard: int = 0, shards: int = 1) -> Ids:
    """Sample ids of one shard of the global batch of `step` (counted from 0)."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch_size))
    ids = permutation(rows, seed, epoch)[within * batch_size : (within + 1) * batch_size]
    return ids[shard::shards].astype(np.int64)


def following(sample: int, rows: int, seed: int, epoch: int) -> Iterator[int]:
    """The other ids after `sample` in the epoch's order, the first after the last."""
    order = permutation(rows, seed, epoch)
    place = int(np.flatnonzero(order == sample)[0])
    for i in range(1, rows):
        yield int(order[(place + i) % rows])
