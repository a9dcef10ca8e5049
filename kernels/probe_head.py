"""The probe's classifier and its loss: LayerNorm, linear map and weighted cross-entropy, gradients included.

    probe_head(features, norm_weight, norm_bias, weight, bias, labels, sample_weight, label_smoothing, dtype)

The upstream gradient of a loss is one scalar, so the forward operator computes all gradients for the scalar 1 while
logits and probabilities are at hand, and the backward multiplies. The features are a few hundred rows: what counts is
the number of launches and that each fills the GPU, hence one plain matrix product used three times (logits, gradient
of the features, gradient of the weight) between row kernels. Sums over the batch run in a fixed order, without atomics.

    B samples, D width, K classes
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.operator import check, check_integers, launch, operator, power_of_2

EPS = 1e-5
"""As in `nn.LayerNorm`."""
ROW = {"num_warps": 4}
SOFTMAX_BLOCK = 2048
"""Classes one program of the softmax holds at a time."""
BACKWARD = {"ROWS": 4, "num_warps": 4}
MATMUL = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_L": 64, "num_warps": 4, "num_stages": 4}
"""64 rows and 4 warps are what one WGMMA takes; narrow columns give 128 programs for 256 x 1000 logits."""
MATMUL_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_L": 32, "num_warps": 4, "num_stages": 3}
"""Exact float32 products run on the ordinary units and hold their operands in registers."""


@triton.jit
def _probe_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, D, EPSILON: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + EPSILON)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    h = centred * rstd * weight + bias
    tl.store(h_ptr + row * D + cols, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _probe_matmul_kernel(
    a_ptr, b_ptr, bias_ptr, like_ptr, out_ptr, M,
    N: tl.constexpr, L: tl.constexpr, AM: tl.constexpr, AL: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over l of a[m, l] b[l, n], + bias[n]; operands rounded to the type of `like`, sums float32.

    Strides are constants: 1000 classes are no multiple of 16, yet rows of them begin at multiples of 16 bytes.
    """
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_row, inside_col = rows < M, cols < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, L, BLOCK_L):
        inner = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        inside = inner < L
        a = tl.load(
            a_ptr + rows[:, None] * AM + inner[None, :] * AL, mask=inside_row[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + inner[:, None] * BL + cols[None, :] * BN, mask=inside[:, None] & inside_col[None, :], other=0.0
        )
        a, b = a.to(like_ptr.dtype.element_ty), b.to(like_ptr.dtype.element_ty)
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + cols, mask=inside_col, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], total, mask=inside_row[:, None] & inside_col[None, :])


@triton.jit
def _probe_loss_kernel(
    logits_ptr, label_ptr, sample_weight_ptr, loss_ptr, hit_ptr, dlogits_ptr,
    SMOOTHING: tl.constexpr, K: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weighted loss of one row, its hit and its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * K
    cols = tl.arange(0, BLOCK_K)
    label = tl.load(label_ptr + row)
    sample_weight = tl.load(sample_weight_ptr + row).to(tl.float32)
    largest = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < K, other=float("-inf"))
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    # Relative to the largest logit, so that neither the exponentials nor the sum for the smoothing lose digits.
    exponentials = tl.zeros([BLOCK_K], tl.float32)
    shifted = tl.zeros([BLOCK_K], tl.float32)
    at_label = tl.zeros([BLOCK_K], tl.float32)
    first = tl.full([BLOCK_K], 2147483647, tl.int32)
    for start in range(0, K, BLOCK_K):
        inside = start + cols < K
        x = tl.load(logits_ptr + start + cols, mask=inside, other=0.0) - top
        exponentials += tl.where(inside, tl.exp(x), 0.0)
        shifted += tl.where(inside, x, 0.0)
        at_label += tl.where(start + cols == label, x, 0.0)
        first = tl.minimum(first, tl.where(inside & (x == 0), start + cols, 2147483647))
    total = tl.sum(exponentials, 0)
    loss = tl.log(total) - (1 - SMOOTHING) * tl.sum(at_label, 0) - SMOOTHING * (tl.sum(shifted, 0) / K)
    tl.store(loss_ptr + row, sample_weight * loss)
    tl.store(hit_ptr + row, tl.min(first, 0).to(tl.int64) == label)
    if GRADIENTS:
        for start in range(0, K, BLOCK_K):
            inside = start + cols < K
            x = tl.load(logits_ptr + start + cols, mask=inside, other=0.0) - top
            target = tl.where(start + cols == label, 1 - SMOOTHING, 0.0) + SMOOTHING / K
            dlogits = sample_weight * (tl.exp(x) / total - target)
            tl.store(dlogits_ptr + row * K + start + cols, dlogits, mask=inside)


@triton.jit
def _probe_norm_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, B, D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = cols < tl.where(row < B, D, 0)
        row = tl.minimum(row, B - 1)
        place = row * D + cols
        dh = tl.load(dh_ptr + place, mask=mask, other=0.0)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        dbias += dh
        dweight += dh * xhat
        # d xhat = dh weight; dx = rstd (d xhat - mean(d xhat) - xhat mean(d xhat xhat))
        dxhat = dh * weight
        dx = (dxhat - tl.sum(dxhat, 0) / D - xhat * (tl.sum(dxhat * xhat, 0) / D)) * rstd
        tl.store(dx_ptr + place, dx, mask=mask)
    # (2, programs, D)
    place = program * D + cols
    tl.store(sums_ptr + place, dweight, mask=inside)
    tl.store(sums_ptr + tl.num_programs(0).to(tl.int64) * D + place, dbias, mask=inside)


def _product(a: Tensor, b: Tensor, like: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` float32 of a `(M, L)` and b `(L, N)`, any strides, in the precision of `like`."""
    (m, inner), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device=a.device)
    config = MATMUL_FLOAT32 if like.dtype == torch.float32 else MATMUL
    launch(
        _probe_matmul_kernel, (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(m, config["BLOCK_M"])),
        a, b, like if bias is None else bias, like, out, m, N=n, L=inner,
        AM=a.stride(0), AL=a.stride(1), BL=b.stride(0), BN=b.stride(1), BIAS=bias is not None, **config,
    )  # fmt: skip
    return out


@operator("probe_head")
def _probe_head(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
    sample_weight: Tensor, label_smoothing: float, dtype: torch.dtype, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, hits and `gradients` of features, LayerNorm `(2, D)`, weight and bias: float32, or empty without them."""
    (b, d), k = features.shape, len(weight)
    new = partial(torch.empty, dtype=torch.float32, device=features.device)
    h, hits = new(b, d, dtype=dtype), new(b, dtype=torch.bool)
    mean, rstd, losses = new(b), new(b), new(b)
    unit = _unit(sample_weight) if dtype == torch.float16 else None
    if unit is not None:
        sample_weight = sample_weight / unit
    block_d, block_k = power_of_2(d), min(power_of_2(k), SOFTMAX_BLOCK)
    launch(
        _probe_norm_kernel, (b,), features, norm_weight, norm_bias, h, mean, rstd, d,
        EPSILON=EPS, BLOCK_D=block_d, **ROW,
    )  # fmt: skip
    logits = _product(h, weight.T, h, bias)
    dlogits = torch.empty_like(logits) if gradients else new(0)
    launch(
        _probe_loss_kernel, (b,), logits, labels, sample_weight, losses, hits, dlogits,
        SMOOTHING=label_smoothing, K=k, GRADIENTS=gradients, BLOCK_K=block_k, **ROW,
    )  # fmt: skip
    loss = losses.sum() if unit is None else losses.sum() * unit
    if not gradients:
        return loss, hits, dlogits, new(0), new(0), new(0)
    dfeatures, programs = new(b, d), triton.cdiv(b, BACKWARD["ROWS"])
    sums = new(2, programs, d)
    dh = _product(dlogits, weight, h)
    launch(
        _probe_norm_backward_kernel, (programs,), dh, features, norm_weight, mean, rstd, dfeatures, sums, b, d,
        BLOCK_D=block_d, **BACKWARD,
    )  # fmt: skip
    found = dfeatures, sums.sum(1), _product(dlogits.T, h, h), dlogits.sum(0)
    dfeatures, dnorm, dweight, dbias = found if unit is None else (g * unit for g in found)
    return loss, hits, dfeatures, dnorm, dweight, dbias


def _unit(sample_weight: Tensor) -> Tensor:
    """The power of two at the largest weight: divided by it, gradients of weights near 10^-4 survive float16."""
    return torch.exp2(torch.floor(torch.log2(sample_weight.float().abs().amax().clamp(min=2.0**-60))))


@_probe_head.register_fake
def _(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
    sample_weight: Tensor, label_smoothing: float, dtype: torch.dtype, gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    new = partial(torch.empty, dtype=torch.float32, device=features.device)
    shapes: list[tuple[int, ...]] = [(0,)] * 4
    if gradients:
        shapes = [features.shape, (2, features.shape[1]), weight.shape, bias.shape]
    return new(()), new(len(features), dtype=torch.bool), *(new(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.types = [x.dtype for x in inputs[:5]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # only the loss has an upstream gradient: no zeros for the others
    ctx.save_for_backward(*output[2:])


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    dfeatures, dnorm, dweight, dbias = ctx.saved_tensors
    gradients = (dfeatures, dnorm[0], dnorm[1], dweight, dbias)
    scaled = ((dloss * g).to(dtype) for g, dtype in zip(gradients, ctx.types, strict=True))
    return *scaled, None, None, None, None, None


_probe_head.register_autograd(_scale_gradients, setup_context=_save)


def probe_head(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
    sample_weight: Tensor, label_smoothing: float, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted cross-entropy of the probe and its hits, see `reference.probe_head`.

    features `(B, D)`, norm_weight and norm_bias `(D,)`, weight `(K, D)`, bias `(K,)`, labels `(B,)` int64,
    sample_weight `(B,)`; the matrix products take operands of `dtype`, by default the type of `weight`. Returns the
    loss, a float32 scalar, and hits `(B,)` bool. labels and sample_weight get no gradient.
    """
    (b, d), k = features.shape, len(weight)
    check("probe_head", (d,), norm_weight=norm_weight, norm_bias=norm_bias)
    check("probe_head", (k, d), weight=weight)
    check("probe_head", (k,), bias=bias)
    check("probe_head", (b,), labels=labels, sample_weight=sample_weight)
    check_integers("probe_head", labels=labels)
    inputs = tuple(x.contiguous() for x in (features, norm_weight, norm_bias, weight, bias))
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    loss, hits, *_ = _probe_head(
        *inputs, labels.contiguous(), sample_weight.detach().contiguous(), label_smoothing, dtype or weight.dtype,
        gradients,
    )  # fmt: skip
    return loss, hits
