"""Presets, overrides and the comparison of runs."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from lsep.config import Config, flat, from_dict, override
from lsep.errors import UserError
from lsep.presets import PRESETS, preset
from lsep.run import differences

CONTRACT = (
    "train.steps train.batch_size train.seed train.log_every train.checkpoint_every probe.branch probe.extra_fraction "
    "probe.rho probe.depth probe.weight_start probe.weight_end data.path sample.steps"
).split()


def test_fields_of_the_contract() -> None:
    assert set(CONTRACT) <= set(flat(Config()))
    sections = "model interpolant probe align optim data train backend dist sample evaluate".split()
    assert [f.name for f in fields(Config)] == sections


def test_preset_names() -> None:
    sit = {f"sit-{s}-{p}-256" for s in ("s", "b", "l", "xl") for p in (2, 4, 8)} | {
        f"sit-{s}-2-512" for s in ("b", "l", "xl")
    }
    sit |= {f"sit-{s}-1-f16d32" for s in ("s", "b", "l", "xl")}
    assert set(PRESETS) == sit | {"quickstart", "quickstart-unet", "sit-xl-2-512-finetune"}


@pytest.mark.parametrize(
    ("name", "side", "windows", "epochs"),
    [("sit-xl-2-256", 32, 12, 800), ("sit-xl-2-512", 64, 24, 240), ("sit-xl-2-512-finetune", 64, 24, 100)],
)
def test_xl_is_the_reported_run(name: str, side: int, windows: int, epochs: int) -> None:
    """The settings of arXiv 2509.21565 for SiT-XL/2, each written out."""
    reported = {
        "model.depth": 28, "model.hidden_size": 1152, "model.num_heads": 16, "model.patch_size": 2,
        "model.mlp_ratio": 4.0, "model.input_size": side, "model.class_dropout_prob": 0.1, "model.qk_norm": False,
        "model.conditional": True,
        "interpolant.path": "linear", "interpolant.time": "uniform",
        "probe.enabled": True, "probe.rho": 0.9, "probe.depth": 8, "probe.window_min": windows,
        "probe.window_max": None, "probe.weight_start": 0.0225, "probe.weight_end": 0.03, "probe.weight_bins": 10,
        "probe.label_smoothing": 0.0,
        "probe.decay_start_epoch": 100, "probe.decay_epochs": 800, "probe.branch": "shared",
        "probe.extra_fraction": None,
        "optim.lr": 1e-4, "optim.probe_lr": 1e-4, "optim.beta1": 0.9, "optim.beta2": 0.999, "optim.eps": 1e-8,
        "optim.weight_decay": 0.0, "optim.clip": 1.0, "optim.schedule": "constant", "optim.warmup_steps": 0,
        "optim.ema_decay": 0.9999, "train.batch_size": 256, "train.steps": epochs * (1_281_167 // 256),
        "sample.sampler": "sde", "sample.steps": 250, "sample.cfg": 1.0,
    }  # fmt: skip
    values = flat(PRESETS[name])
    assert {k: values[k] for k in reported} == reported


def test_b_presets_have_their_own_probe_rate() -> None:
    assert all((c.optim.probe_lr == 3e-2) == ("-b-" in n) for n, c in PRESETS.items())


def test_window_is_three_quarters_of_the_grid() -> None:
    for name, config in PRESETS.items():
        if not name.startswith("quickstart"):
            assert config.probe.window_min * 4 == config.grid * 3, name


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["quickstart"].train.steps = 3  # type: ignore[misc]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'sit-xl-2-257' is unknown; did you mean 'sit-xl-2-256'"):
        preset("sit-xl-2-257")


def test_override() -> None:
    config = override(Config(), {"train.steps": 7, "probe.extra_fraction": 0, "optim.lr": 1, "data.path": "x"})
    assert (config.train.steps, config.probe.extra_fraction, config.data.path) == (7, 0, "x")
    assert isinstance(config.optim.lr, float)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.stepz", 1, "'train.stepz' is unknown; did you mean 'train.steps'"),
        ("train.steps", "many", "train.steps is 'many', expected int"),
        ("train.steps", True, "train.steps is True, expected int"),
        ("probe.branch", "both", "probe.branch is 'both', expected one of 'shared', 'paper'"),
        ("data.path", 3, "data.path is 3, expected str or None"),
        ("model.qk_norm", 1, "model.qk_norm is 1, expected bool"),
        ("optim.lr", 10**400, "optim.lr is 10+[.]{3}0+, expected a number below 1e308"),
        ("data.path", ["x" * 10**6], "data.path is .{60,100}, expected str or None"),
    ],
)
def test_override_refuses(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(Config(), {name: value})


def test_dictionary_round_trip() -> None:
    for config in PRESETS.values():
        assert from_dict(asdict(config), "test") == config


@pytest.mark.parametrize("values", [[], {"model": 3}, {"model": {"depht": 3}}, {"extra": {"a": 1}}])
def test_foreign_dictionaries_are_refused(values: object) -> None:
    with pytest.raises(UserError, match="here"):
        from_dict(values, "here.json")


def test_differences_name_what_keeps_a_run_from_going_on() -> None:
    old = PRESETS["sit-xl-2-256"]
    same = override(old, {"train.steps": 10, "data.path": "/elsewhere", "sample.steps": 3, "train.log_every": 7})
    assert differences(old, same) == []
    assert differences(old, override(old, {"optim.lr": 2e-4, "train.seed": 1})) == [
        "optim.lr: 0.0001 -> 0.0002",
        "train.seed: 0 -> 1",
    ]
    cosine = override(old, {"optim.schedule": "cosine"})
    assert differences(cosine, override(cosine, {"train.steps": 10})) == ["train.steps: 4003200 -> 10"]
