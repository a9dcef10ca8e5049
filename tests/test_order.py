"""The order of samples is a pure function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsep.data.order import batch_ids, following, mirrored, permutation, steps_per_epoch


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


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(8, 300),
    per_shard=st.integers(1, 4),
    cut=st.integers(0, 40),
    worlds=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_number_of_ranks_sees_the_same_global_batches(
    rows: int, per_shard: int, cut: int, worlds: tuple[int, int], seed: int
) -> None:
    """A run on one number of ranks, cut at any step and resumed on another, across epoch ends."""
    batch = 8 * per_shard
    if batch > rows:
        return
    for step in range(41):
        world = worlds[0] if step < cut else worlds[1]
        dealt = [batch_ids(step, rows, batch, seed, rank, world) for rank in range(world)]
        together = np.stack(dealt, 1).ravel()
        assert together.tolist() == batch_ids(step, rows, batch, seed).tolist()


def test_flips_are_fair_and_belong_to_the_epoch() -> None:
    a, b = mirrored(20_000, 3, 0), mirrored(20_000, 3, 1)
    assert abs(a.mean() - 0.5) < 4 * 0.5 / 20_000**0.5
    assert abs((a == b).mean() - 0.5) < 4 * 0.5 / 20_000**0.5


def test_following_goes_round() -> None:
    order = permutation(50, 1, 2).tolist()
    assert list(following(order[48], 50, 1, 2)) == [order[49], *order[:48]]
