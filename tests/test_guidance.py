"""Decisions on times: edges of the guidance interval, of the probe's bins; and what guidance acts on."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, lively, tiny

from lsep import cli, sample
from lsep.checks import check, resolve
from lsep.config import Config, InterpolantConfig, ProbeConfig
from lsep.errors import UserError
from lsep.interpolant import draw_times
from lsep.model import SiT
from lsep.objective import Objective
from lsep.parts import Parts
from lsep.probe import time_bins, time_weights
from lsep.run import Run
from lsep.samples import Request, class_numbers, sample_run
from lsep.train import train

STEPS = [*range(1, 101), 125, 200, 250, 400, 500, 999, 1000]


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_every_edge_of_an_interval_is_met(sampler: str) -> None:
    """At each time and each edge of two digits a float64 decides as the fractions do."""
    for steps in STEPS:
        found = sample.times(sampler, steps)
        if sampler == "sde" and steps > 1:
            exact = [1 - Fraction(24, 25) * Fraction(i, steps - 1) for i in range(steps)] + [Fraction(0)]
        else:
            exact = [Fraction(steps - i, steps) for i in range(steps + 1)] if sampler != "sde" else [1, 0]
        assert len(found) == len(exact) and all(a > b for a, b in pairwise(found))
        for t, true in zip(found, exact, strict=True):
            near = [k for k in range(101) if abs(k / 100 - t) < 1e-6]
            assert all(
                (k / 100 <= t, t <= k / 100) == (Fraction(k, 100) <= true, true <= Fraction(k, 100)) for k in near
            )
            assert t == float(true)


def test_every_edge_of_a_bin_is_met() -> None:
    """A time that is an edge, as float32 has it, begins its bin, and the float32 before it ends the one before."""
    for n in [*range(1, 150), 1000]:
        edges = (torch.arange(n, dtype=torch.float64) / n).float()
        assert torch.equal(time_bins(edges, n), torch.arange(n))
        assert torch.equal(time_bins(torch.nextafter(edges[1:], torch.zeros(1)), n), torch.arange(n - 1))
    assert time_bins(torch.ones(1), 7).item() == 6
    t = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(time_bins(t, 10), (t * 10).long())  # the default is what it was
    config = ProbeConfig(weight_bins=22, weight_start=0.0, weight_end=21.0)
    assert time_weights(config, torch.tensor([13 / 22])).item() == 13


def test_lognormal_is_the_noise_over_the_data() -> None:
    """sigma(t) / alpha(t) is exp of a normal number, on both paths; REPA's own formulas."""
    ids = torch.arange(5000)
    for path in ("linear", "cosine"):
        config = InterpolantConfig(path=path, time="lognormal", time_mean=0.3, time_std=0.8)  # type: ignore[arg-type]
        t = draw_times(config, 0, torch.tensor(0), ids).double()
        ratio = t / (1 - t) if path == "linear" else torch.tan(torch.pi / 2 * t)
        z = ratio.log()
        assert z.mean().item() == pytest.approx(0.3, abs=0.05) and z.std().item() == pytest.approx(0.8, abs=0.04)
        logit = draw_times(replace(config, time="logit-normal"), 0, torch.tensor(0), ids)
        assert torch.equal(t.float(), logit) == (path == "linear")
    with pytest.raises(UserError, match="--interpolant.time is 'lognormal' with --interpolant.path vp"):
        check(tiny(interpolant__path="vp", interpolant__time="lognormal"))


# ---------------------------------------------------------------------------------------------------------------------
# What guidance acts on


def model_and_config(**changes: object) -> tuple[SiT, Config]:
    config = resolve(tiny(sample__steps=4, sample__cfg=3.0, **changes), MANIFEST)
    return lively(Objective(config, MANIFEST)).model, config


@pytest.mark.parametrize(("rule", "guides"), [("time", [2, 2, 2, 1, 1, 1, 1]), ("repa", [2, 2, 2, 2, 1, 1, 1])])
def test_heuns_second_slope(rule: str, guides: list[int]) -> None:
    """Slopes at 1, .75 | .75, .5 | .5, .25 | .25: from 0.6 on REPA guides both of the step that begins at 0.75."""
    model, config = model_and_config(sample__sampler="heun", sample__guidance_low=0.6, sample__guidance_rule=rule)
    rows: list[int] = []
    with model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]) // sample.UNIT)):
        sample.draw(model, config, torch.tensor([1]), seed=0)
    assert rows == guides


@pytest.mark.parametrize("channels", [1, 2, None])
def test_guidance_of_the_first_channels(channels: int | None) -> None:
    """SiT's own sampler guides channels 0 to 2; the others are those of the labelled velocity."""
    model, config = model_and_config(sample__cfg_channels=channels)
    weak = model_and_config()[0]
    with torch.no_grad():
        for p in weak.parameters():
            p.mul_(0.9)
    x, y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 3])
    time, null = torch.full((4,), 0.5), torch.full_like(y, 5)
    with torch.no_grad():
        labelled = model(x.float(), time, y).double()
        for base, other in ((model(x.float(), time, null).double(), None), (weak(x.float(), time, y).double(), weak)):
            truth = labelled.clone()
            truth[:, :channels] += 2 * (labelled - base)[:, :channels]
            found = sample.guided(model, y, config.sample, other)(x, 0.5)
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "message"), [(0, "expected None or at least 1"), (4, "None or from 1 to 3")])
def test_channels_that_are_not_there(channels: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--sample.cfg-channels is {channels}, expected .*{message[-8:]}"):
        resolve(tiny(sample__cfg_channels=channels), MANIFEST)


def test_no_guidance_without_labels(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unconditional model runs once a step whatever its configuration's cfg, and is refused --cfg."""
    model, config = model_and_config(model__conditional=False)
    rows: list[int] = []
    with model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))):
        sample.draw(model, config, torch.tensor([1]), seed=0)
    assert rows == [sample.UNIT] * 4
    changes = {"sample__steps": 1, "sample__num": 2, "sample__cfg": 2.0, "train__steps": 1}
    run = train(tiny(data__path=str(store), model__conditional=False, **changes), tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["sample", str(run.path), "--cfg", "2", "--out", str(tmp_path / "o")]) == 2
    assert "--cfg is 2, but the run's model is unconditional" in capsys.readouterr().err
    assert cli.main(["sample", str(run.path), "--out", str(tmp_path / "o")]) == 0
    weak = ["--autoguidance", str(run.path), "--cfg", "2", "--out", str(tmp_path / "weak")]
    assert cli.main(["sample", str(run.path), *weak]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Names and earlier files


@pytest.fixture
def named(store: Path, tmp_path: Path) -> Run:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["class_names"] = ["tench", "goldfish", "great white shark", "7", "ray"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    return train(tiny(data__path=str(store), train__steps=1, sample__steps=1, sample__num=2), tmp_path / "run")


def test_classes_by_name(named: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = named.manifest()
    assert class_numbers(("goldfish", "0", "great white shark"), manifest) == (1, 0, 2)
    with pytest.raises(UserError, match="--classes holds 'goldfisch'; did you mean 'goldfish'"):
        class_numbers(("goldfisch",), manifest)
    with pytest.raises(UserError, match="--classes holds 'ray', but the run's classes have no names: expected numbers"):
        class_numbers(("ray",), replace(manifest, class_names=()))
    assert (
        cli.main(["sample", str(named.path), "--classes", "ray", "1", "--num", "4", "--out", str(tmp_path / "o")]) == 0
    )
    assert json.loads((tmp_path / "o" / "settings.json").read_text())["classes"] == [4, 1]
    for wrong in ("7", "-1", "9" * 30):  # a number is one, whatever the names are
        capsys.readouterr()
        assert cli.main(["sample", str(named.path), "--classes", wrong]) == 2
        assert "expected from 0 to 4" in capsys.readouterr().err


def test_parts_of_an_earlier_version_are_not_mixed_in(named: Run, tmp_path: Path) -> None:
    """Its settings did not say how times were computed, and their edges were others."""
    config = named.config()
    parts = Parts(tmp_path / "samples.npz.parts", 2, 64)
    sample_run(named, config, Request(), (1.0,), tmp_path, None, "cpu")
    settings = json.loads((tmp_path / "settings.json").read_text())
    added = ("times", "guidance_rule", "cfg_channels")
    parts.open({k: v for k, v in settings.items() if k not in added})
    with pytest.raises(UserError, match=r"holds parts of other samples \(guidance_rule: None -> 'time'; times: None"):
        sample_run(named, config, Request(), (1.0,), tmp_path, None, "cpu")
