"""Two ways to count time and two ways to embed it: exact conversions, and a least-squares one where there is none.

Here, in REPA and in LSEP x_t = (1 - t) x + t e, so t = 1 is noise, and v = e - x. SiT has x_t = t x + (1 - t) e and
v = x - e: its velocity at 1 - t is minus ours at t.
"""

import math

import torch
from torch import Tensor

from lsep.weights.read import Tensors

TIME, HEAD = "t_embedder.mlp.0.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
_GRID = 2001
"""Times at which embeddings are compared."""
_CUTOFFS = [10.0**-k for k in range(3, 14)]
"""Of singular values, as shares of the largest."""
WORST_FIT = 1e-2
"""Relative error of a refitted layer above which it is of no use."""


def flip_time(tensors: Tensors) -> Tensors:
    """Weights of one convention as those of the other, either way: v(x, t) becomes -v(x, 1 - t) for every x and t."""
    turned = {TIME: rotate(tensors[TIME]), **{name: -tensors[name] for name in HEAD}}
    return {name: turned.get(name, tensor) for name, tensor in tensors.items()}


def rotate(weight: Tensor) -> Tensor:
    """First layer `(D, 256)` over the embedding of t as that over the embedding of 1 - t.

    With frequencies f: cos((1 - t) f) = cos f cos(t f) + sin f sin(t f), and sin likewise. Its own inverse.
    """
    half = weight.shape[1] // 2
    f = frequencies(half, half)
    c, s = weight.double().split(half, dim=1)
    return torch.cat([c * f.cos() + s * f.sin(), c * f.sin() - s * f.cos()], dim=1).to(weight.dtype)


def frequencies(half: int, divisor: int) -> Tensor:
    """Of the embedding, float64: 10000^(-i / divisor); SiT divides by half, diffusers by half - 1."""
    return torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / divisor)


def embed(t: Tensor, half: int, divisor: int) -> Tensor:
    """Cosines, then sines `(len(t), 2 half)` float64 of the times t."""
    angles = t.double()[:, None] * frequencies(half, divisor)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def refit(weight: Tensor, source: tuple[float, int], target: tuple[float, int]) -> tuple[Tensor, float]:
    """The first layer `(D, 2 half)` float32 over another embedding of t in [0, 1], by least squares, and its error.

    An embedding is (factor of t, divisor of the frequencies). The error is the largest over t and outputs, as a share
    of the largest output, of the layer as it is stored and used: float32 weights over a float32 embedding.
    """
    half = weight.shape[1] // 2
    t = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    before, after = (embed(t * factor, half, divisor) for factor, divisor in (source, target))
    wanted = before @ weight.double().T
    largest, used = wanted.abs().max().clamp(min=1e-30), after.float()
    u, s, v = torch.linalg.svd(after, full_matrices=False)
    # Slow frequencies are nearly alike over [0, 1]. Weights that tell them apart, up to 1 / the cut-off, cancel each
    # other, and float32 rounds that to noise: so the cut-off is the one whose layer is best when rounded.
    best = (torch.zeros_like(weight, dtype=torch.float32), math.inf)
    for cut in _CUTOFFS:
        kept = s > cut * s[0]
        fitted = ((v[kept].T / s[kept]) @ (u[:, kept].T @ wanted)).T.float().contiguous()
        error = float((used @ fitted.T - wanted).abs().max() / largest)
        if error < best[1]:  # NaN, of weights beyond float32, is not
            best = (fitted, error)
    return best


def refit_or_anew(weight: Tensor, source: tuple[float, int], target: tuple[float, int]) -> tuple[Tensor, str]:
    """As `refit`; where that is more than `WORST_FIT` off, the layer of a new model instead. And what was done."""
    fitted, error = refit(weight, source, target)
    if error <= WORST_FIT:
        return fitted, f"its time layer is refitted, with a relative error of {error:.1e} as stored"
    anew = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))  # as `SiT.initialize` does
    return anew, f"its time layer is initialised anew: refitted to t in [0, 1] it would be off by {error:.1e}"
