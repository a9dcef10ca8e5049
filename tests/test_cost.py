"""What a step costs: one list of operations behind every floor, memory beside the allocator's, settings that fit."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MANIFEST, tiny

from bench import memory as bench
from bench.section import Context
from bench.step import floors as bench_floors
from bench.variants import Measured
from lsep import backends
from lsep.checks import resolve
from lsep.config import Config, override
from lsep.cost.cards import CARDS, nearest
from lsep.cost.cluster import Cluster
from lsep.cost.fit import fit, free_of, needed
from lsep.cost.floors import Rates, step_work
from lsep.cost.flops import step_parts, total
from lsep.cost.memory import step_memory, unmodelled
from lsep.cost.operations import ADALN, GELU, Operation, floor, optimizer_bytes, step_operations
from lsep.cost.parameters import parameters
from lsep.cost.step import seconds, step_time
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.presets import PRESETS
from lsep_kernels.limits import Card

ROOT = Path(__file__).parents[1]
HOPPER = Card((9, 0))
H100 = free_of(80 * 2**30)
TABLE = json.loads((ROOT / "bench" / "results" / "memory.json").read_text())
CASES = {row["case"]: row for row in TABLE["cases"]}


def resolved(config: Config) -> Config:
    return override(
        config, {"model.in_channels": 4, "model.num_classes": 1000, "train.precision": "bf16", "probe.window_max": 16}
    )  # fmt: skip


def xl(**changes: Any) -> Config:
    return override(resolved(PRESETS["sit-xl-2-256"]), {k.replace("__", "."): v for k, v in changes.items()})


def memory(config: Config, card: Card = HOPPER, processes: int = 1) -> dict[str, int]:
    choice = backends.decide(config, card, processes)
    return step_memory(config, choice, 1000, config.probe.enabled, processes)


# ---------------------------------------------------------------------------------------------------------------------
# One list of operations


@pytest.mark.parametrize("changes", [
    {}, {"probe__enabled": False}, {"probe__branch": "paper"}, {"probe__pool_before_fc2": False},
    {"probe__extra_fraction": 0.0}, {"optim__accumulate": 2}, {"model__qk_norm": True, "model__mlp_ratio": 2.5},
])  # fmt: skip
def test_operations_have_the_flops_of_the_step(changes: dict[str, Any]) -> None:
    config = resolve(tiny(**changes), MANIFEST)
    found = step_operations(config, 7, count=1000)
    assert sum(o.flops for o in found) == total(step_parts(config, 7)).training
    assert all(o.flops >= 0 and o.bytes > 0 for o in found)


def test_a_floor_is_the_longer_of_bytes_and_flops_and_a_sum_over_operations() -> None:
    rates = Rates(flops=10.0, bytes=2.0)
    assert Operation("", "", "", flops=30, bytes=2).floor(rates) == 3 == floor(2, 30, rates)
    assert Operation("", "", "", flops=30, bytes=8).floor(rates) == 4 == floor(8, 30, rates)
    thrice = Operation("", "", "", flops=30, bytes=8, times=2).often(3)
    assert (thrice.floor(rates), thrice.times) == (12, 6)


def test_all_tables_have_the_same_floor() -> None:
    """`lsep profile`, `bench.step`, `bench.gpu`'s kernels and the scaling model."""
    config = resolve(tiny(train__batch_size=20), MANIFEST)
    channels, side, _ = MANIFEST.shape
    row = 8 * channels * side**2
    rates = Rates(flops=1e12, bytes=1e11)
    rooms = step_work(config, MANIFEST, params=5000, row_bytes=row, probe=True)
    budget = bench_floors(Measured(config, MANIFEST.probe_classes, 5000), rates.bytes, rates.flops)
    of_profile, of_bench = sum(w.seconds(rates) for w in rooms.values()), sum(line["floor ms"] for line in budget)
    assert of_bench / 1e3 == pytest.approx(of_profile)
    context = Context(torch.device("cpu"), smoke=True, seed=0, copy_rate=rates.bytes, matrix_rate=rates.flops)
    assert context.floor(optimizer_bytes(5000), 0) == rooms["optimizer"].seconds(rates)
    from lsep.cost.cluster import step

    assert step(Cluster(), xl(), "ddp", 256, 1, 5000).optimizer == optimizer_bytes(5000) / Cluster().copy_rate


def test_bytes_by_hand() -> None:
    """docs/kernels.md: 20 bytes an element of adaLN's seams, 24 of attention, 10 of the hidden layer."""
    config = xl(probe__enabled=False)
    found = step_operations(config, 1000, 1)
    element = 256 * 256 * 1152
    bytes_of = Counter[str]()
    for operation in found:
        if operation.shape is None:
            bytes_of[operation.kind] += operation.bytes  # type: ignore[assignment]
    assert bytes_of["attention"] == 28 * 24 * element
    assert bytes_of[GELU] == 28 * 10 * 4 * element
    assert bytes_of[ADALN] == (2 * 28 * 20 + 10) * element


@pytest.mark.parametrize("changes", [{}, {"model__qk_norm": True, "model__mlp_ratio": 2.6}, {"probe__enabled": False}])
def test_parameters_are_those_of_the_module(changes: dict[str, Any]) -> None:
    config = resolve(tiny(**changes), MANIFEST)
    with torch.device("meta"):
        objective = Objective(config, MANIFEST)
    found = parameters(config, MANIFEST.probe_classes)
    assert found.total == sum(p.numel() for p in objective.parameters())
    assert found.model == sum(p.numel() for p in objective.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_the_table_has_every_preset_policy_and_batch() -> None:
    assert set(bench.CASES) <= set(CASES) and len(bench.CASES) >= 27 + 10
    assert TABLE["failed"] == {} and TABLE["capability"] == [9, 0]


@pytest.mark.parametrize("name", CASES)
def test_memory_beside_the_allocator(name: str) -> None:
    """Within 5 % of the peak that bench.memory has measured; and what must be free is what the allocator reserved."""
    row, config = CASES[name], resolved(bench.case(name))
    found = memory(config)
    assert sum(found.values()) == pytest.approx(row["peak"], rel=0.05)
    assert all(size > 0 for size in found.values())
    choice = backends.decide(config, HOPPER)
    assert needed(config, choice, 1000, sum(found.values())) >= row["reserved"]


def test_parts_follow_what_they_are_of() -> None:
    half, whole = (memory(xl(train__batch_size=n)) for n in (128, 256))
    for name in ("kept by attention", "kept by the MLP", "kept of the stream"):
        assert whole[name] == pytest.approx(2 * half[name], rel=0.01)
    for name in ("weights", "moments", "averages", "bf16 copies of the weights"):
        assert whole[name] == half[name]
    more = memory(xl(optim__ema_extra=(0.999,), optim__ema_profiles=(0.05,)))
    assert more["averages"] == 3 * whole["averages"]


def test_micro_batches_sum_gradients_in_float32() -> None:
    found = memory(xl(optim__accumulate=2))
    count = parameters(xl(), 1000).total
    assert found["gradients"] == 4 * count and "bf16 copies of the weights" not in found
    assert found["weights cast for a step"] < 2 * count


def test_gradients_stand_in_the_buckets_of_many_processes() -> None:
    alone, many = memory(xl(train__batch_size=32)), memory(xl(train__batch_size=256), processes=8)
    count = parameters(xl(), 1000).total
    assert many["gradients"] == 2 * count and sum(many.values()) > sum(alone.values())


@pytest.mark.parametrize(("config", "device", "processes", "why"), [
    (PRESETS["quickstart-unet"], HOPPER, 1, "U-Net are not modelled"),
    (xl(), torch.device("cpu"), 1, "the device is cpu"),
    (xl(dist__mode="fsdp"), HOPPER, 8, "--dist.mode fsdp"),
    (xl(align__encoder="facebook/dinov2"), HOPPER, 1, "--align.encoder"),
    (xl(backend__kernels="reference"), HOPPER, 1, "--backend.kernels reference"),
])  # fmt: skip
def test_what_is_not_modelled_is_said(config: Config, device: Any, processes: int, why: str) -> None:
    assert why in str(unmodelled(config, device, processes))
    assert unmodelled(xl(), HOPPER, 8) is None


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def test_xl_fits_an_80_gib_card_in_two_micro_batches() -> None:
    found = fit(xl(), HOPPER, 1000, H100)
    assert found.chosen is not None and (found.chosen.accumulate, found.chosen.memory) == (2, "keep")
    assert found.chosen.flags == "--optim.accumulate 2"
    config = found.chosen.applied(xl())
    assert (config.optim.accumulate, config.train.memory) == (2, "keep")
    assert found.chosen.peak == sum(memory(config).values()) < found.chosen.needed <= H100
    assert [s.memory for s in found.different] == ["keep", "recompute-elementwise", "recompute-blocks"]


def test_what_fits_stays_as_it_is() -> None:
    found = fit(xl(), HOPPER, 1000, free_of(CARDS["h200"].memory))
    assert found.chosen is not None and found.chosen.applied(xl()) == xl(train__memory="keep")


def test_recomputation_comes_after_micro_batches_and_by_its_time() -> None:
    """Where 16 images at a time do not fit, all others compete by computed time."""
    config = xl(train__batch_size=16)
    keep = sum(memory(config).values())
    found = fit(config, HOPPER, 1000, keep)
    assert found.chosen is not None and found.chosen.needed <= keep
    assert found.chosen.seconds == min(s.seconds for s in found.fitting)
    assert [s.seconds for s in found.fitting] == sorted(s.seconds for s in found.fitting)


def test_micro_batches_are_equal_parts() -> None:
    """96 images over 2 processes: 48, 24, 12, 6, 3 at a time, beginning with what the configuration says."""
    found = fit(xl(train__batch_size=96), HOPPER, 1000, 10**12, processes=2)
    assert sorted({s.accumulate for s in found.fitting}) == [1, 2, 4, 8, 16]
    found = fit(xl(train__batch_size=96, optim__accumulate=3), HOPPER, 1000, 10**12)
    assert sorted({s.accumulate for s in found.fitting}) == [3, 6, 12, 24, 48, 96]


def test_nothing_fits() -> None:
    found = fit(xl(), HOPPER, 1000, 8 * 10**9)
    assert found.chosen is None and not found.fitting and not found.different
    assert found.least.needed > 8 * 10**9


def test_what_the_backends_refuse_is_left_out() -> None:
    found = fit(xl(train__weights="bf16"), HOPPER, 1000, H100)
    assert {s.accumulate for s in found.fitting} == {1}
    assert found.chosen is not None and found.chosen.memory == "recompute-elementwise"
    with pytest.raises(UserError, match="--train.fp8 is True, but compute capability 8.0"):
        fit(xl(train__fp8=True), Card((8, 0)), 1000, H100)


def test_it_is_quick() -> None:
    import time

    start = time.process_time()
    fit(xl(train__batch_size=4096), HOPPER, 1000, H100)
    assert time.process_time() - start < 5


# ---------------------------------------------------------------------------------------------------------------------
# Time


def milliseconds(config: Config, card: str) -> float:
    known = CARDS[card]
    return 1e3 * seconds(step_time(config, backends.decide(config, known.card), 1000, known))


def test_no_part_is_faster_than_its_floor() -> None:
    for name, known in CARDS.items():
        parts = step_time(xl(), backends.decide(xl(), known.card), 1000, known)
        assert all(p.seconds >= p.floor * (1 - 1e-9) and p.rests_on for p in parts), name
        assert 0 < sum(p.floor for p in parts) < seconds(parts)


def test_times_are_in_the_order_of_what_is_done() -> None:
    plain, paper = xl(probe__enabled=False), xl(probe__branch="paper")
    assert milliseconds(plain, "h200") < milliseconds(xl(), "h200") < milliseconds(paper, "h200")
    assert milliseconds(xl(), "b200") < milliseconds(xl(), "h200") < milliseconds(xl(), "h100")
    assert milliseconds(xl(), "h100") < milliseconds(xl(), "a100")
    elementwise, blocks = (xl(train__memory=f"recompute-{what}") for what in ("elementwise", "blocks"))
    assert milliseconds(xl(), "h200") < milliseconds(elementwise, "h200") < milliseconds(blocks, "h200")
    assert milliseconds(xl(), "h200") < milliseconds(xl(optim__accumulate=4), "h200")
    assert milliseconds(xl(train__fp8=True), "h200") < milliseconds(xl(), "h200")


def test_the_matrix_products_of_xl_are_the_design_s() -> None:
    """868 GFLOP an image: 256 of them take 0.289 s at 769 TFLOP/s, with attention's own."""
    known = CARDS["h200"]
    parts = step_time(xl(), backends.decide(xl(), known.card), 1000, known)
    products = sum(p.floor for p in parts if p.name.startswith("products"))
    assert products == pytest.approx(868e9 * 256 * 0.963 / 769e12, rel=0.01)


def test_the_slowest_of_a_generation_stands_for_a_card() -> None:
    assert nearest((9, 0)).name == "h100" and nearest((8, 6)).name == "a100" and nearest((12, 0)).name == "h100"
