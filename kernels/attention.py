"""Self-attention over packed `qkv` for short sequences: all keys of a head at once, no online softmax.

    attention(qkv (B, T, 3 D), num_heads) -> (B, T, D)        T <= 256; float16 and bfloat16, sm_90 and sm_100

A head of width 72 is cut into 64 + 8 columns, the 8 padded to 16 (the least a matrix instruction takes), where a power
of two would cost 128. Q, K and V are read from the packed projection and dQ, dK, dV written back packed: no transposes,
no copies. Softmax statistics are float32.

The backward is two kernels without atomics, so it repeats bit for bit: dQ by tiles of queries (which also yields
delta = rowsum(dO O)), then dK and dV by tiles of keys. One kernel for a whole head needs 5 matrix products instead of
7, but compiled for sm_90 at head_dim 72 it spills at 255 registers and ptxas then waits after every one of its 100
WGMMA instructions; these two have no spills (162 and 248 registers) and wait 5 times for 18 and 26.

    B samples, T tokens, D = heads x head_dim
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.limits import missing_attention_kernels
from lsep_kernels.operator import launch, operator, power_of_2

FORWARD = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
BACKWARD_Q = {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8}
BACKWARD_KV = {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 2, "num_warps": 8}
BACKWARD_KV_MASKED = {**BACKWARD_KV, "BLOCK_M": 32}
"""Where T is no multiple of the blocks: the masks take registers, too."""
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(
    base, rows, stride, T,
    HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of one head as two tiles, `(rows, MAIN)` and `(rows, REST)`; zeros past T and past the head."""
    place = rows[:, None] * stride
    main = base + place + tl.arange(0, MAIN)[None, :]
    main = tl.load(main) if EVEN else tl.load(main, mask=(rows < T)[:, None], other=0.0)
    rest = main
    if REST:
        cols = MAIN + tl.arange(0, REST)
        mask = (cols < HEAD)[None, :]
        if not EVEN:
            mask = mask & (rows < T)[:, None]
        rest = tl.load(base + place + cols[None, :], mask=mask, other=0.0)
    return main, rest


@triton.jit
def _store(base, rows, stride, T, main, rest, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    place = rows[:, None] * stride
    inside = (rows < T)[:, None]
    tl.store(base + place + tl.arange(0, MAIN)[None, :], main.to(base.dtype.element_ty), mask=inside)
    if REST:
        cols = MAIN + tl.arange(0, REST)
        mask = inside & (cols < HEAD)[None, :]
        tl.store(base + place + cols[None, :], rest.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _products(a0, a1, b0, b1, REST: tl.constexpr):
    """a b^T, summed over both tiles."""
    out = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if REST:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="ieee")
    return out


@triton.jit
def _accumulate(p, b0, b1, out0, out1, REST: tl.constexpr):
    """out + p b."""
    out0 = tl.dot(p, b0, out0, input_precision="ieee")
    if REST:
        out1 = tl.dot(p, b1, out1, input_precision="ieee")
    return out0, out1


@triton.jit
def _attention_forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, T, H,
    SCALE: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # One dimension of programs, since the others end at 65,535; the tiles of a head are neighbours and share its keys.
    tiles = tl.cdiv(T, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    D = H * HEAD
    base = qkv_ptr + (head // H) * T * 3 * D + (head % H) * HEAD
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_T)
    # V first: its registers on the way to shared memory are free again before the scores take 128 of them.
    v0, v1 = _load(base + 2 * D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
    q0, q1 = _load(base, rows, 3 * D, T, HEAD, MAIN, REST, EVEN)
    k0, k1 = _load(base + D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
    s = _products(q0, q1, k0, k1, REST)
    if not EVEN:
        s = tl.where((keys < T)[None, :], s, float("-inf"))
    to_log2 = SCALE * _LOG2E
    top = tl.max(s, 1) * to_log2
    p = tl.exp2(s * to_log2 - top[:, None])
    total = tl.sum(p, 1)
    out0 = tl.zeros([BLOCK_M, MAIN], tl.float32)
    out1 = tl.zeros([BLOCK_M, REST if REST else 16], tl.float32)
    out0, out1 = _accumulate(p.to(v0.dtype), v0, v1, out0, out1, REST)
    out = out_ptr + (head // H) * T * D + (head % H) * HEAD
    _store(out, rows, D, T, out0 / total[:, None], out1 / total[:, None], HEAD, MAIN, REST)
    tl.store(lse_ptr + head * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_backward_q_kernel(
    qkv_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, H,
    SCALE: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    D = H * HEAD
    packed = (head // H) * T * 3 * D + (head % H) * HEAD
    plain = (head // H) * T * D + (head % H) * HEAD
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o0, o1 = _load(out_ptr + plain, rows, D, T, HEAD, MAIN, REST, EVEN)
    do0, do1 = _load(dout_ptr + plain, rows, D, T, HEAD, MAIN, REST, EVEN)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if REST:
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    lse = tl.load(lse_ptr + head * T + rows, mask=rows < T, other=0.0)
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < T)
    q0, q1 = _load(qkv_ptr + packed, rows, 3 * D, T, HEAD, MAIN, REST, EVEN)
    dq0 = tl.zeros([BLOCK_M, MAIN], tl.float32)
    dq1 = tl.zeros([BLOCK_M, REST if REST else 16], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_N, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_N)
        k0, k1 = _load(qkv_ptr + packed + D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
        v0, v1 = _load(qkv_ptr + packed + 2 * D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
        p = tl.exp2(_products(q0, q1, k0, k1, REST) * (SCALE * _LOG2E) - lse[:, None])
        if not EVEN:  # where all scores are far below 0, exp2(0 - lse) past T is infinite, and times a zero of K a NaN
            p = tl.where((keys < T)[None, :], p, 0.0)
        ds = p * (_products(do0, do1, v0, v1, REST) - delta[:, None])
        dq0, dq1 = _accumulate(ds.to(k0.dtype), k0, k1, dq0, dq1, REST)
    _store(dqkv_ptr + packed, rows, 3 * D, T, dq0 * SCALE, dq1 * SCALE, HEAD, MAIN, REST)


@triton.jit
def _attention_backward_kv_kernel(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, H,
    SCALE: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    D = H * HEAD
    packed = (head // H) * T * 3 * D + (head % H) * HEAD
    plain = (head // H) * T * D + (head % H) * HEAD
    keys = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k0, k1 = _load(qkv_ptr + packed + D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
    v0, v1 = _load(qkv_ptr + packed + 2 * D, keys, 3 * D, T, HEAD, MAIN, REST, EVEN)
    dk0 = tl.zeros([BLOCK_N, MAIN], tl.float32)
    dk1 = tl.zeros([BLOCK_N, REST if REST else 16], tl.float32)
    dv0 = tl.zeros([BLOCK_N, MAIN], tl.float32)
    dv1 = tl.zeros([BLOCK_N, REST if REST else 16], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = _load(qkv_ptr + packed, rows, 3 * D, T, HEAD, MAIN, REST, EVEN)
        do0, do1 = _load(dout_ptr + plain, rows, D, T, HEAD, MAIN, REST, EVEN)
        lse = tl.load(lse_ptr + head * T + rows, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptr + head * T + rows, mask=rows < T, other=0.0)
        # Transposed scores: p and ds feed the next products from registers. Past T, Q and dO are zero; keys past T may
        # overflow, in rows of their own, which are not stored.
        p = tl.exp2(_products(k0, k1, q0, q1, REST) * (SCALE * _LOG2E) - lse[None, :])
        ds = p * (_products(v0, v1, do0, do1, REST) - delta[None, :])
        dv0, dv1 = _accumulate(p.to(v0.dtype), do0, do1, dv0, dv1, REST)
        dk0, dk1 = _accumulate(ds.to(k0.dtype), q0, q1, dk0, dk1, REST)
    _store(dqkv_ptr + packed + D, keys, 3 * D, T, dk0 * SCALE, dk1 * SCALE, HEAD, MAIN, REST)
    _store(dqkv_ptr + packed + 2 * D, keys, 3 * D, T, dv0, dv1, HEAD, MAIN, REST)


def _head(head: int) -> dict[str, float]:
    """Scale of the scores, and the columns: the largest power of two inside a head, and the rest padded to one."""
    main = 1 << (head.bit_length() - 1)
    rest = power_of_2(head - main) if head > main else 0
    return {"SCALE": 1 / math.sqrt(head), "HEAD": head, "MAIN": main, "REST": rest}


@operator("attention")
def _attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    b, t, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head, block = d // num_heads, power_of_2(t)
    out = torch.empty(b, t, d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(b, num_heads, t, dtype=torch.float32, device=qkv.device)
    launch(
        _attention_forward_kernel, (triton.cdiv(t, FORWARD["BLOCK_M"]) * b * num_heads,),
        qkv, out, lse, t, num_heads,
        **_head(head), EVEN=t == block and t % FORWARD["BLOCK_M"] == 0, BLOCK_T=block, **FORWARD,
    )  # fmt: skip
    return out, lse


@operator("attention_backward")
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    b, t, d = out.shape
    head = d // num_heads
    constants = _head(head)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    even = t % max(BACKWARD_Q["BLOCK_M"], BACKWARD_Q["BLOCK_N"]) == 0
    launch(
        _attention_backward_q_kernel, (triton.cdiv(t, BACKWARD_Q["BLOCK_M"]) * b * num_heads,),
        qkv, out, dout, lse, delta, dqkv, t, num_heads, **constants, EVEN=even, LENGTH=t, **BACKWARD_Q,
    )  # fmt: skip
    even = t % max(BACKWARD_KV["BLOCK_M"], BACKWARD_KV["BLOCK_N"]) == 0
    config = BACKWARD_KV if even else BACKWARD_KV_MASKED
    launch(
        _attention_backward_kv_kernel, (triton.cdiv(t, config["BLOCK_N"]) * b * num_heads,),
        qkv, dout, lse, delta, dqkv, t, num_heads, **constants, EVEN=even, LENGTH=t, **config,
    )  # fmt: skip
    return dqkv


@_attention.register_fake
def _(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    b, t, d = qkv.shape
    return qkv.new_empty(b, t, d // 3), qkv.new_empty(b, num_heads, t, dtype=torch.float32)


@_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, *output)


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.num_heads), None


_attention.register_autograd(_gradients, setup_context=_save)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention, see `reference.attention`; raises ValueError for shapes and types that `limits` names."""
    width = qkv.shape[-1]
    if width % (3 * num_heads):
        raise ValueError(f"attention: qkv has width {width}, expected a multiple of 3 x {num_heads} heads")
    problem = missing_attention_kernels(qkv.shape[1], width // (3 * num_heads), qkv.dtype, qkv.device)
    if problem:
        raise ValueError(f"attention: {problem}")
    return _attention(qkv.contiguous(), num_heads)[0]
