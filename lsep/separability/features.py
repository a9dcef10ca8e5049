"""Features of a trained model at given depths and one time, pooled three ways, for probes to be fitted to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep import probe
from lsep.config import Config, ProbeConfig
from lsep.data.manifest import Ids, Manifest, Source
from lsep.interpolant import Stream
from lsep.model import SiT
from lsep_kernels.reference import interpolate

TOKEN_BYTES = 2 << 30
"""Most memory for the features of single tokens."""


class Features(NamedTuple):
    """Of n images at L depths, float32 on the CPU."""

    pooled: Tensor
    """`(n, L, D)`: means over all tokens."""
    windowed: Tensor
    """`(n, L, D)`: means over a random window, as the LSEP term takes them."""
    tokens: Tensor
    """`(n, k, L, D)`: of k random tokens an image."""
    places: Tensor
    """`(n, k)`: which tokens these are."""


def windows(grid: int) -> ProbeConfig:
    """The paper's windows on any grid, 12 to 16 of 16 tokens: the same for all runs, whatever they trained with."""
    return ProbeConfig(window_min=max(1, grid * 3 // 4), window_max=grid)


def tokens_an_image(images: int, depths: int, config: Config) -> int:
    """How many single tokens of each image fit the memory, at most 16 and all."""
    room = TOKEN_BYTES // (4 * images * depths * config.model.hidden_size)
    return int(max(1, min(16, config.grid**2, room)))


@torch.no_grad()
def extract(
    model: SiT,
    config: Config,
    manifest: Manifest,
    source: Source,
    ids: Ids,
    t: float,
    seed: int,
    depths: Sequence[int],
    tokens: int,
    batch_size: int,
    labelled: bool = False,
) -> Features:
    """Features of the images `ids`, noised to time t with noise of (seed, id), after the blocks `depths`.

    labelled: with the true label in the conditioning, otherwise with none.
    """
    device, grid = model.pos_embed.device, config.grid
    rng, zero = np.random.default_rng([seed, tokens]), torch.zeros((), dtype=torch.int64, device=device)
    places = torch.from_numpy(np.stack([rng.permutation(grid**2)[:tokens] for _ in ids]))
    streams = (int(Stream.POSTERIOR), int(Stream.NOISE))
    parts: list[list[Tensor]] = [[], [], []]
    for start in range(0, len(ids), batch_size):
        chosen = ids[start : start + batch_size]
        rows = source.read(chosen)
        own, times = torch.from_numpy(chosen).to(device), torch.full((len(chosen),), t, device=device)
        x, _ = interpolate(
            torch.from_numpy(rows.x).to(device), own, zero, times, seed, manifest.kind, config.interpolant.path,
            manifest.shift, manifest.scale, streams,
        )  # fmt: skip
        y = torch.from_numpy(rows.y).to(device) if labelled else torch.full_like(own, model.null_class)
        window = probe.draw_windows(windows(grid), grid, seed, zero, zero, own)
        stream = torch.stack([f.float() for f in model.features(x, times, y, depths)], 1)  # (B, L, T, D)
        at = places[start : start + batch_size].to(device)
        single = stream.gather(2, at[:, None, :, None].expand(-1, stream.shape[1], -1, stream.shape[3]))
        for part, values in zip(
            parts, (stream.mean(2), torch.einsum("bltd,bt->bld", stream, window), single.transpose(1, 2)), strict=True
        ):
            part.append(values.cpu())
    pooled, windowed, single = (torch.cat(part) for part in parts)
    return Features(pooled, windowed, single, places)
