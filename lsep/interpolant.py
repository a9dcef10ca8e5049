"""From stored rows to what the model sees: posterior sample, time t, x_t and the velocity target.

Every draw is a function of (seed, epoch, sample id) and of its stream below (the side of the pooling window, which a
batch shares, of (seed, step)), never of the rank or of what a process has run: a resumed or re-sharded run draws the
same numbers.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lsep.config import InterpolantConfig
from lsep.data.manifest import Manifest
from lsep_kernels import reference
from lsep_kernels.reference import normal, path, uniform

Interpolate = Callable[..., tuple[Tensor, Tensor]]
"""An operation like `reference.interpolate`."""


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


class Noised(NamedTuple):
    """x_t and target velocity v `(B, C, H, W)` float32, times t `(B,)` float32."""

    x_t: Tensor
    t: Tensor
    v: Tensor


def draw_times(config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor) -> Tensor:
    """Training times `(B,)` in [0, 1]."""
    if config.time == "uniform":
        return uniform(seed, Stream.TIME, epoch, ids)[:, 0]
    z = normal(seed, Stream.TIME, epoch, ids, (1,))[:, 0]
    return torch.sigmoid(z * config.time_std + config.time_mean)


def noise(
    rows: Tensor, manifest: Manifest, config: InterpolantConfig, seed: int, epoch: Tensor, ids: Tensor,
    interpolate: Interpolate = reference.interpolate,
) -> Noised:  # fmt: skip
    """Draw t and noise for stored rows `(B, *row_shape)`, whose posterior is sampled anew at every visit."""
    t = draw_times(config, seed, epoch, ids)
    streams = (int(Stream.POSTERIOR), int(Stream.NOISE))
    x_t, v = interpolate(rows, ids, epoch, t, seed, manifest.kind, config.path, manifest.shift, manifest.scale, streams)
    return Noised(x_t, t, v)


def velocity_to_score(v: Tensor, x: Tensor, t: Tensor, kind: str) -> Tensor:
    """Score of p_t: solve x_t = alpha x + sigma e and v = alpha' x + sigma' e for e; the score is -e / sigma."""
    alpha, sigma, d_alpha, d_sigma = path(t, kind)
    e = (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)
    return -e / sigma
