"""Stored rows to noised latents in one pass: posterior sample, scaling, noise, x_t and velocity target.

    interpolate(rows, ids, epoch, t, seed, form, path, shift, scale, streams)

The random numbers are those of `reference.normal`: the same Philox words bit for bit, and Box-Muller in float32. None
of them is written: a sample costs its rows' bytes once and 8 bytes an element of output.

    B samples, C channels, H x W
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsep_kernels.operator import check, check_integers, launch, operator
from lsep_kernels.reference import FORMS

CONFIG = {"BLOCK": 256, "num_warps": 4}
"""Counters of a program; each gives four elements."""
PATHS = ("linear", "cosine")


@triton.jit
def _sincos(a):
    """Sine and cosine of a in [0, 2 pi], to 1e-7 (Cephes' sinf): the general ones carry a reduction of huge angles."""
    q = tl.floor(a * 0.6366197723675814 + 0.5)
    # pi / 2 in three parts, the first two short enough for q times them to be exact
    r = ((a - q * 1.5703125) - q * 4.837512969970703125e-4) - q * 7.54978995489188e-8
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = q.to(tl.int32)
    odd = (quadrant & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where((quadrant & 2) == 0, sine, -sine), tl.where(((quadrant + 1) & 2) == 0, cosine, -cosine)


@triton.jit
def _pair(word0, word1):
    """Two normal numbers of two words (Box-Muller), as `reference.normal`."""
    # In (0, 1], so that the logarithm is finite.
    u = word0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    w = word1.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2 * tl.log(u))
    sine, cosine = _sincos(w * 6.283185307179586)
    return radius * cosine, radius * sine


@triton.jit
def random_words(seed, block, sample, epoch, stream):
    """The four words of each counter of `reference._counter`."""
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (sample & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (epoch & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0) + (((sample >> 32) & 0xFFFF) | (stream << 16)).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def random_normal(seed, block, sample, epoch, stream, BLOCK: tl.constexpr):
    """A sample's normal numbers 4 block .. 4 block + 3, `(4 BLOCK,)`."""
    w0, w1, w2, w3 = random_words(seed, block, sample, epoch, stream)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    # join adds a last dimension: interleaved to n0 n1 n2 n3, so that a thread keeps 16 bytes in a row
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(4 * BLOCK)


@triton.jit
def _interpolate_kernel(
    rows_ptr, id_ptr, epoch_ptr, t_ptr, x_t_ptr, v_ptr, numel, seed, posterior, noise,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, MOMENTS: tl.constexpr, PIXELS: tl.constexpr, COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK * 4 + tl.arange(0, 4 * BLOCK)
    mask = i < numel
    sample, epoch, t = tl.load(id_ptr + n), tl.load(epoch_ptr), tl.load(t_ptr + n).to(tl.float32)
    row = n * numel * 2 if MOMENTS else n * numel
    x = tl.load(rows_ptr + row + i, mask=mask, other=0.0).to(tl.float32)
    if MOMENTS:
        std = tl.load(rows_ptr + row + numel + i, mask=mask, other=0.0).to(tl.float32)
        x += std * random_normal(seed, block, sample, epoch, posterior, BLOCK)
    if PIXELS:
        x = tl.div_rn(x, 127.5) - 1
    else:
        x = (x - SHIFT) * SCALE
    e = random_normal(seed, block, sample, epoch, noise, BLOCK)
    if COSINE:
        half = 1.5707963267948966
        sine, cosine = _sincos(half * t)
        x_t, v = cosine * x + sine * e, half * (cosine * e - sine * x)
    else:
        x_t, v = (1 - t) * x + t * e, e - x
    tl.store(x_t_ptr + n * numel + i, x_t, mask=mask)
    tl.store(v_ptr + n * numel + i, v, mask=mask)


def _shape(rows: Tensor, form: str) -> tuple[int, ...]:
    """Shape of the latents `(B, C, H, W)`."""
    b, channels, *size = rows.shape
    return (b, channels // 2 if form == "moments" else channels, *size)


@operator("interpolate")
def _op(
    rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor, seed: int, form: str, path: str, shift: float, scale: float,
    posterior: int, noise: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _shape(rows, form)
    x_t, v = (torch.empty(shape, dtype=torch.float32, device=rows.device) for _ in range(2))
    numel = math.prod(shape[1:])
    launch(
        _interpolate_kernel, (triton.cdiv(numel, 4 * CONFIG["BLOCK"]), shape[0]),
        rows, ids, epoch, t, x_t, v, numel, seed, posterior, noise,
        SHIFT=shift, SCALE=scale, MOMENTS=form == "moments", PIXELS=form == "pixels", COSINE=path == "cosine", **CONFIG,
    )  # fmt: skip
    return x_t, v


@_op.register_fake
def _(
    rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor, seed: int, form: str, path: str, shift: float, scale: float,
    posterior: int, noise: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _shape(rows, form)
    return rows.new_empty(shape, dtype=torch.float32), rows.new_empty(shape, dtype=torch.float32)


def signed(seed: int) -> int:
    """An operator's integers are signed: the upper half of the seeds `[0, 2^64)` goes as its two's complement."""
    return seed - 2**64 if seed >= 2**63 else seed


def interpolate(
    rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor, seed: int, form: str, path: str, shift: float, scale: float,
    streams: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`x_t` and velocity `v` `(B, C, H, W)` float32 of stored rows, see `reference.interpolate`.

    rows `(B, 2C, H, W)` for moments and `(B, C, H, W)` for samples and pixels, of any type; ids `(B,)` int64 below
    2^48, epoch an int64 scalar on the device, t `(B,)` float32, seed in [0, 2^64); streams of the posterior and of the
    noise. Nothing is differentiable.
    """
    if form not in FORMS or path not in PATHS:
        raise ValueError(f"interpolate: form is {form!r}, path {path!r}, expected one of {FORMS} and one of {PATHS}")
    check("interpolate", (len(rows),), ids=ids, t=t)
    check_integers("interpolate", ids=ids, epoch=epoch)
    rows, ids, t = (x.detach().contiguous() for x in (rows, ids, t))
    return _op(rows, ids, epoch, t, signed(seed), form, path, shift, scale, *streams)
