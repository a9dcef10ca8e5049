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
    """The first layer `(D, 2 half)` over another embedding of t in [0, 1], by least squares, and its relative error.

    An embedding is (factor of t, divisor of the frequencies). The error is the largest over t and outputs, as a share
    of the largest output.
    """
    half = weight.shape[1] // 2
    t = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    before, after = (embed(t * factor, half, divisor) for factor, divisor in (source, target))
    wanted = before @ weight.double().T
    # Slow frequencies are nearly alike over [0, 1]: gelsd leaves out what they cannot tell apart.
    fitted = torch.linalg.lstsq(after, wanted, rcond=1e-13, driver="gelsd").solution.T.to(weight.dtype)
    error = (after @ fitted.double().T - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return fitted, float(error)
