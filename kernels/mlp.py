"""The MLP of a block with one hidden activation kept for its backward, not two.

    mlp(x (..., D), weight1 (H, D), bias1 (H,), weight2 (D, H), bias2 (D,)) -> (..., D)    GELU(x W1^T + b1) W2^T + b2

Plain PyTorch keeps z = x W1^T + b1 for GELU's gradient and h = GELU(z) for W2's. `mlp` keeps z alone, and the kernel
that reads z and dh for dz writes h again in the same pass, with sums over rows of dz for the gradient of b1. Bytes an
element of the hidden activation in half precision, beside those of the matrix products: forward 4 (read z, write h),
backward 8 (read z and dh, write dz and h), the same 12 as in PyTorch, where dz is read for the sums and h is not
written; but H a token less stay in memory, 4 of a block's 18 widths. Sums are float32 in a fixed order.

`mlp_cublaslt` is the same by cuBLASLt, whose products end in what surrounds GELU: z and h leave the first product, dz
and the gradient of b1 the product dy W2. That leaves 4 bytes, to write h again from z.

    M rows, D width, H hidden
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels import cublaslt
from lsep_kernels.gelu_pool import gelu_gate, gelu_slope
from lsep_kernels.operator import check, launch, operator
from lsep_kernels.row_sums import sum_rows

FORWARD = {"BLOCK": 2048, "num_warps": 4}
BACKWARD = {"BLOCK_M": 16, "BLOCK_N": 128, "STAGES": 2, "num_warps": 4}
ROWS = 256
"""Rows a program adds up: the partial sums are a 256th of a hidden activation, in float32."""


@triton.jit
def _mlp_gelu_kernel(z_ptr, h_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(h_ptr + i, (z * gelu_gate(z)).to(h_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def _mlp_gelu_backward_kernel(
    dh_ptr, z_ptr, dz_ptr, h_ptr, partial_ptr, M, H,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, ROWS, BLOCK_M, num_stages=STAGES):
        rows = chunk * ROWS + start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (cols < H)[None, :]
        place = rows[:, None] * H + cols[None, :]
        z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gate = gelu_gate(z)
        dz = dh * gelu_slope(z, gate)
        tl.store(h_ptr + place, (z * gate).to(h_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        total += dz
    tl.store(partial_ptr + chunk * H + cols, tl.sum(total, 0), mask=cols < H)


def gelu(z: Tensor) -> Tensor:
    """`GELU_tanh(z)`."""
    h = torch.empty_like(z)
    launch(_mlp_gelu_kernel, (triton.cdiv(z.numel(), FORWARD["BLOCK"]),), z, h, z.numel(), **FORWARD)
    return h


def gelu_backward(dh: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dz = dh GELU_tanh'(z)`, its sum over rows `(H,)` and `h = GELU_tanh(z)`; dh, z, dz and h `(M, H)`."""
    m, hidden = z.shape
    chunks = triton.cdiv(m, ROWS)
    dz, h = torch.empty_like(z), torch.empty_like(z)
    partial = torch.empty(chunks, hidden, dtype=torch.float32, device=z.device)
    launch(
        _mlp_gelu_backward_kernel, (triton.cdiv(hidden, BACKWARD["BLOCK_N"]), chunks),
        dh, z, dz, h, partial, m, hidden, ROWS=ROWS, **BACKWARD,
    )  # fmt: skip
    return dz, sum_rows(partial[None], z.dtype)[0], h


def _gradients_of_products(dy: Tensor, x: Tensor, h: Tensor, dz: Tensor, weight1: Tensor) -> tuple[Tensor, ...]:
    """`dx, dweight1, dweight2, dbias2`."""
    return dz @ weight1, dz.t() @ x, dy.t() @ h, dy.sum(0, dtype=torch.float32).to(dy.dtype)


@operator("mlp")
def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """The result `(M, D)` and z `(M, H)`."""
    z = torch.addmm(bias1, x, weight1.t())
    return torch.addmm(bias2, gelu(z), weight2.t()), z


@operator("mlp_backward")
def _mlp_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2."""
    dz, dbias1, h = gelu_backward(dy @ weight2, z)
    dx, dweight1, dweight2, dbias2 = _gradients_of_products(dy, x, h, dz, weight1)
    return dx, dweight1, dbias1, dweight2, dbias2


# Opaque operators: what they call is no part of a graph that torch.compile could look into.
@torch.library.custom_op("lsep::mlp_cublaslt", mutates_args=())
def _mlp_cublaslt(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """As `_mlp`."""
    h, z = cublaslt.linear_gelu(x, weight1, bias1)
    return torch.addmm(bias2, h, weight2.t()), z


@torch.library.custom_op("lsep::mlp_cublaslt_backward", mutates_args=())
def _mlp_cublaslt_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_mlp_backward`."""
    dz, dbias1 = cublaslt.linear_gelu_backward(dy, weight2, z)
    dx, dweight1, dweight2, dbias2 = _gradients_of_products(dy, x, gelu(z), dz, weight1)
    return dx, dweight1, dbias1, dweight2, dbias2


def _fake(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(x), x.new_empty(x.shape[0], weight1.shape[0])


def _fake_backward(dy: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, ...]:
    d, hidden = weight2.shape
    return tuple(x.new_empty(s) for s in (x.shape, (hidden, d), (hidden,), (d, hidden), (d,)))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight1, _, weight2, _ = inputs
    ctx.set_materialize_grads(False)  # nobody reads z: no zeros of its size for its gradient
    ctx.save_for_backward(x, output[1], weight1, weight2)


def _gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, ...]:
    return _mlp_backward(dy.contiguous(), *ctx.saved_tensors)


def _gradients_cublaslt(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, ...]:
    return _mlp_cublaslt_backward(dy.contiguous(), *ctx.saved_tensors)


for _operator in (_mlp, _mlp_cublaslt):
    _operator.register_fake(_fake)
for _operator in (_mlp_backward, _mlp_cublaslt_backward):
    _operator.register_fake(_fake_backward)
_mlp.register_autograd(_gradients, setup_context=_save)
_mlp_cublaslt.register_autograd(_gradients_cublaslt, setup_context=_save)


def _run(by: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    (hidden, d), flat = weight1.shape, x.reshape(-1, x.shape[-1])
    check("mlp", (len(flat), d), x=flat)
    check("mlp", (d, hidden), weight2=weight2)
    check("mlp", (hidden,), bias1=bias1)
    check("mlp", (d,), bias2=bias2)
    # The type of x rules: under autocast it is the products' already, and weights may be float32 or copies in bf16.
    weights = (w.to(x.dtype).contiguous() for w in (weight1, bias1, weight2, bias2))
    with torch.autocast(x.device.type, enabled=False):
        return by(flat.contiguous(), *weights)[0].view(x.shape)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`GELU(x W1^T + b1) W2^T + b2`, see `reference.mlp`, in the type of x."""
    return _run(_mlp, x, weight1, bias1, weight2, bias2)


def mlp_cublaslt(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """As `mlp`, with GELU in cuBLASLt's products; ValueError for shapes and types `cublaslt.missing` names."""
    return _run(_mlp_cublaslt, x, weight1, bias1, weight2, bias2)
