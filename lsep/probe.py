"""The LSEP term: window, classifier, weight of time and of the epoch (arXiv 2509.21565, section 3)."""

import torch
from torch import Tensor, nn

from lsep.config import ProbeConfig
from lsep.interpolant import Stream
from lsep_kernels.ops import REFERENCE, Ops


def build_classifier(width: int, num_classes: int) -> nn.Sequential:
    """LayerNorm and a linear map, `(B, D)` -> `(B, classes)`; keys `0` and `1` as in published weights."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))


def initialize_classifier(classifier: nn.Sequential, generator: torch.Generator) -> None:
    linear = classifier[1]
    assert isinstance(linear, nn.Linear)
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)


def draw_windows(
    config: ProbeConfig, grid: int, seed: int, step: Tensor, epoch: Tensor, ids: Tensor, ops: Ops = REFERENCE
) -> Tensor:
    """Pooling weights `(B, T)`: one window side for the batch, U{window_min..window_max}, and a place for each sample.

    The side is drawn on the device from (seed, step): its value never reaches the host, and shapes stay static.
    """
    largest = grid if config.window_max is None else config.window_max
    streams = (int(Stream.WINDOW), int(Stream.CROP))
    return ops.windows(seed, streams, step, epoch, ids, (config.window_min, largest), grid)


def time_weights(config: ProbeConfig, t: Tensor) -> Tensor:
    """omega(t) `(B,)`: linear from weight_start to weight_end over weight_bins equal bins, constant inside a bin."""
    n = config.weight_bins
    bins = time_bins(t, n).to(t.dtype)
    return config.weight_start + (config.weight_end - config.weight_start) * bins / max(n - 1, 1)


def time_bins(t: Tensor, count: int) -> Tensor:
    """Which of `count` equal bins of [0, 1] each of the float32 times t is in, int64; a bin k begins with its edge.

    The edge is the float32 nearest to k / count: (t * count).floor() has it in the bin below for some (13 / 22), and
    times before it in the bin above for others (5 / 11).
    """
    near = (t * count).floor()  # the product is rounded: off by one beside an edge
    bins = near.to(torch.int64) - (t < near / count).to(torch.int64) + (t >= (near + 1) / count)
    return bins.clamp(max=count - 1)


def epoch_factor(config: ProbeConfig, epoch: Tensor) -> Tensor:
    """Decay of the whole term in long runs, 0.1^((epoch - start) / decay_epochs) from the start on; a scalar tensor."""
    if config.decay_start_epoch is None:
        return torch.ones((), device=epoch.device)
    late = (epoch - config.decay_start_epoch).clamp(min=0).to(torch.float32)
    return torch.pow(0.1, late / config.decay_epochs)
