"""The matrix products of a block in fp8: `linear` and `mlp`, through `torch._scaled_mm`.

    linear(x (..., K), weight (N, K), bias (N,)) -> (..., N)
    mlp(x (..., K), weight1 (H, K), bias1 (H,), weight2 (N, H), bias2 (N,)) -> (..., N)

Operands are rounded to e4m3 with a float32 scale for each of their rows, see `reference.quantize_rows`; the scales are
those of the tensor at hand, so nothing is carried from step to step. Y = X W^T and dX = dY W run in fp8, W with a scale
for each of its rows in the one and of its columns in the other. dW = dY^T X stays in bf16: its sum runs over tokens, so
that X and dY would have to be written once more, transposed and with scales for their columns, and it is the product
whose error goes into the weights (torchao calls this recipe `rowwise_with_gw_hp`).

What writes an operand writes its fp8 form as well: the norms of `adaln`, GELU and its backward here. Only attention's
output and the gradients that come into `linear` are read once more for it. The gradient of a bias is summed on the way;
GELU is computed again in the backward, for dW, and not kept. Activations are bf16; weights may be float32. No
atomics: the result is the same bit for bit in every run.

    M rows; K, H, N widths, multiples of 16
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.gelu_pool import gelu_gate, gelu_slope
from lsep_kernels.operator import INTERPRETED, check, launch, operator, power_of_2
from lsep_kernels.reference import E4M3, Activation, Quantized
from lsep_kernels.row_sums import sum_rows

ROWS = {"ROWS": 1, "num_warps": 4}
GELU = {"ROWS": 1, "num_warps": 8}
GELU_BACKWARD = {"ROWS": 1, "num_warps": 16}
COLUMNS = {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4}
TOKENS = 32
"""Rows over which one program sums the gradient of a bias: partial sums cost 2 x 4 / TOKENS bytes an element."""
LEAST = tl.constexpr(27 << 23)  # 2^-100 as `magnitude` has it: a row of zeros has a scale, and its inverse is finite
BUFFER = torch.float32 if INTERPRETED else E4M3
"""Kernels round to the type they write. Triton's interpreter loses a carry in e4m3: there torch rounds, afterwards."""


@triton.jit
def magnitude(x):
    """|x| of float32 as an integer: a maximum of floats may drop a NaN, of these integers it is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """The scale of rows whose largest `magnitude` this is: 1 / 448 of it."""
    return tl.div_rn(tl.maximum(largest, LEAST).to(tl.float32, bitcast=True), 448.0)


@triton.jit
def store_quantized(x, place, mask, rows, inside_row, out_ptr, scale_ptr):
    """Rows of x `(R, D)` float32, zero where `mask` is not, as fp8 and with their scales."""
    scale = scale_of(tl.max(magnitude(x), 1))
    tl.store(out_ptr + place, (x * tl.div_rn(1.0, scale)[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=inside_row)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, partial_ptr, M, D,
    SUMS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    if SUMS:
        total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, TOKENS, ROWS):
        rows = chunk * TOKENS + start + tl.arange(0, ROWS)
        inside_row = rows < M
        mask = inside_row[:, None] & (cols < D)[None, :]
        place = rows[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        store_quantized(x, place, mask, rows, inside_row, out_ptr, scale_ptr)
        if SUMS:
            total += tl.sum(x, 0)
    if SUMS:
        tl.store(partial_ptr + chunk * D + cols, total, mask=cols < D)


@triton.jit
def _quantize_columns_kernel(
    w_ptr, out_ptr, scale_ptr, K, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_K], tl.int32)
    for start in tl.range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (cols < K)[None, :]
        w = tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(w), 0))
    scale = scale_of(largest)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + cols, scale, mask=cols < K)
    for start in tl.range(0, N, BLOCK_N):  # the second time from the L2 cache
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (cols < K)[None, :]
        w = tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = (w * inverse[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols[None, :] * N + rows[:, None], w, mask=mask)


@triton.jit
def _gelu_quantize_kernel(
    z_ptr, out_ptr, scale_ptr, M, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside_row = rows < M
    mask = inside_row[:, None] & (cols < D)[None, :]
    place = rows[:, None] * D + cols[None, :]
    z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
    store_quantized(z * gelu_gate(z), place, mask, rows, inside_row, out_ptr, scale_ptr)


@triton.jit
def _gelu_backward_quantize_kernel(
    da_ptr, z_ptr, a_ptr, dz_ptr, out_ptr, scale_ptr, partial_ptr, M, D,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, TOKENS, ROWS):
        rows = chunk * TOKENS + start + tl.arange(0, ROWS)
        inside_row = rows < M
        mask = inside_row[:, None] & (cols < D)[None, :]
        place = rows[:, None] * D + cols[None, :]
        z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
        gate = gelu_gate(z)
        tl.store(a_ptr + place, (z * gate).to(a_ptr.dtype.element_ty), mask=mask)
        dz = tl.load(da_ptr + place, mask=mask, other=0.0).to(tl.float32) * gelu_slope(z, gate)
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        store_quantized(dz, place, mask, rows, inside_row, out_ptr, scale_ptr)
        total += tl.sum(dz, 0)
    tl.store(partial_ptr + chunk * D + cols, total, mask=cols < D)


def empty_quantized(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for an fp8 form and its scales; what a kernel wrote there is read as `.to(E4M3)`."""
    fp8 = torch.empty(shape, dtype=BUFFER, device=device)
    return fp8, torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device)


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `(..., D)` as fp8 `(..., D)` and scales `(..., 1)`."""
    d = x.shape[-1]
    m = x.numel() // d
    fp8, scale = empty_quantized(*x.shape, device=x.device)
    launch(
        _quantize_rows_kernel, (triton.cdiv(m, ROWS["ROWS"]),), x, fp8, scale, scale, m, d,
        SUMS=False, TOKENS=ROWS["ROWS"], BLOCK_D=power_of_2(d), **ROWS,
    )  # fmt: skip
    return fp8.to(E4M3), scale


def _rows_and_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x `(M, D)` as fp8 and scales, and its sums over rows `(D,)` float32."""
    m, d = x.shape
    chunks = triton.cdiv(m, TOKENS)
    fp8, scale = empty_quantized(m, d, device=x.device)
    partial = torch.empty(chunks, d, dtype=torch.float32, device=x.device)
    launch(
        _quantize_rows_kernel, (chunks,), x, fp8, scale, partial, m, d,
        SUMS=True, TOKENS=TOKENS, BLOCK_D=power_of_2(d), **ROWS,
    )  # fmt: skip
    return fp8.to(E4M3), scale, sum_rows(partial[None])[0]


def _columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight `(N, K)` turned, as fp8 `(K, N)` and scales `(K, 1)`."""
    n, k = weight.shape
    fp8, scale = empty_quantized(k, n, device=weight.device)
    launch(
        _quantize_columns_kernel, (triton.cdiv(k, COLUMNS["BLOCK_K"]),), weight, fp8, scale, k, N=n, **COLUMNS
    )  # fmt: skip
    return fp8.to(E4M3), scale


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of z `(M, D)` as fp8 and scales."""
    m, d = z.shape
    fp8, scale = empty_quantized(m, d, device=z.device)
    launch(
        _gelu_quantize_kernel, (triton.cdiv(m, GELU["ROWS"]),), z, fp8, scale, m, d,
        BLOCK_D=power_of_2(d), **GELU,
    )  # fmt: skip
    return fp8.to(E4M3), scale


def _gelu_backward(da: Tensor, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """GELU of z `(M, D)`; dz, the same as fp8 with its scales, and its sums over rows `(D,)` float32."""
    m, d = z.shape
    chunks = triton.cdiv(m, TOKENS)
    a, dz = torch.empty_like(z), torch.empty_like(z)
    fp8, scale = empty_quantized(m, d, device=z.device)
    partial = torch.empty(chunks, d, dtype=torch.float32, device=z.device)
    launch(
        _gelu_backward_quantize_kernel, (chunks,), da, z, a, dz, fp8, scale, partial, m, d,
        TOKENS=TOKENS, BLOCK_D=power_of_2(d), **GELU_BACKWARD,
    )  # fmt: skip
    return a, dz, (fp8.to(E4M3), scale), sum_rows(partial[None])[0]


@cache
def _scales_rows(device: str) -> bool:
    """Whether torch._scaled_mm takes a scale for each row there: of torch 2.11 on a CPU it takes one a tensor."""
    if device != "cpu":
        return True
    operand, scale = torch.ones(16, 16, dtype=E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(operand, operand.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
    """`a b^T + bias` in bf16; a `(M, K)` and b `(N, K)` as fp8 with their scales."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    device = a[0].device.type
    with torch.autocast(device, enabled=False):  # a CPU computes it as a float32 product, which that rounds
        if not _scales_rows(device):
            wide = (a[0].float() * a[1]) @ (b[0].float() * b[1]).t()
            return (wide if bias is None else wide + bias).to(torch.bfloat16)
        return torch._scaled_mm(
            a[0], b[0].t(), scale_a=a[1], scale_b=b[1].t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )  # fmt: skip


@operator("fp8_quantize_rows")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return _rows(x)


@operator("fp8_linear")
def _linear(x: Tensor, fp8: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _product((fp8, scale), _rows(weight), bias)


@operator("fp8_linear_backward")
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy8, scale, dbias = _rows_and_sums(dy)
    dx = _product((dy8, scale), _columns(weight))
    return dx, (dy.t() @ x).to(weight.dtype), dbias


@operator("fp8_mlp")
def _mlp(
    x: Tensor, fp8: Tensor, scale: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    z = _product((fp8, scale), _rows(weight1), bias1)
    return _product(_gelu(z), _rows(weight2), bias2), z


@operator("fp8_mlp_backward")
def _mlp_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy8, scale, dbias2 = _rows_and_sums(dy)
    a, dz, dz8, dbias1 = _gelu_backward(_product((dy8, scale), _columns(weight2)), z)
    dweight2 = (dy.t() @ a).to(weight2.dtype)
    dx = _product(dz8, _columns(weight1))
    return dx, (dz.t() @ x).to(weight1.dtype), dbias1, dweight2, dbias2


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@_linear.register_fake
def _(x: Tensor, fp8: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight), dtype=torch.float32)


@_mlp.register_fake
def _(
    x: Tensor, fp8: Tensor, scale: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight2)), x.new_empty(len(x), len(weight1))


@_mlp_backward.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, ...]:
    dbias1, dbias2 = (w.new_empty(len(w), dtype=torch.float32) for w in (weight1, weight2))
    return torch.empty_like(x), torch.empty_like(weight1), dbias1, torch.empty_like(weight2), dbias2


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_type = bias.dtype


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _linear_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, None, None, dweight, dbias.to(ctx.bias_type)


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, weight1, bias1, weight2, bias2 = inputs
    ctx.set_materialize_grads(False)  # no zeros for a gradient of the hidden layer
    ctx.save_for_backward(x, output[1], weight1, weight2)
    ctx.bias_types = bias1.dtype, bias2.dtype


def _mlp_gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dx, dweight1, dbias1, dweight2, dbias2 = _mlp_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, None, None, dweight1, dbias1.to(ctx.bias_types[0]), dweight2, dbias2.to(ctx.bias_types[1])


_linear.register_autograd(_linear_gradients, setup_context=_save_linear)
_mlp.register_autograd(_mlp_gradients, setup_context=_save_mlp)


def quantize_rows(x: Tensor) -> Quantized:
    """x `(..., K)` bf16 with its fp8 form, see `reference.quantize_rows`."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"quantize_rows: x is {x.dtype}, expected torch.bfloat16")
    return Quantized(x, *_quantize_rows(x.detach().contiguous()))


def linear(x: Activation, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b` in fp8: x `(..., K)`, weight `(N, K)`, bias `(N,)`; `(..., N)` bf16."""
    x = x if isinstance(x, Quantized) else quantize_rows(x)
    _check("linear", x, weight, bias)
    return _linear(*(part.flatten(0, -2) for part in x), weight, bias).unflatten(0, x.value.shape[:-1])


def mlp(x: Activation, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`GELU(x W1^T + b1) W2^T + b2` in fp8: x `(..., K)`, weight1 `(H, K)`, weight2 `(N, H)`; `(..., N)` bf16."""
    x = x if isinstance(x, Quantized) else quantize_rows(x)
    _check("mlp", x, weight1, bias1)
    check("mlp", (weight2.shape[0], weight1.shape[0]), weight2=weight2)
    flat = (part.flatten(0, -2) for part in x)
    return _mlp(*flat, weight1, bias1, weight2, bias2)[0].unflatten(0, x.value.shape[:-1])


def _check(name: str, x: Quantized, weight: Tensor, bias: Tensor) -> None:
    check(name, (weight.shape[0], x.value.shape[-1]), weight=weight)
    check(name, (weight.shape[0],), bias=bias)
