"""adaLN in two fused operators: LayerNorm + modulation, and gate + residual + LayerNorm + modulation.

    norm_modulate(x, shift, scale)                           h = LN(x) (1 + scale) + shift
    gate_residual_norm_modulate(x, gate, y, shift, scale)    x' = x + gate y;  h = LN(x') (1 + scale) + shift

Both read each activation once and write each result once: 4 and 8 bytes an element forward in bf16, 6 and 12 backward.
With `quantize` they write h in fp8 besides, for the matrix product that follows (`fp8`): one byte more.
The modulation's gradients are sums over tokens; each program sums its tokens in float32 in a fixed order and the few
partial sums of a sample are added afterwards, so that nothing of full size is written and the result is the same bit
for bit in every run (no atomics).

    N samples, T tokens, D width
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.fp8 import empty_quantized, store_quantized
from lsep_kernels.operator import check, dense_rows, launch, operator, power_of_2
from lsep_kernels.reference import E4M3, Activation, Quantized
from lsep_kernels.row_sums import sum_rows

FORWARD = {"ROWS": 4, "num_warps": 8}
BACKWARD = {"ROWS": 1, "STAGES": 2, "num_warps": 8}
TOKENS = 32
"""Tokens whose modulation gradients one program sums: partial sums cost 2 x 4 / TOKENS bytes an element each."""


@triton.jit
def _adaln_forward_kernel(
    x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, sum_ptr, h_ptr, mean_ptr, rstd_ptr, fp8_ptr, fp8_scale_ptr,
    T, D, gate_stride, shift_stride, scale_stride,
    EPS: tl.constexpr, GATED: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside_row, inside = tokens < T, cols < D
    mask = inside_row[:, None] & inside[None, :]
    rows = n * T + tokens
    place = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + n * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
        x += gate[None, :] * tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, rounded, mask=mask)
        x = rounded.to(tl.float32)  # the backward only sees the stored value: normalise that one
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + EPS)
    scale = tl.load(scale_ptr + n * scale_stride + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + n * shift_stride + cols, mask=inside, other=0.0).to(tl.float32)
    h = centred * rstd[:, None] * (1 + scale[None, :]) + shift[None, :]
    h = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + place, h, mask=mask)
    if QUANTIZE:
        h = tl.where(mask, h.to(tl.float32), 0.0)
        store_quantized(h, place, mask, rows, inside_row, fp8_ptr, fp8_scale_ptr)
    tl.store(mean_ptr + rows, mean, mask=inside_row)
    tl.store(rstd_ptr + rows, rstd, mask=inside_row)


@triton.jit
def _adaln_backward_kernel(
    dsum_ptr, dh_ptr, x_ptr, gate_ptr, y_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_ptr, partial_ptr,
    T, D, gate_stride, scale_stride,
    GATED: tl.constexpr, STREAM: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    scale = 1 + tl.load(scale_ptr + n * scale_stride + cols, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + n * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, TOKENS, ROWS, num_stages=STAGES):
        tokens = chunk * TOKENS + start + tl.arange(0, ROWS)
        inside_row = tokens < T
        mask = inside_row[:, None] & inside[None, :]
        rows = n * T + tokens
        place = rows[:, None] * D + cols[None, :]
        dh = tl.load(dh_ptr + place, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=inside_row, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=inside_row, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dshift += tl.sum(dh, 0)
        dscale += tl.sum(dh * xhat, 0)
        # d xhat = dh (1 + scale); dx = rstd (d xhat - mean(d xhat) - xhat mean(d xhat xhat))
        dxhat = dh * scale[None, :]
        along = tl.sum(dxhat * xhat, 1) / D
        dx = (dxhat - (tl.sum(dxhat, 1) / D)[:, None] - xhat * along[:, None]) * rstd[:, None]
        if STREAM:
            dx += tl.load(dsum_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
            dgate += tl.sum(tl.where(mask, dx * y, 0.0), 0)
            tl.store(dy_ptr + place, (dx * gate[None, :]).to(dy_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # partial sums (3 or 2, N, chunks, D)
    place = (n * tl.num_programs(0) + chunk) * D + cols
    whole = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
    tl.store(partial_ptr + place, dshift, mask=inside)
    tl.store(partial_ptr + whole + place, dscale, mask=inside)
    if GATED:
        tl.store(partial_ptr + 2 * whole + place, dgate, mask=inside)


def _run_forward(
    x: Tensor, gate: Tensor | None, y: Tensor | None, shift: Tensor, scale: Tensor, eps: float, quantize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(x + gate y, h, mean, rstd, fp8, its scale)`; the first without a gate, the last two unquantized are empty."""
    n, t, d = x.shape
    total = torch.empty_like(x) if gate is not None else x.new_empty(0)
    h = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    mean, rstd = (torch.empty(n, t, dtype=torch.float32, device=x.device) for _ in range(2))
    fp8, fp8_scale = empty_quantized(*x.shape, device=x.device) if quantize else (x.new_empty(0), x.new_empty(0))
    launch(
        _adaln_forward_kernel, (triton.cdiv(t, FORWARD["ROWS"]), n),
        x, x if gate is None else gate, x if y is None else y, shift, scale, total, h, mean, rstd,
        fp8, fp8_scale, t, d, 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
        EPS=eps, GATED=gate is not None, QUANTIZE=quantize, BLOCK_D=power_of_2(d), **FORWARD,
    )  # fmt: skip
    return total, h, mean, rstd, fp8.to(E4M3) if quantize else fp8, fp8_scale


def _run_backward(
    dsum: Tensor | None, dh: Tensor, x: Tensor, gate: Tensor | None, y: Tensor | None, scale: Tensor, mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(dx, dy, sums)`, sums `(2 or 3, N, D)` = dshift, dscale and dgate in the type of `scale`."""
    n, t, d = x.shape
    gated = gate is not None
    dx = torch.empty_like(x)
    dy = x.new_empty(0) if y is None else torch.empty_like(y)
    tokens = min(t, TOKENS)
    chunks = triton.cdiv(t, tokens)
    partial = torch.empty(3 if gated else 2, n, chunks, d, dtype=torch.float32, device=x.device)
    launch(
        _adaln_backward_kernel, (chunks, n),
        x if dsum is None else dsum, dh, x, x if gate is None else gate, x if y is None else y, scale, mean, rstd,
        dx, dy, partial, t, d, 0 if gate is None else gate.stride(0), scale.stride(0),
        GATED=gated, STREAM=dsum is not None, TOKENS=tokens, BLOCK_D=power_of_2(d), **BACKWARD,
    )  # fmt: skip
    return dx, dy, sum_rows(partial.flatten(0, 1), scale.dtype).unflatten(0, partial.shape[:2])


@operator("norm_modulate")
def _norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, quantize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run_forward(x, None, None, shift, scale, eps, quantize)[1:]


@operator("norm_modulate_backward")
def _norm_modulate_backward(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, sums = _run_backward(None, dh, x, None, None, scale, mean, rstd)
    return dx, sums


@operator("gate_residual_norm_modulate")
def _gate_residual_norm_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, quantize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run_forward(x, gate, y, shift, scale, eps, quantize)


@operator("gate_residual_norm_modulate_backward")
def _gate_residual_norm_modulate_backward(
    dsum: Tensor | None, dh: Tensor, x: Tensor, gate: Tensor, y: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_backward(dsum, dh, x, gate, y, scale, mean, rstd)


@_norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, quantize: bool) -> tuple[Tensor, ...]:
    return torch.empty_like(x, dtype=shift.dtype), *_fake_statistics(x), *_fake_quantized(x, quantize)


@_norm_modulate_backward.register_fake
def _(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(x), scale.new_empty(2, *scale.shape)


@_gate_residual_norm_modulate.register_fake
def _(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, quantize: bool
) -> tuple[Tensor, ...]:
    h = torch.empty_like(x, dtype=shift.dtype)
    return torch.empty_like(x), h, *_fake_statistics(x), *_fake_quantized(x, quantize)


@_gate_residual_norm_modulate_backward.register_fake
def _(
    dsum: Tensor | None, dh: Tensor, x: Tensor, gate: Tensor, y: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(y), scale.new_empty(3, *scale.shape)


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def _fake_quantized(x: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
    if not quantize:
        return x.new_empty(0), x.new_empty(0)
    return torch.empty_like(x, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, _, _ = inputs
    ctx.set_materialize_grads(False)  # the fp8 form has no gradient: no zeros for it
    ctx.save_for_backward(x, scale, *output[1:3])


def _norm_gradients(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, sums = _norm_modulate_backward(dh.contiguous(), *ctx.saved_tensors)
    return dx, sums[0], sums[1], None, None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, y, _, scale, _, _ = inputs
    total, _, mean, rstd, _, _ = output
    ctx.set_materialize_grads(False)  # nothing reads the stream after the last block: no zeros for its gradient
    ctx.save_for_backward(total, gate, y, scale, mean, rstd)


def _gated_gradients(ctx: Any, dsum: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, gate, y, scale, mean, rstd = ctx.saved_tensors
    if dh is None:  # only the stream was used
        dh = torch.zeros_like(total, dtype=scale.dtype)
    dsum = None if dsum is None else dsum.contiguous()
    dx, dy, sums = _gate_residual_norm_modulate_backward(
        dsum, dh.contiguous(), total, gate, y, scale, mean, rstd
    )  # fmt: skip
    return dx, sums[2], dy, sums[0], sums[1], None, None


_norm_modulate.register_autograd(_norm_gradients, setup_context=_save_norm)
_gate_residual_norm_modulate.register_autograd(_gated_gradients, setup_context=_save_gated)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, quantize: bool = False) -> Activation:
    """`LN(x) (1 + scale) + shift`, see `reference.norm_modulate`; x `(N, T, D)`, shift and scale `(N, D)`."""
    n, _, d = x.shape
    check("norm_modulate", (n, d), shift=shift, scale=scale)
    h, _, _, *fp8 = _norm_modulate(x.contiguous(), dense_rows(shift), dense_rows(scale), eps, quantize)
    return Quantized(h, *fp8) if quantize else h


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, quantize: bool = False
) -> tuple[Tensor, Activation]:
    """`x + gate y` and its `norm_modulate`, see `reference.gate_residual_norm_modulate`."""
    n, _, d = x.shape
    check("gate_residual_norm_modulate", (n, d), gate=gate, shift=shift, scale=scale)
    check("gate_residual_norm_modulate", tuple(x.shape), y=y)
    gate, shift, scale = (dense_rows(m) for m in (gate, shift, scale))
    total, h, _, _, *fp8 = _gate_residual_norm_modulate(
        x.contiguous(), gate, y.contiguous(), shift, scale, eps, quantize
    )  # fmt: skip
    return total, Quantized(h, *fp8) if quantize else h
