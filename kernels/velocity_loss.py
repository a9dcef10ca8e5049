"""The denoising loss on patches: mean squared error of each sample, without writing the unpatchified prediction.

    velocity_loss(patches, v, patch)

The forward reads 2 + 4 bytes an element in bf16 and writes next to nothing, the backward reads the same and writes 2.
Every program sums its elements in float32 in a fixed order; there are no atomics.

    N samples, T tokens, C channels, p side of a patch
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.operator import check, launch, operator
from lsep_kernels.row_sums import sum_rows

CONFIG = {"CHUNK": 4096, "BLOCK": 1024, "num_warps": 4}
"""A program sums CHUNK elements, the whole sample of a 32 x 32 x 4 latent, BLOCK at a time."""


@triton.jit
def _velocity(v_ptr, n, i, numel, mask, CHANNELS: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr):
    """Elements i of sample n's target in the order of the patches: token row, token column, row, column, channel."""
    channel = i % CHANNELS
    column = i // CHANNELS % PATCH + i // (CHANNELS * PATCH * PATCH) % GRID * PATCH
    row = i // (CHANNELS * PATCH) % PATCH + i // (CHANNELS * PATCH * PATCH * GRID) * PATCH
    place = (channel * (GRID * PATCH) + row) * (GRID * PATCH) + column
    return tl.load(v_ptr + n * numel + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _velocity_loss_forward_kernel(
    patches_ptr, v_ptr, partial_ptr, numel,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK)
        mask = i < numel
        predicted = tl.load(patches_ptr + n * numel + i, mask=mask, other=0.0).to(tl.float32)
        difference = predicted - _velocity(v_ptr, n, i, numel, mask, CHANNELS, PATCH, GRID)
        total += difference * difference
    tl.store(partial_ptr + n * tl.num_programs(0) + chunk, tl.sum(total, 0) / numel)


@triton.jit
def _velocity_loss_backward_kernel(
    dloss_ptr, patches_ptr, v_ptr, dpatches_ptr, numel,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    factor = tl.load(dloss_ptr + n).to(tl.float32) * (2.0 / numel)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK)
        mask = i < numel
        predicted = tl.load(patches_ptr + n * numel + i, mask=mask, other=0.0).to(tl.float32)
        difference = predicted - _velocity(v_ptr, n, i, numel, mask, CHANNELS, PATCH, GRID)
        tl.store(dpatches_ptr + n * numel + i, (factor * difference).to(dpatches_ptr.dtype.element_ty), mask=mask)


def _layout(v: Tensor, patch: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid of the launch over v `(N, C, H, W)` and the layout of its patches."""
    n, channels, _, width = v.shape
    chunks = triton.cdiv(math.prod(v.shape[1:]), CONFIG["CHUNK"])
    return (chunks, n), {"CHANNELS": channels, "PATCH": patch, "GRID": width // patch, **CONFIG}


@operator("velocity_loss")
def _velocity_loss(patches: Tensor, v: Tensor, patch: int) -> Tensor:
    grid, meta = _layout(v, patch)
    partial = torch.empty(grid[1], grid[0], dtype=torch.float32, device=v.device)
    launch(_velocity_loss_forward_kernel, grid, patches, v, partial, math.prod(v.shape[1:]), **meta)
    return partial.flatten() if grid[0] == 1 else sum_rows(partial[..., None])[:, 0]


@operator("velocity_loss_backward")
def _velocity_loss_backward(dloss: Tensor, patches: Tensor, v: Tensor, patch: int) -> Tensor:
    grid, meta = _layout(v, patch)
    dpatches = torch.empty_like(patches)
    launch(_velocity_loss_backward_kernel, grid, dloss, patches, v, dpatches, math.prod(v.shape[1:]), **meta)
    return dpatches


@_velocity_loss.register_fake
def _(patches: Tensor, v: Tensor, patch: int) -> Tensor:
    return torch.empty(len(patches), dtype=torch.float32, device=patches.device)


@_velocity_loss_backward.register_fake
def _(dloss: Tensor, patches: Tensor, v: Tensor, patch: int) -> Tensor:
    return torch.empty_like(patches)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, v, ctx.patch = inputs
    ctx.save_for_backward(patches, v)


def _gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    return _velocity_loss_backward(dloss.contiguous(), *ctx.saved_tensors, ctx.patch), None, None


_velocity_loss.register_autograd(_gradients, setup_context=_save)


def velocity_loss(patches: Tensor, v: Tensor, patch: int) -> Tensor:
    """Mean squared error of each sample `(N,)` float32, see `reference.velocity_loss`.

    patches `(N, T, p p C)` on a square grid, channels last inside a patch, v `(N, C, H, W)`; v gets no gradient.
    """
    patches, v = patches.contiguous(), v.contiguous()
    n, channels, height, width = v.shape
    grid = math.isqrt(patches.shape[1])
    check("velocity_loss", (n, grid * grid, patch * patch * channels), patches=patches)
    if (height, width) != (grid * patch, grid * patch):
        raise ValueError(f"velocity_loss: v is {height} x {width}, {grid} x {grid} patches of {patch} are not")
    return _velocity_loss(patches, v, patch)
