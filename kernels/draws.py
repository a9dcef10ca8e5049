"""Random numbers of a step, and the windows drawn with them, by one launch each.

    uniform(seed, stream, epoch, ids) -> (B, 4)
    normal(seed, stream, epoch, ids, shape) -> (B, *shape)
    windows(seed, streams, step, epoch, ids, sides, grid) -> (B, T)

In plain PyTorch ten rounds of Philox are 180 operations on a few integers. uniform and windows give the reference's
numbers bit for bit, normal its words bit for bit and Box-Muller in float32, as `interpolate`.

    B samples, T tokens on a square grid
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.interpolate import random_normal, random_words, signed
from lsep_kernels.operator import check_integers, launch, operator, power_of_2

UNIFORM = {"BLOCK": 128, "num_warps": 4}
"""Samples of a program."""
NORMAL = {"num_warps": 4}
WINDOWS = {"BLOCK_B": 4, "num_warps": 4}


@triton.jit
def _unit(word):
    """A 32-bit word as a float32 in [0, 1), of its upper 24 bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def _uniform_kernel(out_ptr, id_ptr, epoch_ptr, B, seed, draw, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < B
    sample = tl.load(id_ptr + n, mask=mask, other=0)
    w0, w1, w2, w3 = random_words(seed, tl.zeros_like(n), sample, tl.load(epoch_ptr), draw)
    # (4, B): the caller takes one number of each sample, dense.
    tl.store(out_ptr + n, _unit(w0), mask=mask)
    tl.store(out_ptr + B + n, _unit(w1), mask=mask)
    tl.store(out_ptr + 2 * B + n, _unit(w2), mask=mask)
    tl.store(out_ptr + 3 * B + n, _unit(w3), mask=mask)


@triton.jit
def _normal_kernel(out_ptr, id_ptr, epoch_ptr, numel, seed, draw, BLOCK: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK * 4 + tl.arange(0, 4 * BLOCK)
    z = random_normal(seed, block, tl.load(id_ptr + n), tl.load(epoch_ptr), draw, BLOCK)
    tl.store(out_ptr + n * numel + i, z, mask=i < numel)


@triton.jit
def _windows_kernel(
    out_ptr, id_ptr, step_ptr, epoch_ptr, B, seed, side_draw, place_draw,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, GRID: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = n < B
    first = tl.zeros([BLOCK_B], tl.int64)
    w, _, _, _ = random_words(seed, first, tl.load(step_ptr), first, side_draw)  # the same for all, of epoch 0
    size = SMALLEST + (_unit(w) * (LARGEST - SMALLEST + 1)).to(tl.int32)
    sample = tl.load(id_ptr + n, mask=mask, other=0)
    w0, w1, _, _ = random_words(seed, first, sample, tl.load(epoch_ptr), place_draw)
    room = (GRID - size + 1).to(tl.float32)
    top, left = (_unit(w0) * room).to(tl.int32), (_unit(w1) * room).to(tl.int32)
    i = tl.arange(0, BLOCK_T)
    row, col = (i // GRID)[None, :], (i % GRID)[None, :]
    top, left, size = top[:, None], left[:, None], size[:, None]
    inside = (row >= top) & (row < top + size) & (col >= left) & (col < left + size)
    weights = tl.where(inside, tl.div_rn(1.0, (size * size).to(tl.float32)), 0.0)
    place = n.to(tl.int64)[:, None] * (GRID * GRID) + i[None, :]
    tl.store(out_ptr + place, weights, mask=mask[:, None] & (i < GRID * GRID)[None, :])


@operator("uniform")
def _uniform(ids: Tensor, epoch: Tensor, seed: int, stream: int) -> Tensor:
    out = torch.empty(4, len(ids), dtype=torch.float32, device=ids.device)
    launch(
        _uniform_kernel, (triton.cdiv(len(ids), UNIFORM["BLOCK"]),), out, ids, epoch, len(ids), seed, stream, **UNIFORM
    )  # fmt: skip
    return out


@operator("normal")
def _normal(ids: Tensor, epoch: Tensor, seed: int, stream: int, numel: int) -> Tensor:
    out = torch.empty(len(ids), numel, dtype=torch.float32, device=ids.device)
    block = min(power_of_2(triton.cdiv(numel, 4), 1), 256)
    launch(
        _normal_kernel, (triton.cdiv(numel, 4 * block), len(ids)), out, ids, epoch, numel, seed, stream,
        BLOCK=block, **NORMAL,
    )  # fmt: skip
    return out


@operator("windows")
def _windows(
    ids: Tensor, step: Tensor, epoch: Tensor, seed: int, side: int, place: int, smallest: int, largest: int, grid: int
) -> Tensor:
    out = torch.empty(len(ids), grid * grid, dtype=torch.float32, device=ids.device)
    launch(
        _windows_kernel, (triton.cdiv(len(ids), WINDOWS["BLOCK_B"]),), out, ids, step, epoch, len(ids),
        seed, side, place, SMALLEST=smallest, LARGEST=largest, GRID=grid, BLOCK_T=power_of_2(grid * grid), **WINDOWS,
    )  # fmt: skip
    return out


@_uniform.register_fake
def _(ids: Tensor, epoch: Tensor, seed: int, stream: int) -> Tensor:
    return ids.new_empty(4, len(ids), dtype=torch.float32)


@_normal.register_fake
def _(ids: Tensor, epoch: Tensor, seed: int, stream: int, numel: int) -> Tensor:
    return ids.new_empty(len(ids), numel, dtype=torch.float32)


@_windows.register_fake
def _(
    ids: Tensor, step: Tensor, epoch: Tensor, seed: int, side: int, place: int, smallest: int, largest: int, grid: int
) -> Tensor:
    return ids.new_empty(len(ids), grid * grid, dtype=torch.float32)


def _checked(name: str, epoch: Tensor | int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids contiguous, and the epoch as a tensor beside them."""
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=ids.device)
    check_integers(name, ids=ids, epoch=epoch)
    if ids.ndim != 1 or epoch.numel() != 1:
        raise ValueError(f"{name}: ids is {tuple(ids.shape)}, epoch {tuple(epoch.shape)}, expected (B,) and a scalar")
    return ids.contiguous(), epoch


def uniform(seed: int, stream: int, epoch: Tensor | int, ids: Tensor) -> Tensor:
    """Uniform float32 numbers `(B, 4)` in [0, 1), see `reference.uniform`; each of the four columns is dense.

    ids `(B,)` int64 below 2^48, epoch an int64 scalar or a number, seed in [0, 2^64).
    """
    ids, epoch = _checked("uniform", epoch, ids)
    return _uniform(ids, epoch, signed(seed), stream).t()


def normal(seed: int, stream: int, epoch: Tensor | int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers `(B, *shape)`, see `reference.normal`; arguments as of `uniform`."""
    ids, epoch = _checked("normal", epoch, ids)
    return _normal(ids, epoch, signed(seed), stream, math.prod(shape)).unflatten(1, shape)


def windows(
    seed: int, streams: tuple[int, int], step: Tensor, epoch: Tensor, ids: Tensor, sides: tuple[int, int], grid: int
) -> Tensor:
    """Pooling weights `(B, grid^2)` float32 of drawn windows, see `reference.windows`; step an int64 scalar."""
    ids, epoch = _checked("windows", epoch, ids)
    check_integers("windows", step=step)
    return _windows(ids, step, epoch, signed(seed), *streams, *sides, grid)
