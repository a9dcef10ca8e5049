"""Every operation of the training step in plain PyTorch: CPU path, oracle and baseline.

Reading this file alone tells what each operation computes. Nothing here reads a value back to the host, loops over the
batch or depends on global random state, so each function runs inside one compiled graph and under CUDA graphs.
Imports torch only.

    B samples, T tokens, D width, H x W token grid
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK32 = 0xFFFFFFFF


FORMS = ("moments", "samples", "pixels")
"""What the rows of a data set hold."""


def _wide(x: Tensor) -> Tensor:
    """float32 for statistics, sums and losses; float64 stays what it is, as a truth to measure against."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit words for each 128-bit counter.

    Counters are int64 tensors holding 32-bit words, broadcast against each other; `seed` is the 64-bit key. Returns
    int64 tensors in [0, 2^32). Integer arithmetic only, so CPU and GPU agree bit for bit.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _product(word: Tensor, odd: int) -> tuple[Tensor, Tensor]:
    """Upper and lower half of the 64-bit product of a 32-bit word and an odd 32-bit constant.

    (word - 2^31) odd + 2^31 = word odd - 2^32 (odd - 1) / 2 stays inside int64: in the C++ that torch.compile makes for
    one element on a CPU, an overflow is undefined, and gave other numbers.
    """
    shifted = (word - 2**31) * odd + 2**31
    return (shifted >> 32) + (odd >> 1), shifted & _MASK32


def _counter(ids: Tensor, epoch: Tensor | int, stream: int, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox counter of (element block, sample, epoch, stream); the words of a sample never meet another's."""
    ids = ids.to(torch.int64)
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=ids.device)
    high = ((ids >> 32) & 0xFFFF) | (stream << 16)  # sample ids up to 48 bits
    return block, ids & _MASK32, epoch.to(torch.int64) & _MASK32, high


def _unit(word: Tensor) -> Tensor:
    """32-bit words to float32 in (0, 1]; never 0, so that its logarithm is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def uniform(seed: int, stream: int, epoch: Tensor | int, ids: Tensor) -> Tensor:
    """Uniform float32 numbers `(B, 4)` in [0, 1), a function of (seed, stream, epoch, sample id) alone."""
    zero = torch.zeros_like(ids, dtype=torch.int64)
    words = philox(seed, *_counter(ids, epoch, stream, zero))
    # 24 bits: the largest value stays below 1 in float32, so floor(u * n) never reaches n.
    return torch.stack([(w >> 8).to(torch.float32) * 2.0**-24 for w in words], dim=-1)


def normal(seed: int, stream: int, epoch: Tensor | int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 `(B, *shape)`, a function of (seed, stream, epoch, sample id) alone (Box-Muller)."""
    numel = 1
    for n in shape:
        numel *= n
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=ids.device)
    ids = ids[:, None]
    if isinstance(epoch, Tensor) and epoch.ndim:
        epoch = epoch[:, None]
    w0, w1, w2, w3 = philox(seed, *_counter(ids, epoch, stream, block))
    r0, r1 = torch.sqrt(-2 * torch.log(_unit(w0))), torch.sqrt(-2 * torch.log(_unit(w2)))
    a0, a1 = _unit(w1) * (2 * torch.pi), _unit(w3) * (2 * torch.pi)
    values = torch.stack([r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)], dim=-1)
    return values.flatten(1)[:, :numel].unflatten(1, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Interpolant


VP_BETA = 0.1, 20.0
"""Noise rate of the variance-preserving path at t = 0 and 1 (arXiv 2011.13456; DDPM's betas over 1,000 steps)."""
VP_FIRST = 1e-5
"""Smallest t of that path."""


def path(t: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`alpha, sigma, d alpha/dt, d sigma/dt` of the path x_t = alpha x + sigma e; t = 0 is data, t = 1 noise."""
    if kind == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if kind == "cosine":
        half = torch.pi / 2
        a, s = torch.cos(half * t), torch.sin(half * t)
        return a, s, -half * s, half * a
    if kind == "vp":
        t = t.clamp(min=VP_FIRST)  # d sigma/dt has no bound towards 0
        beta = VP_BETA[0] + (VP_BETA[1] - VP_BETA[0]) * t
        log_alpha = -(VP_BETA[1] - VP_BETA[0]) * t**2 / 4 - VP_BETA[0] * t / 2
        a, s = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        return a, s, -beta * a / 2, beta * a**2 / (2 * s)
    raise ValueError(f"path is {kind!r}, expected 'linear', 'cosine' or 'vp'")


def mix(x: Tensor, t: Tensor, e: Tensor, kind: str = "linear") -> tuple[Tensor, Tensor]:
    """`x_t = alpha x + sigma e` and its velocity `v = alpha' x + sigma' e`; x, e `(B, C, H, W)`, t `(B,)`."""
    alpha, sigma, d_alpha, d_sigma = (k.view(-1, *[1] * (x.ndim - 1)) for k in path(t, kind))
    return alpha * x + sigma * e, d_alpha * x + d_sigma * e


def sample_moments(moments: Tensor, eps: Tensor) -> Tensor:
    """Sample `mean + std * eps` of a VAE posterior; moments `(B, 2C, H, W)` = (mean, std), eps `(B, C, H, W)`."""
    mean, std = moments.float().chunk(2, dim=1)
    return mean + std * eps


def interpolate(
    rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor, seed: int, form: str, path: str, shift: float, scale: float,
    streams: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`x_t` and its velocity `v`, both `(B, C, H, W)` float32, of stored rows at times t `(B,)`.

    rows of the form "moments" `(B, 2C, H, W)` are posteriors to sample, "samples" `(B, C, H, W)` latents, both then
    shifted and scaled; "pixels" `(B, C, H, W)` hold 0 to 255 and become -1 to 1. streams are those of the posterior
    sample and of the noise, numbers of (seed, epoch, ids), see `normal`; epoch is an int64 scalar.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {FORMS}")
    x = rows.float()
    if form == "pixels":
        x = x / 127.5 - 1
    elif form == "moments":
        shape = (rows.shape[1] // 2, *rows.shape[2:])
        x = (sample_moments(x, normal(seed, streams[0], epoch, ids, shape)) - shift) * scale
    else:
        x = (x - shift) * scale
    return mix(x, t, normal(seed, streams[1], epoch, ids, tuple(x.shape[1:])), path)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """`(N, T, p p C)` on a square grid, channels last inside a patch of side p, to `(N, C, H, W)`."""
    grid = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def velocity_loss(patches: Tensor, v: Tensor, patch: int) -> Tensor:
    """Mean squared error of each sample, `(N,)` float32: predicted patches `(N, T, p p C)`, v `(N, C, H, W)`."""
    return (_wide(unpatchify(patches, patch)) - _wide(v)).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer block

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3


class Quantized(NamedTuple):
    """An activation with its fp8 form: `value` about `fp8 * scale`, and gradients are those of `value`."""

    value: Tensor
    """`(..., K)`."""
    fp8: Tensor
    """`(..., K)` e4m3."""
    scale: Tensor
    """`(..., 1)` float32: one for each row."""


Activation = Tensor | Quantized


def plain(x: Activation) -> Tensor:
    """The activation itself, whether or not it comes with an fp8 form."""
    return x.value if isinstance(x, Quantized) else x


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(fp8, scale)`, see `Quantized`: each row's largest entry becomes 448, a NaN or an infinity makes its row NaN."""
    x = x.float()
    # 2^-100: a row of zeros has a scale, and its inverse is finite.
    scale = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / _LARGEST
    return (x * scale.reciprocal()).to(E4M3), scale


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`LN(x) (1 + scale) + shift` with an affine-free LayerNorm in float32; x `(N, T, D)`, shift and scale `(N, D)`.

    The result has the type of `shift`: a float32 residual stream feeds matrix products in bf16.
    """
    h = F.layer_norm(_wide(x), (x.shape[-1],), eps=eps)
    return (h * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]).to(shift.dtype)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`x + gate y`; x and y `(N, T, D)` or `(N, D)`, gate `(N, D)`; the type of x."""
    gate = _wide(gate)[:, None] if y.ndim == 3 else _wide(gate)
    return (_wide(x) + gate * _wide(y)).to(x.dtype)


def gate_residual_norm_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`x' = x + gate y` and `norm_modulate(x', shift, scale)`: the seam between two halves of a block."""
    x = gate_residual(x, gate, y)
    return x, norm_modulate(x, shift, scale, eps)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over packed `qkv` (B, T, 3D), head-major inside each third; `(B, T, D)`.

    The softmax is float32 and its result rounded to the type of qkv, as in fused kernels.
    """
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D / heads)
    scores = _wide(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# Probe


def window_weights(size: Tensor, top: Tensor, left: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights `(B, T)` float32 of the mean over a `size x size` window with its corner at `top`, `left` `(B,)`.

    `size` is a scalar tensor, `grid` the (H, W) of the tokens. Each row sums to 1.
    """
    rows = torch.arange(grid[0], device=top.device)
    cols = torch.arange(grid[1], device=top.device)
    inside_rows = (rows >= top[:, None]) & (rows < top[:, None] + size)  # (B, H)
    inside_cols = (cols >= left[:, None]) & (cols < left[:, None] + size)  # (B, W)
    window = inside_rows[:, :, None] & inside_cols[:, None, :]
    return window.flatten(1).to(torch.float32) / (size * size)


def windows(
    seed: int, streams: tuple[int, int], step: Tensor, epoch: Tensor, ids: Tensor, sides: tuple[int, int], grid: int
) -> Tensor:
    """`window_weights` `(B, T)` of random windows on a `grid x grid` of tokens: one side, a place for each sample.

    The side is uniform over `sides`, the least and the largest, and a function of (seed, step); the corner one of
    (seed, epoch, sample id). streams are those of side and place; step and epoch int64 scalars.
    """
    least, largest = sides
    u = uniform(seed, streams[0], 0, step.view(1))[0, 0]
    size = least + (u * (largest - least + 1)).to(torch.int64)
    place = uniform(seed, streams[1], epoch, ids)
    top, left = ((place[:, i] * (grid - size + 1)).to(torch.int64) for i in (0, 1))
    return window_weights(size, top, left, (grid, grid))


def pool(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over tokens in float32: x `(B, T, D)`, weights `(B, T)` -> `(B, D)` float32."""
    with torch.autocast(x.device.type, enabled=False):
        x = _wide(x)
        return torch.bmm(weights[:, None].to(x.dtype), x)[:, 0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x `(..., K)`, weight `(N, K)`, bias `(N,)`; `(..., N)`."""
    return F.linear(x, weight, bias)


def gelu(h: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return F.gelu(h, approximate="tanh")


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`GELU(x W1^T + b1) W2^T + b2`: x `(..., D)`, weight1 `(M, D)`, weight2 `(D, M)`."""
    return F.linear(gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def gelu_pool(h: Tensor, weights: Tensor) -> Tensor:
    """`pool(GELU_tanh(h), weights)`: (B, T, F) -> (B, F) float32."""
    return pool(gelu(h), weights)


def probe_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample in float32: logits `(B, classes)`, labels `(B,)` int64 -> `(B,)`."""
    return F.cross_entropy(_wide(logits), labels, reduction="none", label_smoothing=label_smoothing)


def probe_head(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
    sample_weight: Tensor, label_smoothing: float, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over samples of `sample_weight` times cross-entropy of the classifier, float32 scalar, and hits `(B,)` bool.

    The classifier is LayerNorm in float32 and a linear map: features `(B, D)`, norm_weight and norm_bias `(D,)`, weight
    `(K, D)`, bias `(K,)`, labels `(B,)` int64, sample_weight `(B,)`. The product takes operands of `dtype`, by default
    the type of `weight`; its bias is added in float32. Of equal logits the lowest class wins.
    """
    with torch.autocast(features.device.type, enabled=False):
        h = F.layer_norm(_wide(features), norm_weight.shape, _wide(norm_weight), _wide(norm_bias), eps=1e-5)
        dtype = dtype or weight.dtype
        logits = _wide(F.linear(h.to(dtype), weight.to(dtype))) + _wide(bias)
    ce = probe_cross_entropy(logits, labels, label_smoothing)
    return (sample_weight.detach() * ce).sum(), logits.argmax(-1) == labels


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def adamw_ema(
    params: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    emas: list[list[Tensor]],
    weights: list[Tensor] | None,
    grads: list[Tensor | None],
    lr: Tensor,
    step_count: Tensor,
    skipped: Tensor,
    *,
    group: list[int],
    betas: tuple[float, float],
    eps: float,
    weight_decay: list[float],
    max_norm: float,
    ema_decays: list[float],
) -> Tensor:
    """Clipping, AdamW (Loshchilov & Hutter, ICLR 2019), averages and weight copies, in place; the norm before clipping.

    params and moments float32; `emas` holds one list like params for each of `ema_decays`; weights receive the new
    params in their own type; a gradient may be None, its tensor and moments then stay. lr `(groups,)` float32,
    step_count and skipped int64 scalars on the device; `group` gives each tensor's entry of lr and weight_decay. Where
    the square of the norm is not finite in float32, `skipped` grows by one and nothing else changes.
    """
    with torch.no_grad():
        # Squares are summed in float64: on CPUs a sum of 10^4 in float32 is already 10^-6 off.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads if g is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms or [lr.new_zeros((), dtype=torch.float64)])).float()
        finite = torch.isfinite(norm * norm)
        norm = torch.where(finite, norm, norm * norm)
        step_count += finite
        skipped += ~finite
        clip = (max_norm / (norm + 1e-6)).clamp(max=1)
        bias1, bias2 = (1 - beta ** step_count.double() for beta in betas)
        step_size = (lr.double() / bias1).float()
        root2 = bias2.sqrt().float()

        def assign(old: Tensor, new: Tensor) -> None:
            old.copy_(torch.where(finite, new.to(old.dtype), old))

        for i, (p, m, v, g) in enumerate(zip(params, exp_avg, exp_avg_sq, grads, strict=True)):
            if g is not None:
                g = g.float() * clip
                decay = (lr[group[i]].double() * weight_decay[group[i]]).float()
                assign(m, torch.lerp(m, g, 1 - betas[0]))
                assign(v, betas[1] * v + (1 - betas[1]) * g * g)
                # Not p * (1 - decay): its rounding, the same every step, would add up.
                assign(p, p - (decay * p + step_size[group[i]] * m / (v.sqrt() / root2 + eps)))
            for average, keep in zip(emas, ema_decays, strict=True):
                assign(average[i], torch.lerp(average[i], p, 1 - keep))
            if weights is not None:
                assign(weights[i], p)
        return norm
