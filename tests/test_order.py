"""The order of samples is a pure function of (seed, step)."""

import numpy as np
import pytest

from lsep.data.order import batch_ids, permutation, steps_per_epoch


@pytest.mark.parametrize("batch", [1, 7, 10, 43])
def test_every_epoch_visits_each_id_once_less_the_tail(batch: int) -> None:
    steps = steps_per_epoch(43, batch)
    for epoch in range(3):
        ids = np.concatenate([batch_ids(epoch * steps + s, 43, batch, seed=1) for s in range(steps)])
        assert len(set(ids.tolist())) == len(ids) == steps * batch
        assert set(ids.tolist()) <= set(range(43))


def test_epochs_and_seeds_differ() -> None:
    orders = [permutation(50, seed, epoch).tolist() for seed in (0, 1, 2**63 + 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 6


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_make_up_the_global_batch(shards: int) -> None:
    for step in (0, 3, 4, 11):
        whole = batch_ids(step, 53, 12, seed=0)
        dealt = [batch_ids(step, 53, 12, 0, i, shards) for i in range(shards)]
        assert [dealt[g % shards][g // shards] for g in range(12)] == whole.tolist()
