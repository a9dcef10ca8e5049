"""The samplers on a Gaussian whose velocity is known, and the files a user gets."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MANIFEST, lively, tiny
from PIL import Image

from lsep import sample
from lsep.checks import resolve
from lsep.config import Config, InterpolantConfig
from lsep.errors import UserError
from lsep.interpolant import inside, to_velocity
from lsep.model import SiT
from lsep.objective import Objective
from lsep.run import Run
from lsep.samples import Request, sample_run
from lsep.train import train
from lsep_kernels.reference import normal, path

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=torch.float64)


def gaussian_velocity(kind: str) -> sample.Velocity:
    """E[alpha' x + sigma' e | x_t] for x ~ N(MEAN, COVARIANCE): linear in x_t."""

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        half, eye = math.pi / 2, torch.eye(2, dtype=torch.float64)
        alpha, sigma, da, ds = 1 - t, t, -1.0, 1.0
        if kind == "cosine":
            alpha, sigma = math.cos(half * t), math.sin(half * t)
            da, ds = -half * sigma, half * alpha
        gain = (alpha * da * COVARIANCE + sigma * ds * eye) @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * eye)
        return da * MEAN + (x - alpha * MEAN) @ gain.T

    return velocity


def run(sampler: str, steps: int, kind: str = "linear", n: int = 40_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and samples, both `(n, 2)` float64."""
    ids = torch.arange(n)
    x = normal(0, 6, 0, ids, (2,)).double()
    return x, sample.integrate(
        gaussian_velocity(kind), x, sampler, steps, kind, lambda i: normal(0, 7, i, ids, (2,)).double()
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "steps", "bias"), [("ode", 500, 0.005), ("heun", 50, 0.002), ("sde", 500, 0.01), ("dopri5", 1, 0.002)]
)
def test_gaussian_is_recovered(sampler: str, steps: int, bias: float, kind: str) -> None:
    """Mean and covariance within four standard errors of 40,000 samples plus the sampler's own step error."""
    _, x = run(sampler, steps, kind)
    standard = 4 / math.sqrt(len(x))
    assert ((x.mean(0) - MEAN).abs() < standard * COVARIANCE.diag().sqrt() + bias).all()
    assert (torch.cov(x.T) - COVARIANCE).abs().max() < standard * math.sqrt(2) * 0.8 + 2 * bias


@pytest.mark.parametrize(("sampler", "order"), [("ode", 1), ("heun", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    """The flow of a Gaussian is exact: e -> MEAN + COVARIANCE^(1/2) e; the error falls as steps^-order."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    errors = []
    for steps in (20, 40, 80):
        e, x = run(sampler, steps, n=500)
        errors.append(float((x - (MEAN + e @ root)).abs().mean()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.25)


@pytest.mark.parametrize("prediction", ["v", "eps", "x"])
@pytest.mark.parametrize("kind", ["linear", "cosine", "vp"])
def test_a_gaussian_by_any_prediction(kind: str, prediction: str) -> None:
    """Mean and covariance of what a perfect model of x, e or v gives, asked where a SiT is asked."""
    config = InterpolantConfig(path=kind, prediction=prediction)  # type: ignore[arg-type]
    eye = torch.eye(2, dtype=torch.float64)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        time = inside(config, torch.full((len(x),), t, dtype=torch.float64))
        alpha, sigma, da, ds = (float(k[0]) for k in path(time, kind))
        gain = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * eye)
        e = sigma * (x - alpha * MEAN) @ gain  # E[e | x_t]
        data = MEAN + alpha * (x - alpha * MEAN) @ gain @ COVARIANCE
        return to_velocity(config, {"v": da * data + ds * e, "eps": e, "x": data}[prediction], x, time)

    ids = torch.arange(40_000)
    x = sample.integrate(velocity, normal(0, 6, 0, ids, (2,)).double(), "heun", 200, kind, lambda i: torch.zeros(()))
    standard = 4 / math.sqrt(len(x))
    assert ((x.mean(0) - MEAN).abs() < standard * COVARIANCE.diag().sqrt() + 0.01).all()
    assert (torch.cov(x.T) - COVARIANCE).abs().max() < standard * math.sqrt(2) * 0.8 + 0.02


def test_times_of_each_sampler() -> None:
    assert sample.times("ode", 4) == [1, 0.75, 0.5, 0.25, 0]
    sde = sample.times("sde", 250)
    assert len(sde) == 251 and sde[0] == 1 and sde[-2:] == [pytest.approx(0.04), 0]
    assert np.diff(sde[:-1]) == pytest.approx(-0.96 / 249)


def model_and_config(**changes: object) -> tuple[SiT, Config]:
    config = resolve(tiny(sample__steps=3, sample__batch_size=4, **changes), MANIFEST)
    return lively(Objective(config, MANIFEST)).model, config


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_noise_belongs_to_the_image(sampler: str) -> None:
    """How many are drawn, and from where on, changes no bit."""
    model, config = model_and_config(sample__sampler=sampler, sample__cfg=1.5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    whole = sample.draw(model, config, labels, seed=3)
    part = sample.draw(model, config, labels[5:], seed=3, first=5)
    assert torch.equal(part, whole[5:])
    many = sample.draw(model, config, torch.cat([labels, torch.arange(60) % 5]), seed=3)
    assert torch.equal(many[:7], whole)
    assert not torch.allclose(sample.draw(model, config, labels, seed=4), whole, atol=1e-2)


def test_guidance_acts_inside_its_interval_only() -> None:
    model, config = model_and_config(sample__cfg=3.0, sample__guidance_low=0.3, sample__guidance_high=0.6)
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    velocity = sample.guided(model, y, config.sample)
    rows: list[int] = []
    with torch.no_grad():
        for t, guides in ((0.29, False), (0.3, True), (0.6, True), (0.61, False)):
            time = torch.full((4,), t)
            labelled = model(x.float(), time, y).double()
            unlabelled = model(x.float(), time, torch.full_like(y, 5)).double()
            truth = unlabelled + 3 * (labelled - unlabelled) if guides else labelled
            with model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))):
                torch.testing.assert_close(velocity(x, t), truth, rtol=1e-4, atol=1e-4)
            assert rows.pop() == (8 if guides else 4) and not rows  # one pass, doubled only where guidance acts


def test_unconditional_model_ignores_classes() -> None:
    model, config = model_and_config(model__conditional=False)
    a, b = (sample.draw(model, config, torch.full((3,), c), seed=0) for c in (0, 4))
    assert torch.equal(a, b)


def test_drawing_leaves_the_mode_as_it_was() -> None:
    model, config = model_and_config()
    model.train()
    sample.draw(model, config, torch.tensor([1]), seed=0)
    assert model.training


@pytest.fixture
def trained(store: Path, tmp_path: Path) -> Run:
    return train(tiny(data__path=str(store), train__steps=4, sample__steps=2, sample__num=4), tmp_path / "run")


def draw(
    run: Run, out: Path | None = None, classes: list[int] | None = None, step: int | None = None
) -> tuple[Path, Path]:
    config = replace(run.config(), sample=replace(run.config().sample, num=6))
    request = Request(seed=1, classes=None if classes is None else tuple(classes), shuffle=False)
    grid, npz = sample_run(run, config, request, (1.0,), out, step, "cpu")
    return grid, npz


def test_files_of_a_latent_model(trained: Run) -> None:
    grid, npz = draw(trained, classes=[3, 1])
    assert grid.parent == trained.samples / "step-0000004-ode-2-cfg-1-seed-1-classes-3-1"
    data = np.load(npz)
    assert data["arr_0"].shape == (6, 3, 8, 8) and data["arr_0"].dtype == np.float32
    assert data["arr_1"].tolist() == [3, 1, 3, 1, 3, 1]
    assert Image.open(grid).size == (3 * 9 * 6, 2 * 9 * 6)
    settings = json.loads((grid.parent / "settings.json").read_text())
    assert settings["classes"] == [3, 1] and settings["step"] == 4


def test_npz_file_by_name(trained: Run, tmp_path: Path) -> None:
    grid, npz = draw(trained, tmp_path / "deep" / "s.npz")
    assert (grid, npz) == (tmp_path / "deep" / "s.png", tmp_path / "deep" / "s.npz")
    assert not list((tmp_path / "deep").glob("*.tmp"))


def test_pixel_models_give_uint8_images(tmp_path: Path) -> None:
    config = tiny(data__path="digits", probe__window_min=2, train__steps=2, sample__num=4)
    run = train(config, tmp_path / "run")
    _, npz = draw(run)
    data = np.load(npz)["arr_0"]
    assert data.shape == (6, 8, 8, 1) and data.dtype == np.uint8
    assert {"agreement", "agreement_samples", "train_seconds"} <= run.results().keys()
    with pytest.raises(UserError, match="--vae x: .* was trained on pixels, which need no decoder"):
        sample_run(run, run.config(), Request(vae="x"), (1.0,), tmp_path / "decoded", None, "cpu")


def test_sampling_needs_the_run_alone(trained: Run, store: Path, tmp_path: Path) -> None:
    a = np.load(draw(trained)[1])["arr_0"]
    store.rename(tmp_path / "gone")
    np.testing.assert_array_equal(np.load(draw(trained)[1])["arr_0"], a)


def test_a_file_in_the_way_is_found_before_sampling(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sample, "draw", lambda *args, **kwargs: pytest.fail("sampled first"))
    with pytest.raises(UserError, match=r"--out .*notes.txt: cannot be a folder"):
        draw(trained, tmp_path / "notes.txt")


def test_bad_input(trained: Run) -> None:
    with pytest.raises(UserError, match="--classes holds 5, expected from 0 to 4"):
        draw(trained, classes=[5])
    with pytest.raises(UserError, match="no checkpoint of step 99, found: 4"):
        draw(trained, step=99)
    (trained.checkpoints / "0000004" / "shard-00000-ema.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="ema.safetensors: truncated or changed, 1 bytes found"):
        draw(trained)


def test_images_round_trip_pixels() -> None:
    manifest = replace(MANIFEST, kind="pixels", shape=(1, 16, 16))
    pixels = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    images = sample.to_images(pixels.float() / 127.5 - 1, manifest)
    assert torch.equal(torch.from_numpy(images)[0, ..., 0], pixels[0, 0])
    assert sample.to_images(torch.full((1, 1, 1, 1), 7.0), manifest).item() == 255
