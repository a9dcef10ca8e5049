"""Sums over rows in a fixed order: what the partial sums of other kernels' programs end in.

    sum_rows(x (S, R, D), dtype) -> (S, D)    out[s, d] = sum over r of x[s, r, d], in float32, rounded once

Left to torch.compile, such a sum is a kernel whose blocks are chosen by a timing, and with them the order of the sum.
Here blocks follow from R alone. A program sums up to LIMIT rows of some columns; more rows take a second round.

    S sums, R rows each, D columns
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.operator import launch, power_of_2

LIMIT = 512
"""Rows one program adds up at most; beyond, programs of ROWS give partial sums again."""
ROWS = 64
TILE = 2048
"""Elements of a tile: 16 a thread."""


@triton.jit
def _row_sums_kernel(
    x_ptr, out_ptr, D, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    place = (tl.program_id(0) // blocks).to(tl.int64)  # of the result, (S, R / ROWS)
    chunks = tl.cdiv(R, ROWS)
    sample, first = place // chunks, (place % chunks) * ROWS
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        inner = start + tl.arange(0, BLOCK_R)
        mask = ((inner < ROWS) & (first + inner < R))[:, None] & (cols < D)[None, :]
        rows = sample * R + first + inner
        total += tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place * D + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < D)


def sum_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums `(S, D)` of x `(S, R, D)`, contiguous and of any floating type, over R, in `dtype`."""
    s, r, d = x.shape
    rows = r if r <= LIMIT else ROWS
    chunks = triton.cdiv(r, rows)
    out = torch.empty(s, chunks, d, dtype=dtype if chunks == 1 else torch.float32, device=x.device)
    block_r = min(power_of_2(rows, 1), ROWS)
    block_d = min(TILE // block_r, 256, power_of_2(d))
    launch(
        _row_sums_kernel, (triton.cdiv(d, block_d) * s * chunks,), x, out, d,
        R=r, ROWS=rows, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out[:, 0] if chunks == 1 else sum_rows(out, dtype)
