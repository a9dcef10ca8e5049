"""From stored rows to what the model sees: posterior sample, time t, x_t and the velocity target.

Every draw is a function of (seed, epoch, sample id) and of its stream below (the side of the pooling window, which a
batch shares, of (seed, step)), never of the rank or of what a process has run: a resumed or re-sharded run draws the
same numbers.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lsep.config import InterpolantConfig
from lsep.data.manifest import Manifest
from lsep_kernels.reference import interpolate, normal, path, sample_moments, uniform


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


class Noised(NamedTuple):
    """x_t and target velocity v `(B, C, H, W)` float32, times t `(B,)` float32."""

    x_t: Tensor
    t: Tensor
    v: Tensor


def to_latent(x: Tensor, manifest: Manifest, seed: int, epoch: Tensor, ids: Tensor) -> Tensor:
    """Stored rows `(B, *row_shape)` to what the model is trained on `(B, C, H, W)` float32."""
    if manifest.kind == "pixels":
        return x.float() / 127.5 - 1
    if manifest.kind == "moments":
        x = sample_moments(x, normal(seed, Stream.POSTERIOR, epoch, ids, manifest.shape))
    return (x.float() - manifest.shift) * manifest.scale


def draw_times(config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor) -> Tensor:
    """Training times `(B,)` in [0, 1]."""
    if config.time == "uniform":
        return uniform(seed, Stream.TIME, epoch, ids)[:, 0]
    z = normal(seed, Stream.TIME, epoch, ids, (1,))[:, 0]
    return torch.sigmoid(z * config.time_std + config.time_mean)


def noise(x: Tensor, config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor) -> Noised:
    """Draw t and noise for clean latents x `(B, C, H, W)`."""
    t = draw_times(config, seed, epoch, ids)
    e = normal(seed, Stream.NOISE, epoch, ids, tuple(x.shape[1:]))
    x_t, v = interpolate(x, t, e, config.path)
    return Noised(x_t, t, v)


def velocity_to_score(v: Tensor, x: Tensor, t: Tensor, kind: str) -> Tensor:
    """Score of p_t: solve x_t = alpha x + sigma e and v = alpha' x + sigma' e for e; the score is -e / sigma."""
    alpha, sigma, d_alpha, d_sigma = path(t, kind)
    e = (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)
    return -e / sigma
