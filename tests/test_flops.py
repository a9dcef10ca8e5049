"""The count of model FLOPs beside PyTorch's own counter.

`FlopCounterMode` sees mm, addmm, bmm, convolution and convolution_backward here: every product of the step, since
attention is the reference's two bmm (SDPA's kernel for CPUs is no operator that it counts). The counts are equal, not
close.
"""

from dataclasses import replace

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, tiny
from torch.utils.flop_counter import FlopCounterMode

from lsep.checks import resolve
from lsep.config import Config, override
from lsep.cost.flops import SECOND, Product, parts, per_image, second_pass_blocks, step_parts, total
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.presets import PRESETS

PLANS = {
    "plain": {"probe__enabled": False},
    "paper": {"probe__branch": "paper"},
    "shared 0.8": {},
    "shared 0.2": {"probe__extra_fraction": 0.2},
    "shared 0": {"probe__extra_fraction": 0.0},
}


def counted(config: Config, probe: bool = True) -> tuple[int, int]:
    """What PyTorch's counter sees of one micro-batch: forward, and forward and backward."""
    objective, plan = lively(Objective(config, MANIFEST)), branch_plan(config, probe=probe)
    with FlopCounterMode(display=False) as counter:
        loss = objective(random_batch(plan.batch), plan, torch.tensor(3), torch.tensor(0)).total
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("changes", [
    {},
    {"model__qk_norm": True, "model__mlp_ratio": 2.6, "probe__depth": 3},
    {"model__patch_size": 4, "probe__depth": 1, "train__batch_size": 7},
])  # fmt: skip
@pytest.mark.parametrize("pool_before_fc2", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_equal_to_the_counter(name: str, pool_before_fc2: bool, changes: dict[str, object]) -> None:
    config = resolve(tiny(**PLANS[name], **changes, probe__pool_before_fc2=pool_before_fc2), MANIFEST)
    assert total(parts(config, branch_plan(config), MANIFEST.probe_classes)) == counted(config)


def test_a_probe_that_has_ended_is_plain() -> None:
    config, plain = (resolve(tiny(probe__enabled=on), MANIFEST) for on in (True, False))
    off = branch_plan(config, probe=False)
    assert parts(config, off, 7) == parts(plain, branch_plan(plain), 7)
    assert total(parts(config, off, 7)) == counted(config, probe=False)
    assert second_pass_blocks(config, off) == 0
    assert total(step_parts(config, 7, probe=False)) == total(parts(plain, branch_plan(plain), 7))


def test_micro_batches_add_up_to_the_step() -> None:
    one, five = (resolve(tiny(optim__accumulate=n), MANIFEST) for n in (1, 5))
    assert step_parts(one, 7) == step_parts(five, 7) == parts(one, branch_plan(one), 7)


def test_a_fixed_operand_saves_one_product() -> None:
    assert Product("", 3, 5, 7, 2).flops == (420, 1260)
    assert Product("", 3, 5, 7, 2, both_gradients=False).flops == (420, 840)


def xl(batch: int, **changes: object) -> Config:
    config = override(PRESETS["sit-xl-2-256"], {"train.batch_size": batch, "model.in_channels": 4})
    config = override(config, {"model.num_classes": 1000} | {k.replace("__", "."): v for k, v in changes.items()})
    return replace(config, probe=replace(config.probe, window_max=16))


@pytest.mark.parametrize(("changes", "blocks"), [
    ({}, 6.13),
    ({"probe__extra_fraction": 0.8}, 6.13),
    ({"probe__extra_fraction": 0.2}, 1.53),
    ({"probe__extra_fraction": 0.0}, 0),
    ({"probe__pool_before_fc2": False}, 6.4),
    ({"probe__branch": "paper", "probe__pool_before_fc2": False}, 8),
    ({"probe__enabled": False}, 0),
])  # fmt: skip
def test_blocks_of_the_second_pass(changes: dict[str, object], blocks: float) -> None:
    """The README's figures: 6.13 of 28 blocks at e = 0.8, 8 the paper's way."""
    config = xl(1000, **changes)
    assert round(second_pass_blocks(config, branch_plan(config)), 2) == blocks


def test_rounding_of_a_batch() -> None:
    """Of 256 samples 204 have a second pass, not 204.8."""
    config = xl(256)
    plan = branch_plan(config)
    assert plan.extra == 204
    one_row = (7 + 2 / 3 + 1 / 3 / 256) * 204 / 256  # of fc2, a third of a block, one row is left of 256
    assert second_pass_blocks(config, plan) == pytest.approx(one_row, rel=1e-12)


@pytest.mark.parametrize(("changes", "gflop"), [({"probe__enabled": False}, 712), ({}, 868)])
def test_gflop_of_a_training_image(changes: dict[str, object], gflop: float) -> None:
    """SiT-XL/2 at 256 px: a block's forward is 2.169 TFLOP for 256 images."""
    config = xl(256, **changes)
    plan = branch_plan(config)
    found = parts(config, plan, 1000)
    assert per_image(total(found).training, plan) / 1e9 == pytest.approx(gflop, rel=0.01)
    block = sum(f.forward for name, f in found.items() if name in ("qkv", "attention", "proj", "fc1", "fc2")) / 28
    assert block == pytest.approx(2.169e12, rel=0.01)


def test_second_pass_has_names_of_its_own() -> None:
    """Without its parts, pooling and the head, what is left is plain SiT."""
    config = xl(256)
    plain = xl(256, probe__enabled=False)
    found = parts(config, branch_plan(config), 1000)
    main = {n: f for n, f in found.items() if not n.startswith(SECOND) and n not in ("pooling", "probe head")}
    assert main == parts(plain, branch_plan(plain), 1000)
