"""Every operation of the training step in plain PyTorch: CPU path, oracle and baseline.

Reading this file alone tells what each operation computes. Nothing here reads a value back to the host, loops over the
batch or depends on global random state, so each function runs inside one compiled graph and under CUDA graphs.
Imports torch only.

    B samples, T tokens, D width, H x W token grid
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK32 = 0xFFFFFFFF


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
        # int64 wraps modulo 2^64, so both halves of a 32 x 32 bit product come out right after the mask.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


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


def path(t: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`alpha, sigma, d alpha/dt, d sigma/dt` of the path x_t = alpha x + sigma e; t = 0 is data, t = 1 noise."""
    if kind == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if kind == "cosine":
        half = torch.pi / 2
        a, s = torch.cos(half * t), torch.sin(half * t)
        return a, s, -half * s, half * a
    raise ValueError(f"path is {kind!r}, expected 'linear' or 'cosine'")


def interpolate(x: Tensor, t: Tensor, e: Tensor, kind: str = "linear") -> tuple[Tensor, Tensor]:
    """`x_t = alpha x + sigma e` and its velocity `v = alpha' x + sigma' e`; x, e `(B, C, H, W)`, t `(B,)`."""
    alpha, sigma, d_alpha, d_sigma = (k.view(-1, *[1] * (x.ndim - 1)) for k in path(t, kind))
    return alpha * x + sigma * e, d_alpha * x + d_sigma * e


def sample_moments(moments: Tensor, eps: Tensor) -> Tensor:
    """Sample `mean + std * eps` of a VAE posterior; moments `(B, 2C, H, W)` = (mean, std), eps `(B, C, H, W)`."""
    mean, std = moments.float().chunk(2, dim=1)
    return mean + std * eps


def velocity_loss(v_pred: Tensor, v: Tensor) -> Tensor:
    """Mean squared error of each sample, `(B,)` float32."""
    return (v_pred.float() - v.float()).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer block


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`LN(x) (1 + scale) + shift` with an affine-free LayerNorm in float32; x `(B, T, D)`, shift and scale `(B, D)`."""
    h = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return (h * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype)


def gate_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`x + gate * branch`; x and branch `(B, T, D)` or `(B, D)`, gate `(B, D)`; the type of x."""
    gate = gate.float()[:, None] if branch.ndim == 3 else gate.float()
    return (x.float() + gate * branch.float()).to(x.dtype)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention over packed `qkv` (B, T, 3D), head-major inside each third; returns `(B, T, D)`."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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


def pool(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over tokens in float32: x `(B, T, D)`, weights `(B, T)` -> `(B, D)` float32."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(weights[:, None], x.float())[:, 0]


def gelu_pool(h: Tensor, weights: Tensor) -> Tensor:
    """`pool(GELU_tanh(h), weights)`: (B, T, F) -> (B, F) float32."""
    return pool(F.gelu(h, approximate="tanh"), weights)


def probe_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample in float32: logits `(B, classes)`, labels `(B,)` int64 -> `(B,)`."""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
