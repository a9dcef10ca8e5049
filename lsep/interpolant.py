"""From stored rows to what the model sees and is to say: posterior sample, time t, x_t; velocity, noise or data.

Every draw is a function of (seed, epoch, sample id) and of its stream below (the side of the pooling window, which a
batch shares, of (seed, step)), never of the rank or of what a process has run: a resumed or re-sharded run draws the
same numbers.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lsep.config import InterpolantConfig
from lsep.data.manifest import Manifest
from lsep_kernels import reference
from lsep_kernels.ops import REFERENCE, Ops
from lsep_kernels.reference import path


class Stream(IntEnum):
    """Names of the independent random streams; a value is part of the format of a run and never changes."""

    POSTERIOR = 0
    NOISE = 1
    TIME = 2
    LABEL_DROP = 3
    CROP = 4
    WINDOW = 5
    SAMPLE = 6
    SDE = 7
    PROBE_SPLIT = 8
    PROBE_POSTERIOR = 9
    PROBE_NOISE = 10
    PROBE_WINDOW = 11
    PROBE_TOKENS = 12
    SAMPLE_LABEL = 13


EDGE = 1e-3
"""How near to data and noise a prediction of e or x is turned into a velocity."""


class Noised(NamedTuple):
    """x_t and target velocity v `(B, C, H, W)` float32, times t `(B,)` float32."""

    x_t: Tensor
    t: Tensor
    v: Tensor


def draw_times(config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor, ops: Ops = REFERENCE) -> Tensor:
    """Training times `(B,)` in [0, 1]."""
    if config.time == "uniform":
        return ops.uniform(seed, int(Stream.TIME), epoch, ids)[:, 0]
    z = ops.normal(seed, int(Stream.TIME), epoch, ids, (1,))[:, 0] * config.time_std + config.time_mean
    if config.time == "lognormal" and config.path == "cosine":  # sigma / alpha = tan(pi t / 2) = exp(z)
        return torch.atan(z.exp()) * (2 / math.pi)
    return torch.sigmoid(z)  # on a linear path sigma / alpha = t / (1 - t)


def noise(
    rows: Tensor, manifest: Manifest, config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor,
    ops: Ops = REFERENCE,
) -> Noised:  # fmt: skip
    """Draw t and noise for stored rows `(B, *row_shape)`, whose posterior is sampled anew at every visit."""
    t = draw_times(config, seed, epoch, ids, ops)
    # The kernel knows the paths of flows.
    interpolate = reference.interpolate if config.path == "vp" else ops.interpolate
    streams = (int(Stream.POSTERIOR), int(Stream.NOISE))
    x_t, v = interpolate(rows, ids, epoch, t, seed, manifest.kind, config.path, manifest.shift, manifest.scale, streams)
    return Noised(x_t, t, v)


def target(config: InterpolantConfig, noised: Noised) -> Tensor:
    """What the model is to predict `(B, C, H, W)`: v itself, or the noise e or data x that x_t and v belong to."""
    if config.prediction == "v":
        return noised.v
    alpha, sigma, d_alpha, d_sigma = _coefficients(config, noised.t, noised.x_t)
    scale = 1 / (alpha * d_sigma - d_alpha * sigma)
    if config.prediction == "eps":
        return (alpha * noised.v - d_alpha * noised.x_t) * scale
    return (d_sigma * noised.x_t - sigma * noised.v) * scale


def to_velocity(config: InterpolantConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at x_t that belongs to what was predicted there; t `(B,)` keeps away from 0 and 1, see `inside`."""
    if config.prediction == "v":
        return predicted
    alpha, sigma, d_alpha, d_sigma = _coefficients(config, t, x_t)
    if config.prediction == "eps":
        e, x = predicted, (x_t - sigma * predicted) / alpha
    else:
        e, x = (x_t - alpha * predicted) / sigma, predicted
    return d_alpha * x + d_sigma * e


def inside(config: InterpolantConfig, t: Tensor) -> Tensor:
    """Times at which `to_velocity` can be asked: pure noise says nothing of x to who knows e, nor clean data of e."""
    return t if config.prediction == "v" else t.clamp(EDGE, 1 - EDGE)


def _coefficients(config: InterpolantConfig, t: Tensor, x: Tensor) -> list[Tensor]:
    return [k.view(-1, *[1] * (x.ndim - 1)) for k in path(t, config.path)]


def velocity_to_score(v: Tensor, x: Tensor, t: Tensor, kind: str) -> Tensor:
    """Score of p_t: solve x_t = alpha x + sigma e and v = alpha' x + sigma' e for e; the score is -e / sigma."""
    alpha, sigma, d_alpha, d_sigma = path(t, kind)
    e = (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)
    return -e / sigma
