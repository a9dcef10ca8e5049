"""The branch plan: counts and weights for every batch size, e and shard."""

import pytest
from conftest import tiny

from lsep.errors import UserError
from lsep.plan import BranchPlan, branch_plan

FRACTIONS = (0.0, 0.1, 0.2, 0.5, None)  # None is rho - p


def plans(shards: int, **changes: object) -> list[BranchPlan]:
    return [branch_plan(tiny(**changes), i, shards) for i in range(shards)]


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("e", FRACTIONS)
@pytest.mark.parametrize(("p", "rho"), [(0.1, 0.9), (0.15, 0.7), (0.0, 0.5)])
def test_weights_sum_to_rho_and_the_rest(p: float, rho: float, e: float | None, shards: int) -> None:
    tried = 0
    for batch in range(shards, 50 * shards + 1, shards):
        try:
            dealt = plans(
                shards, train__batch_size=batch, probe__extra_fraction=e, probe__rho=rho, model__class_dropout_prob=p
            )
        except UserError:  # rounding leaves no sample of one kind
            assert batch < 11 or e == p == 0
            continue
        tried += 1
        null = sum(q.null_weight * (q.null + q.extra) for q in dealt) / shards
        labelled = sum(q.labelled_weight * (q.batch - q.null - q.extra) for q in dealt) / shards
        assert null == pytest.approx(rho, rel=1e-12)
        assert labelled == pytest.approx(1 - rho, rel=1e-12)
    assert tried >= 40 or e == p == 0


@pytest.mark.parametrize("e", FRACTIONS)
def test_global_counts_are_right_to_half_a_sample(e: float | None) -> None:
    for batch in range(10, 600):
        plan = branch_plan(tiny(train__batch_size=batch, probe__extra_fraction=e))
        assert abs(plan.null - 0.1 * batch) <= 0.5 + 1e-9
        assert abs(plan.null + plan.extra - (0.1 + (0.8 if e is None else e)) * batch) <= 0.5 + 1e-9
        assert plan.batch == batch


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_are_the_global_batch_dealt_out(shards: int) -> None:
    """Every sample has the same label states and the same weight on any number of shards."""
    for batch in (8 * 3, 48, 240):
        whole = branch_plan(tiny(train__batch_size=batch, probe__extra_fraction=0.4))

        def states(plan: BranchPlan, scale: float) -> list[tuple[bool, bool, float]]:
            last = plan.batch - plan.extra
            weight = [
                plan.null_weight if i < plan.null or i >= last else plan.labelled_weight for i in range(plan.batch)
            ]
            return [(i < plan.null, i >= last, pytest.approx(w / scale)) for i, w in enumerate(weight)]  # type: ignore[misc]

        truth = states(whole, 1)
        for shard, plan in enumerate(plans(shards, train__batch_size=batch, probe__extra_fraction=0.4)):
            assert states(plan, shards) == truth[shard::shards]


def test_no_extra_rows_without_extra_fraction() -> None:
    for batch in range(5, 300):
        assert branch_plan(tiny(train__batch_size=batch, probe__extra_fraction=0.0)).extra == 0


def test_paper_size() -> None:
    plan = branch_plan(tiny(train__batch_size=256))
    assert (plan.null, plan.extra) == (26, 204)  # 25.6 and 230.4 - 26


def test_paper_plan_runs_every_sample_twice() -> None:
    plan = branch_plan(tiny(probe__branch="paper"))
    assert (plan.null, plan.extra, plan.paper) == (0, 10, True)
    assert plan.null_weight == plan.labelled_weight == 0.1


@pytest.mark.parametrize("changes", [{"probe__enabled": False}, {}])
def test_plan_without_probe(changes: dict) -> None:
    plan = branch_plan(tiny(**changes), probe=False)
    assert (plan.null, plan.extra, plan.probe) == (1, 0, False)


def test_unconditional_model_needs_no_second_pass() -> None:
    plan = branch_plan(tiny(model__conditional=False))
    assert (plan.null, plan.extra, plan.null_weight) == (10, 0, 0.1)


def test_rho_of_one_and_of_zero() -> None:
    plan = branch_plan(tiny(probe__rho=1.0, probe__extra_fraction=0.2))
    assert plan.labelled_weight == 0
    assert plan.null_weight * (plan.null + plan.extra) == pytest.approx(1)
    plan = branch_plan(tiny(probe__rho=0.0, model__class_dropout_prob=0.0))
    assert (plan.null_weight, plan.labelled_weight) == (0, 0.1)


def test_small_batches() -> None:
    plan = branch_plan(tiny(train__batch_size=2))
    assert (plan.null, plan.extra, plan.labelled_weight) == (0, 1, pytest.approx(0.1))
    with pytest.raises(UserError, match="--train.batch-size 4 leaves no unlabelled sample"):
        branch_plan(tiny(train__batch_size=4, probe__extra_fraction=0.0))
    with pytest.raises(UserError, match="--train.batch-size 1 leaves no unlabelled sample"):
        branch_plan(tiny(train__batch_size=1))
