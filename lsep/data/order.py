"""Which sample comes when: a pure function of (seed, step), so the loader's whole state is the step.

Every epoch is a full permutation; the tail that does not fill a batch is left out. A global batch is dealt to `shards`
(devices times micro-batches) like cards, position g to shard g mod shards: it is the same for any number of them.
"""

from functools import lru_cache

import numpy as np

from lsep.data.manifest import Ids


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return rows // batch_size


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Ids:
    """The epoch's order of all ids `(rows,)`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(rows)


def batch_ids(step: int, rows: int, batch_size: int, seed: int, shard: int = 0, shards: int = 1) -> Ids:
    """Sample ids of one shard of the global batch of `step` (counted from 0)."""
    epoch, within = divmod(step, steps_per_epoch(rows, batch_size))
    ids = permutation(rows, seed, epoch)[within * batch_size : (within + 1) * batch_size]
    return ids[shard::shards].astype(np.int64)
