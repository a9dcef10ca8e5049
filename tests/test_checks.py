"""Nonsense ends in one sentence that names the flag, what was found and what was expected."""

from dataclasses import replace

import pytest
from conftest import MANIFEST, tiny

from lsep.checks import check, resolve
from lsep.errors import UserError
from lsep.presets import PRESETS


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_pass(name: str) -> None:
    check(PRESETS[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__steps": 0}, "--train.steps is 0, expected at least 1"),
        ({"probe__rho": 1.5}, "--probe.rho is 1.5, expected from 0 to 1"),
        ({"optim__ema_decay": 1.0}, "--optim.ema-decay is 1.0, expected from 0 to below 1"),
        ({"optim__clip": 0.0}, "--optim.clip is 0.0, expected above 0"),
        ({"optim__lr": float("nan")}, "--optim.lr is nan, expected a finite number"),
        ({"interpolant__time_mean": float("nan")}, "--interpolant.time-mean is nan, expected a finite number"),
        ({"optim__clip": float("inf")}, "--optim.clip is inf, expected a finite number"),
        ({"train__seed": 2**63}, "--train.seed is 9223372036854775808, expected at most 9,223,372,036,854,775,807"),
        ({"model__num_heads": 3}, "--model.num-heads is 3, expected a divisor of --model.hidden-size 32"),
        ({"model__hidden_size": 30}, "--model.hidden-size is 30, expected a multiple of 4"),
        ({"optim__accumulate": 3}, "--train.batch-size 10 is not divisible by --optim.accumulate 3"),
        ({"probe__depth": 4}, "--probe.depth is 4, expected at most the model's 3 blocks"),
        ({"probe__rho": 0.05}, "--probe.rho is 0.05, expected at least --model.class-dropout-prob 0.1 with"),
        ({"probe__extra_fraction": 0.85}, "--probe.extra-fraction is 0.85, expected from 0 to rho - p = 0.8"),
        ({"probe__weight_bins": 1}, "--probe.weight-bins is 1, so the weight is constant"),
        ({"probe__end_step": -1}, "--probe.end-step is -1"),
        ({"probe__decay_start_epoch": -1}, "--probe.decay-start-epoch is -1"),
        ({"probe__branch": "paper", "probe__extra_fraction": 0.2}, "--probe.extra-fraction is 0.2, expected None with"),
        (
            {"sample__guidance_low": 0.8, "sample__guidance_high": 0.2},
            "--sample.guidance-low is 0.8, expected at most --sample.guidance-high 0.2",
        ),
        ({"train__seed": 2**64}, "--train.seed"),
    ],
)
def test_check_refuses(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(tiny(**{"model__hidden_size": 32, **changes}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_low_rho_is_fine_in_the_paper_plan_or_without_probe() -> None:
    check(tiny(probe__rho=0.05, probe__branch="paper"))
    check(tiny(probe__rho=0.05, probe__enabled=False))


def test_full_extra_fraction_is_allowed_in_floating_point() -> None:
    check(tiny(probe__extra_fraction=0.8))  # 0.9 - 0.1 is 0.7999... or 0.8000...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__input_size": 16}, "--model.input-size is 16, but the data at test has 8"),
        ({"model__num_classes": 10}, "--model.num-classes is 10, but the data at test has 5"),
        ({"model__patch_size": 3}, "--model.patch-size is 3, expected a divisor of the data's side 8"),
        ({"train__batch_size": 2000}, "--train.batch-size is 2000, but test has only 1000 images"),
        ({"probe__window_min": 5}, "--probe.window-min is 5, expected at most the token grid's side 4"),
        ({"probe__window_max": 5}, "--probe.window-max is 5, expected at most the token grid's side 4"),
        ({"probe__window_max": 1}, "--probe.window-max is 1, expected at least window-min 2"),
    ],
)
def test_resolve_refuses(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(tiny(**changes), MANIFEST)
    assert message in str(caught.value)


def test_resolve_takes_the_datas_shape() -> None:
    config = resolve(tiny(), MANIFEST)
    m = config.model
    assert (m.input_size, m.in_channels, m.num_classes, config.grid, config.probe.window_max) == (8, 3, 5, 4, 4)
    with pytest.raises(UserError, match="expected squares"):
        resolve(tiny(), replace(MANIFEST, shape=(3, 8, 6)))
