"""What the model sees: scale, posterior, times, and the score behind a velocity."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import MANIFEST, relative_error, tiny

from lsep.config import InterpolantConfig
from lsep.interpolant import Noised, draw_times, noise, target, to_velocity, velocity_to_score
from lsep_kernels import reference
from lsep_kernels.reference import path

EPOCH = torch.tensor(2)
IDS = torch.arange(4000)


LINEAR = tiny().interpolant


def latent(noised: Noised) -> torch.Tensor:
    """The clean latent behind x_t and v on the linear path: x_t = (1 - t) x + t e and v = e - x."""
    return noised.x_t - noised.t.view(-1, 1, 1, 1) * noised.v


def test_latents_of_each_kind() -> None:
    pixels = torch.tensor([0, 255]).to(torch.uint8).view(2, 1, 1, 1)
    manifest = replace(MANIFEST, kind="pixels", shape=(1, 1, 1))
    found = latent(noise(pixels, manifest, LINEAR, 0, EPOCH, IDS[:2]))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 1.0]))
    manifest = replace(MANIFEST, kind="samples", scale=0.5, shift=3.0)
    found = latent(noise(torch.full((2, 3, 8, 8), 5.0), manifest, LINEAR, 0, EPOCH, IDS[:2]))
    torch.testing.assert_close(found, torch.ones(2, 3, 8, 8))


def test_posterior_is_sampled_anew_at_every_visit() -> None:
    manifest = replace(MANIFEST, kind="moments", scale=0.5)
    moments = torch.cat([torch.full((4000, 3, 8, 8), 4.0), torch.full((4000, 3, 8, 8), 0.2)], 1).half()
    first, again, later = (latent(noise(moments, manifest, LINEAR, 0, e, IDS)) for e in (EPOCH, EPOCH, EPOCH + 1))
    assert float(first.mean()) == pytest.approx(2.0, abs=1e-3)
    assert float(first.std()) == pytest.approx(0.1, abs=1e-3)
    assert torch.equal(first, again)
    assert float((first == later).float().mean()) < 1e-3


def test_streams_are_independent() -> None:
    """Posterior noise, path noise and t of one sample share no numbers."""
    zeros = torch.zeros(4000, 3, 8, 8)
    manifest = replace(MANIFEST, kind="moments")
    noised = noise(torch.cat([zeros, zeros + 1], 1), manifest, LINEAR, 0, EPOCH, IDS)
    x = latent(noised)
    pairs = torch.stack([x[:, 0, 0, 0], (noised.v + x)[:, 0, 0, 0], noised.t])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 4 / math.sqrt(4000)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_noise_follows_the_path(kind: str) -> None:
    config = tiny(interpolant__path=kind).interpolant
    x = torch.randn(4000, 3, 8, 8)
    noised = noise(x, MANIFEST, config, 0, EPOCH, IDS)
    half = math.pi / 2
    t = noised.t.view(-1, 1, 1, 1)
    if kind == "linear":
        e = noised.v + x
        truth = (1 - t) * x + t * e
    else:
        e = (noised.v + half * torch.sin(half * t) * x) / (half * torch.cos(half * t))
        truth = torch.cos(half * t) * x + torch.sin(half * t) * e
    fine = (t < 0.95).flatten()  # the division by cos loses digits near t = 1
    assert relative_error(noised.x_t[fine], truth[fine]) < 1e-4
    assert abs(float(e[fine].std()) - 1) < 0.01


def test_times() -> None:
    t = draw_times(tiny().interpolant, 0, EPOCH, IDS)
    assert abs(float(t.mean()) - 0.5) < 0.02 and float(t.min()) >= 0 and float(t.max()) < 1
    logit = torch.logit(draw_times(tiny(interpolant__time="logit-normal", interpolant__time_mean=-0.4,
                                        interpolant__time_std=0.7).interpolant, 0, EPOCH, IDS))  # fmt: skip
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.05)
    assert float(logit.std()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_score_of_a_known_gaussian(kind: str) -> None:
    """x ~ N(m, s^2): x_t is Gaussian with mean alpha m and variance alpha^2 s^2 + sigma^2, so its score is known."""
    m, s, t = 0.7, 0.4, torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma, da, ds = (1 - t, t, -1.0, 1.0)
    if kind == "cosine":
        half = math.pi / 2
        alpha, sigma = torch.cos(half * t), torch.sin(half * t)
        da, ds = -half * sigma, half * alpha
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    variance = alpha**2 * s**2 + sigma**2
    gain = (alpha * da * s**2 + sigma * ds) / variance
    velocity = da * m + gain * (x - alpha * m)
    assert relative_error(velocity_to_score(velocity, x, t, kind), -(x - alpha * m) / variance) < 1e-12


PATHS, PREDICTIONS = ("linear", "cosine", "vp"), ("v", "eps", "x")


def test_variance_preserving_path() -> None:
    """Its derivatives by finite differences, its variance, and DDPM's 1,000 steps from 1e-4 to 0.02."""
    t, h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 1e-6
    alpha, sigma, d_alpha, d_sigma = path(t, "vp")
    ahead, behind = path(t + h, "vp"), path(t - h, "vp")
    assert relative_error(d_alpha, (ahead[0] - behind[0]) / (2 * h)) < 1e-8
    assert relative_error(d_sigma, (ahead[1] - behind[1]) / (2 * h)) < 1e-8
    assert relative_error(alpha**2 + sigma**2, torch.ones_like(t)) < 1e-14
    product = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    there = path(torch.arange(1, 1001, dtype=torch.float64) / 1000, "vp")[0]
    assert (there - product).abs().max() < 2e-3
    assert all(bool(torch.isfinite(k).all()) for k in path(torch.tensor([0.0, 1.0]), "vp"))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", PATHS)
def test_predictions_are_one_velocity(kind: str, prediction: str) -> None:
    """From x_t and v comes what is to be predicted, and from that the velocity again."""
    config = InterpolantConfig(path=kind, prediction=prediction)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    x, e = (torch.randn(64, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
    x_t, v = reference.mix(x, t, e, kind)
    wanted = target(config, Noised(x_t, t, v))
    assert relative_error(wanted, {"v": v, "eps": e, "x": x}[prediction]) < 1e-9
    assert relative_error(to_velocity(config, wanted, x_t, t), v) < 1e-9
    single = target(config, Noised(x_t.float(), t.float(), v.float()))
    assert relative_error(single, wanted) < 1e-4
