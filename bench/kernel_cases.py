"""The operators `bench.gpu` checks and times: their inputs, their reference, and the least work they can do.

A case is one operator in one type at one shape. `check_cases` are small batches of many types and shapes, `time_cases`
the batch of a training step of SiT-XL/2 in bf16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsep_kernels import adaln, attention, fp8, gelu_pool, interpolate, mlp, ops, probe_head, reference, velocity_loss

Operation = Callable[..., Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Draw:
    """Random tensors on one device, a function of the seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Work:
    """The least an operator must do, whoever computes it."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operator in one type at one shape."""

    name: str
    dtype: torch.dtype
    kernel: Operation
    reference: Operation
    """The same in plain PyTorch and the same type."""
    make: Callable[[Draw], list[Tensor]]
    """Fresh inputs; floating ones have the types of a training step."""
    grads: int
    """So many of the first inputs take a gradient."""
    forward: Work
    backward: Work | None = None
    truth: Operation | None = None
    """As `reference`, on float64 inputs; None is `reference` itself."""
    floor: float = 1e-6
    """Error that is allowed in any case, as a share of the largest entry."""
    heads: int = 0
    """Of attention, where libraries compete."""

    @property
    def title(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Sizes:
    """Shapes of the cases."""

    batch: int = 12
    tokens: int = 256
    long: int = 1024
    """Tokens at 512 px, which the operators beside attention take as well."""
    width: int = 1152
    widths: tuple[int, ...] = (384, 768)
    heads: tuple[tuple[int, int], ...] = ((16, 72), (6, 64))
    """Heads and their width."""
    classes: int = 1000


CHECK = Sizes()
TIME = replace(CHECK, batch=256)
SMOKE = Sizes(batch=2, tokens=4, long=16, width=48, widths=(32,), heads=((2, 24), (1, 16)), classes=10)
SMOKE_GPU = replace(SMOKE, tokens=256, long=1024, width=144, widths=(64,), heads=((2, 72), (1, 64)))
"""Attention's kernels take these tokens and heads alone."""


def sizes(smoke: bool, device: torch.device, full: Sizes) -> Sizes:
    """`full`, or those of a smoke test on `device`."""
    if not smoke:
        return full
    return SMOKE_GPU if device.type == "cuda" else SMOKE


def norm_modulate(n: int, t: int, d: int, dtype: torch.dtype, stream: torch.dtype | None = None) -> Case:
    """`stream` is the type of the residual stream, by default `dtype`."""

    def make(draw: Draw) -> list[Tensor]:
        return [draw.normal(n, t, d, dtype=stream or dtype), *_modulation(draw, n, d, dtype, 2)]

    size = n * t * d * dtype.itemsize
    return Case(
        f"norm_modulate T={t} D={d}{_stream(stream)}", dtype, adaln.norm_modulate, reference.norm_modulate, make, 3,
        Work(2 * size), Work(3 * size),
    )  # fmt: skip


def gate_residual(n: int, t: int, d: int, dtype: torch.dtype, stream: torch.dtype | None = None) -> Case:
    """`gate_residual_norm_modulate`."""

    def make(draw: Draw) -> list[Tensor]:
        gate, shift, scale = _modulation(draw, n, d, dtype, 3)
        return [draw.normal(n, t, d, dtype=stream or dtype), gate, draw.normal(n, t, d, dtype=dtype), shift, scale]

    size = n * t * d * dtype.itemsize
    return Case(
        f"gate_residual_norm_modulate T={t} D={d}{_stream(stream)}", dtype, adaln.gate_residual_norm_modulate,
        reference.gate_residual_norm_modulate, make, 5, Work(4 * size), Work(6 * size),
    )  # fmt: skip


def _stream(stream: torch.dtype | None) -> str:
    return "" if stream is None else f" {str(stream).removeprefix('torch.')} stream"


def _modulation(draw: Draw, n: int, d: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Parts `(N, D)` of one projection `(N, 6 D)`, with its strides."""
    return list(draw.normal(n, 6 * d, dtype=dtype).chunk(6, -1)[:count])


def attend(n: int, t: int, heads: int, head: int, dtype: torch.dtype) -> Case:
    """Attention."""
    width = heads * head
    size, product = n * t * width * dtype.itemsize, 2 * n * heads * t * t * head

    def make(draw: Draw) -> list[Tensor]:
        return [draw.normal(n, t, 3 * width, dtype=dtype)]

    def kernel(qkv: Tensor) -> Tensor:
        return attention.attention(qkv, heads)

    return Case(
        f"attention T={t} heads={heads}x{head}", dtype, kernel, partial(reference.attention, num_heads=heads), make, 1,
        Work(4 * size, 2 * product), Work(8 * size, 5 * product), heads=heads,
    )  # fmt: skip


def feed_forward(n: int, t: int, d: int, dtype: torch.dtype, by: str = "triton") -> Case:
    """`mlp` with a hidden width of 4 D, by Triton or by cuBLASLt."""

    def make(draw: Draw) -> list[Tensor]:
        return [
            draw.normal(n, t, d, dtype=dtype), (draw.normal(4 * d, d) / d**0.5).to(dtype),
            draw.normal(4 * d, dtype=dtype), (draw.normal(d, 4 * d) / (4 * d) ** 0.5).to(dtype),
            draw.normal(d, dtype=dtype),
        ]  # fmt: skip

    size, product = n * t * d * dtype.itemsize, 2 * n * t * d * 4 * d
    return Case(
        f"mlp T={t} D={d} {by}", dtype, mlp.mlp if by == "triton" else mlp.mlp_cublaslt, reference.mlp, make, 5,
        Work(6 * size, 2 * product), Work(7 * size, 4 * product),
    )  # fmt: skip


def cublaslt_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """`mlp` by cuBLASLt, where there is a GPU."""
    types = FLOATS[1:] if device.type == "cuda" else ()
    return [feed_forward(sizes.batch, sizes.tokens, sizes.width, dtype, "cublaslt") for dtype in types]


def gelu_backward(m: int, d: int, dtype: torch.dtype) -> Case:
    """The kernel inside the backward of `mlp`: both results of GELU and the sums, from z and dh."""

    def make(draw: Draw) -> list[Tensor]:
        return [draw.normal(m, d, dtype=dtype) for _ in range(2)]

    def plain(dh: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        dz = torch.ops.aten.gelu_backward(dh, z, approximate="tanh")
        return dz, dz.sum(0), reference.gelu(z)

    work = Work(4 * m * d * dtype.itemsize)
    return Case(f"gelu_backward M={m} H={d}", dtype, mlp.gelu_backward, plain, make, 0, work)


def pooling(n: int, t: int, d: int, dtype: torch.dtype, gelu: bool) -> Case:
    """`gelu_pool` or `pool` with windows of 7/8 of the grid's side, about the mean of those in training."""
    grid = math.isqrt(t)
    side = round(grid * 7 / 8)
    inside = side * side / t  # tokens that have to be read

    def make(draw: Draw) -> list[Tensor]:
        top, left = (draw.integers(grid - side + 1, n) for _ in range(2))
        size = torch.full((), side, dtype=torch.int64, device=draw.device)
        return [draw.normal(n, t, d, dtype=dtype), reference.window_weights(size, top, left, (grid, grid))]

    name = "gelu_pool" if gelu else "pool"
    size = n * t * d * dtype.itemsize
    return Case(
        f"{name} T={t} D={d}", dtype, getattr(gelu_pool, name), getattr(reference, name), make, 1,
        Work(inside * size), Work((1 + inside * gelu) * size),
    )  # fmt: skip


def product(n: int, t: int, d: int, name: str) -> Case:
    """fp8 `linear` from d to 3 d, as `attn.qkv`, or `mlp`, beside bf16; entries of fp8 are off by up to 2^-4."""
    sizes = [(3 * d, d), (3 * d,)] if name == "linear" else [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]

    def make(draw: Draw) -> list[Tensor]:
        bf16 = torch.bfloat16
        return [draw.normal(n, t, d, dtype=bf16), *((0.05 * draw.normal(*s)).to(bf16) for s in sizes)]

    m = n * t
    size, weights = m * d, sum(math.prod(s) for s in sizes)
    flops = 2 * m * weights
    wide = sizes[0][0] + (d if name == "mlp" else 0)  # what the products write
    # Forward wholly at the rate of fp8, twice that of bf16; backward half of it.
    return Case(
        f"fp8 {name} T={t} D={d}", torch.bfloat16, getattr(fp8, name), getattr(reference, name), make, 1 + len(sizes),
        Work(2 * (size + m * wide), flops / 2), Work(2 * (2 * size + m * wide), 1.5 * flops), floor=0.125,
    )  # fmt: skip


def quantizing(n: int, t: int, d: int) -> Case:
    """`gate_residual_norm_modulate` that writes fp8 as well, its result read back from there."""

    def make(draw: Draw) -> list[Tensor]:
        gate, shift, scale = _modulation(draw, n, d, torch.bfloat16, 3)
        x, y = (draw.normal(n, t, d, dtype=torch.bfloat16) for _ in range(2))
        return [x, gate, y, shift, scale]

    def kernel(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, h = adaln.gate_residual_norm_modulate(*inputs, quantize=True)
        assert isinstance(h, reference.Quantized)
        return total, h.value, (h.fp8.float() * h.scale).detach().to(torch.bfloat16)

    def plain(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, h = reference.gate_residual_norm_modulate(*inputs)
        return total, h, h.detach()

    size = 2 * n * t * d
    return Case(
        f"gate_residual_norm_modulate with fp8 T={t} D={d}", torch.bfloat16, kernel, plain, make, 5,
        Work(4.5 * size), Work(6 * size), floor=2**-4,
    )  # fmt: skip


def has_fp8(device: torch.device) -> bool:
    """Whether the cases of fp8 run there; PyTorch has their product for CPUs as well."""
    return ops.missing_fp8("triton", device) is None


def probe(b: int, d: int, k: int, dtype: torch.dtype) -> Case:
    """`probe_head` over float32 weights; its forward computes the gradients as well."""

    def make(draw: Draw) -> list[Tensor]:
        values = [draw.normal(b, d), 1 + 0.1 * draw.normal(d), 0.1 * draw.normal(d), 0.05 * draw.normal(k, d)]
        values.append(0.1 * draw.normal(k))
        h = torch.nn.functional.layer_norm(values[0].double(), (d,), values[1].double(), values[2].double(), eps=1e-5)
        logits = h @ values[3].double().T + values[4].double()
        best, second = torch.topk(logits, 2).values.unbind(-1)
        # About half of the samples are hits, and no rounding can change which.
        hit = (best - second > 0.1) & (draw.uniform(b) < 0.5)
        labels = torch.where(hit, logits.argmax(-1), logits.median(-1).indices)
        return [*values, labels, draw.uniform(b) / b]

    def run(by: Any, dtype: torch.dtype | None) -> Operation:
        return lambda *inputs: by.probe_head(*inputs, 0.1, dtype)

    return Case(
        f"probe_head D={d} classes={k}", dtype, run(probe_head, dtype), run(reference, dtype), make, 5,
        Work(4 * 2 * (2 * k * d + 2 * b * d), 6 * b * k * d), Work(4 * 2 * (k * d + b * d)),
        truth=run(reference, torch.float64),
    )  # fmt: skip


def noising(b: int, side: int, form: str, path: str = "linear") -> Case:
    """`interpolate`; its truth is the reference on the CPU, since every number is float32."""

    def make(draw: Draw) -> list[Tensor]:
        channels = 8 if form == "moments" else 4
        shape = (b, channels, side, side)
        if form == "pixels":
            rows = draw.integers(256, *shape).to(torch.uint8)
        else:
            rows = draw.normal(*shape, dtype=torch.float16)
        return [rows, draw.integers(2**48, b), draw.integers(1000, 1)[0], draw.uniform(b)]

    def run(by: Any) -> Operation:
        return lambda *inputs: by.interpolate(*inputs, 2**40 + 7, form, path, 0.1, 0.18215, (0, 1))

    def truth(rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        wide = rows.float() if rows.is_floating_point() else rows
        found = run(reference)(wide.cpu(), ids.cpu(), epoch.cpu(), t.float().cpu())
        return tuple(x.to(rows.device) for x in found)

    stored = {"moments": 2 * 2, "samples": 2, "pixels": 1}[form]
    return Case(
        f"interpolate {form} {path}", torch.float32, run(interpolate), run(reference), make, 0,
        Work(b * 4 * side * side * (stored + 8)), truth=truth, floor=1e-5,
    )  # fmt: skip


def loss(n: int, t: int, dtype: torch.dtype) -> Case:
    """`velocity_loss` of patches of 2 x 2 x 4."""
    side = 2 * math.isqrt(t)

    def make(draw: Draw) -> list[Tensor]:
        return [draw.normal(n, t, 16, dtype=dtype), draw.normal(n, 4, side, side)]

    def run(by: Any) -> Operation:
        return lambda patches, v: by.velocity_loss(patches, v, 2)

    size = n * t * 16
    return Case(
        f"velocity_loss T={t}", dtype, run(velocity_loss), run(reference), make, 1,
        Work(size * (dtype.itemsize + 4)), Work(size * (2 * dtype.itemsize + 4)),
    )  # fmt: skip


def check_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """All types at the shapes of XL/2, one type at the others."""
    n, t, d, bf16 = sizes.batch, sizes.tokens, sizes.width, torch.bfloat16
    # Triton's interpreter is wrong in products of bfloat16; float32 tiles of attention do not fit a GPU's registers.
    attention_types = FLOATS[1:] if device.type == "cuda" else FLOATS[:2]
    probe_types = FLOATS if device.type == "cuda" else FLOATS[:2]
    cases: list[Case] = []
    for dtype in FLOATS:
        cases += [norm_modulate(n, t, d, dtype), gate_residual(n, t, d, dtype), loss(n, t, dtype)]
        cases += [pooling(n, t, 4 * d, dtype, True), pooling(n, t, d, dtype, False)]
    for width in sizes.widths:
        cases += [norm_modulate(n, sizes.long, width, bf16), gate_residual(n, sizes.long, width, bf16)]
    cases += [norm_modulate(n, t, d, bf16, torch.float32), gate_residual(n, t, d, bf16, torch.float32)]
    cases += [pooling(n, sizes.long, sizes.widths[0], bf16, gelu) for gelu in (True, False)]
    cases += [attend(n, t, heads, head, dtype) for heads, head in sizes.heads for dtype in attention_types]
    cases += [feed_forward(n, t, d, dtype) for dtype in FLOATS] + cublaslt_cases(sizes, device)
    cases += [probe(16 * n + 1, d, sizes.classes, dtype) for dtype in probe_types]
    if has_fp8(device):
        cases += [quantizing(n, t, d), product(n, t, d, "linear"), product(n, t, d, "mlp")]
    side = 2 * math.isqrt(t)
    return cases + [noising(n, side, form, path) for form in reference.FORMS for path in interpolate.PATHS]


def time_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """One case of each operator, in bf16 (float32 in Triton's interpreter), as in a step of `sizes.batch` images."""
    n, t, d = sizes.batch, sizes.tokens, sizes.width
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    extra = max(1, round(0.8 * n))  # rows that go to the probe only
    cases = [norm_modulate(n, t, d, dtype), gate_residual(n, t, d, dtype)]
    cases += [attend(n, t, heads, head, dtype) for heads, head in sizes.heads]
    cases += [feed_forward(n, t, d, dtype), gelu_backward(n * t, 4 * d, dtype)]
    cases += [pooling(extra, t, 4 * d, dtype, True), pooling(extra, t, d, dtype, False)]
    cases += [probe(n, d, sizes.classes, dtype), noising(n, 2 * math.isqrt(t), "moments"), loss(n, t, dtype)]
    return cases + ([product(n, t, d, name) for name in ("linear", "mlp")] if has_fp8(device) else [])
