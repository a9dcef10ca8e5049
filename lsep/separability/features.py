"""Frozen features of noised images: which rows train and test a probe, their noise, their windows, their tokens.

Every draw is a function of (seed, row id) through streams of its own: no noise is what the denoiser saw in training,
and batch size and order change nothing. The same noise serves all times and runs, so that they differ in t alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep.backbone import Features
from lsep.config import Config, ProbeConfig
from lsep.data.manifest import Ids, Source
from lsep.interpolant import Stream
from lsep_kernels.reference import interpolate, uniform, window_weights

TEST_SHARE = 3
"""One image of this many is for testing."""


class Part(NamedTuple):
    """Rows of a data set, by ascending id; `number` keeps apart the draws of equal ids in two data sets."""

    source: Source
    ids: Ids
    number: int


class Batch(NamedTuple):
    """Tokens of some images of a part."""

    place: slice
    """Where in the part they are."""
    tokens: list[Tensor]
    """`(B, T, D)` for each depth, without a label in the conditioning."""
    labelled: list[Tensor] | None
    """The same with it, where that was asked for."""
    window: Tensor
    """Pooling weights `(B, T)` of a random window."""
    y: Tensor
    """The probe's labels `(B,)`."""


def split(source: Source, num: int, seed: int, test_source: Source | None = None) -> tuple[Part, Part]:
    """At most `num` rows, a third of them for testing: parts to train and to test a probe.

    Rows come in the order of random numbers of (seed, id). Both parts are of `source`, unless the rows for testing come
    from `test_source`.
    """
    order = _order(source.manifest.rows, seed, 0)[:num]
    tests = len(order) // TEST_SHARE
    if test_source is None:
        return Part(source, np.sort(order[tests:]), 0), Part(source, np.sort(order[:tests]), 0)
    test_order = _order(test_source.manifest.rows, seed, 1)[: num // TEST_SHARE]
    return Part(source, np.sort(order[: num - num // TEST_SHARE]), 0), Part(test_source, np.sort(test_order), 1)


def _order(rows: int, seed: int, number: int) -> Ids:
    u = uniform(seed, Stream.PROBE_SPLIT, number, torch.arange(rows))[:, 0]
    return u.argsort(stable=True).numpy()


def choose_tokens(part: Part, count: int, tokens: int, seed: int) -> Tensor:
    """Which of the `tokens` tokens of each image are among the `count` that train a probe: `(images, tokens)` bool."""
    places = torch.from_numpy(part.ids)[:, None] * tokens + torch.arange(tokens)
    u = uniform(seed, Stream.PROBE_TOKENS, part.number, places.flatten())[:, 0]
    chosen = torch.zeros(len(u), dtype=torch.bool)
    chosen[u.argsort(stable=True)[:count]] = True
    return chosen.view(places.shape)


def draw_windows(config: ProbeConfig, grid: int, seed: int, part: Part, ids: Tensor) -> Tensor:
    """Pooling weights `(B, T)` of windows with training's sides and places, here with a side for each image.

    A run without the LSEP term may name sides that its token grid does not have: those are the grid's.
    """
    largest = grid if config.window_max is None else min(config.window_max, grid)
    smallest = min(config.window_min, largest)
    u = uniform(seed, Stream.PROBE_WINDOW, part.number, ids)
    size = smallest + (u[:, 0] * (largest - smallest + 1)).to(torch.int64)
    top, left = ((u[:, i] * (grid - size + 1)).to(torch.int64) for i in (1, 2))
    return window_weights(size[:, None], top, left, (grid, grid))


def noised(part: Part, x: Tensor, ids: Tensor, t: Tensor, config: Config, seed: int) -> Tensor:
    """x_t `(B, C, H, W)` of stored rows x at times t `(B,)` on the run's path."""
    m, streams = part.source.manifest, (int(Stream.PROBE_POSTERIOR), int(Stream.PROBE_NOISE))
    path, number = config.interpolant.path, torch.tensor(part.number, device=ids.device)
    return interpolate(x, ids, number, t, seed, m.kind, path, m.shift, m.scale, streams)[0]


def batches(
    model: Features, config: Config, part: Part, t: float, seed: int, depths: Sequence[int], batch_size: int,
    device: torch.device, control: bool,
) -> Iterator[Batch]:  # fmt: skip
    """Tokens of all images of `part` at time t, with `control` also under their labels, in the run's own precision."""
    for start in range(0, len(part.ids), batch_size):
        some = part.ids[start : start + batch_size]
        rows = part.source.read(some)
        ids, x = torch.from_numpy(some).to(device), torch.from_numpy(rows.x).to(device)
        time = torch.full((len(some),), t, device=device)
        x_t = noised(part, x, ids, time, config, seed)
        y = torch.from_numpy(rows.y).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            tokens = model.features(x_t, time, torch.full_like(y, model.null_class), depths)
            labelled = model.features(x_t, time, y, depths) if control else None
        window = draw_windows(config.probe, config.grid, seed, part, ids)
        probe_y = torch.from_numpy(rows.probe_y).to(device)
        yield Batch(slice(start, start + len(some)), tokens, labelled, window, probe_y)
