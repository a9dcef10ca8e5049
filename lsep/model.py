"""SiT: patches, adaLN-Zero blocks, velocity out; and the joint pass that brings the probe its features.

Parameter names are those of the published weights (`blocks.0.attn.qkv.weight`, `final_layer.linear.weight`, ...).

    N rows, T tokens, D width, C channels
"""

import math

import torch
from torch import Tensor, nn

from lsep.config import Config
from lsep_kernels.reference import attention, gate_residual, gelu_pool, norm_modulate, pool


class PatchEmbed(nn.Module):
    """Images to tokens: `(N, C, H, W)` -> `(N, T, D)`."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times `(N,)` in [0, 1] to `(N, D)`: 256 cosines and sines, cosines first, then an MLP."""

    frequencies: Tensor

    def __init__(self, width: int, size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        half = size // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Labels `(N,)` to `(N, D)`; the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, `(N, T, D)` -> `(N, T, D)`."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=2).flatten(2)
        return self.proj(attention(qkv, self.num_heads))


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """adaLN-Zero block: tokens x `(N, T, D)`, conditioning c `(N, D)`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def _attend(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The attention half: tokens after it, the MLP's modulated input `(N, T, D)` and its gate `(N, D)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = gate_residual(x, gate1, self.attn(norm_modulate(x, shift1, scale1)))
        return x, norm_modulate(x, shift2, scale2), gate2

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, h, gate = self._attend(x, c)
        return gate_residual(x, gate, self.mlp(h))

    def forward_probed(self, x: Tensor, c: Tensor, extra: int, window: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but the last `extra` rows leave here, pooled before `fc2`.

        `fc2` is linear and its gate constant over tokens, and the window's weights sum to 1, so
        pool(x + gate (GELU(h) W + b)) = pool(x) + gate (pool(GELU(h)) W + b): one row a sample instead of T.

        Returns the other rows' tokens `(N - extra, T, D)` and the pooled features `(extra, D)` float32.
        """
        # split, not slices: the backward of a slice fills a tensor of the full size with zeros.
        rows = [len(x) - extra, extra]
        x, h, gate = self._attend(x, c)
        (x_main, x_extra), (gate_main, gate_extra) = x.split(rows), gate.split(rows)
        h_main, h_extra = self.mlp.fc1(h).split(rows)
        pooled = self.mlp.fc2(gelu_pool(h_extra, window))
        features = gate_residual(pool(x_extra, window), gate_extra, pooled)
        return gate_residual(x_main, gate_main, self.mlp.fc2(self.mlp.act(h_main))), features


class FinalLayer(nn.Module):
    """adaLN and a linear map to patches, `(N, T, D)` -> `(N, T, p p C)`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(norm_modulate(x, shift, scale))


class SiT(nn.Module):
    """Velocity field v(x_t, t, y) of a class-conditional flow transformer."""

    pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        """`config` must be resolved: input_size, in_channels and num_classes known."""
        super().__init__()
        m = config.model
        assert m.in_channels is not None and m.num_classes is not None
        self.patch_size, self.null_class = m.patch_size, m.num_classes
        self.fp32_residual = config.train.fp32_residual
        self.x_embedder = PatchEmbed(m.in_channels, m.hidden_size, m.patch_size)
        self.t_embedder = TimestepEmbedder(m.hidden_size)
        self.y_embedder = LabelEmbedder(m.num_classes, m.hidden_size)
        self.register_buffer("pos_embed", sincos_positions(config.grid, m.hidden_size)[None])
        self.blocks = nn.ModuleList(
            Block(m.hidden_size, m.num_heads, m.mlp_ratio, m.qk_norm) for _ in range(m.depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(m.hidden_size, m.patch_size**2 * m.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of x, both `(N, C, H, W)`, at times t `(N,)` under labels y `(N,)`; `null_class` is no label."""
        h = self._tokens(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        return self._unpatchify(self.final_layer(h, c))

    def forward_with_probe(
        self, x: Tensor, t: Tensor, y: Tensor, extra_y: Tensor, depth: int, window: Tensor, pool_before_fc2: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Velocity and pooled features of block `depth`, in one pass.

        The last `len(extra_y)` of the N samples go through the first `depth` blocks a second time, under the labels
        `extra_y`, appended to the batch: one set of matmuls of N + extra rows. The probe reads those rows for these
        samples and the main pass for the others.

        window `(N, T)` holds each sample's pooling weights. Returns v `(N, C, H, W)` and features `(N, D)` float32.
        """
        n, extra = len(x), len(extra_y)
        keep = n - extra
        h = self._tokens(x)
        t_emb = self.t_embedder(t)
        c_main = t_emb + self.y_embedder(y)
        c = torch.cat([c_main, t_emb[keep:] + self.y_embedder(extra_y)])
        h = torch.cat([h, h[keep:]])
        last = depth - 1 if pool_before_fc2 else depth
        for block in self.blocks[:last]:
            h = block(h, c)
        if pool_before_fc2:
            probed = self.blocks[last]
            assert isinstance(probed, Block)
            h, extra_features = probed.forward_probed(h, c, extra, window[keep:])
        else:
            h, h_extra = h.split([n, extra])
            extra_features = pool(h_extra, window[keep:])
        features = torch.cat([pool(h[:keep], window[:keep]), extra_features])
        for block in self.blocks[depth:]:
            h = block(h, c_main)
        return self._unpatchify(self.final_layer(h, c_main)), features

    def _tokens(self, x: Tensor) -> Tensor:
        """Embedded patches with their positions `(N, T, D)`, in the type of the residual stream."""
        h = self.x_embedder(x)
        # Under autocast h is bf16 and the positions float32: their sum alone would make the stream float32.
        return (h + self.pos_embed).to(torch.float32 if self.fp32_residual else h.dtype)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """`(N, T, p p C)`, channels last inside a patch, to `(N, C, H, W)`."""
        p, grid = self.patch_size, math.isqrt(x.shape[1])
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def initialize(self, generator: torch.Generator) -> None:
        """DiT's initialisation: Xavier matrices, zero gates and zero output, so that every block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)


def sincos_positions(grid: int, width: int) -> Tensor:
    """Frozen 2-D positions `(grid^2, width)`: half the width for the column, half for the row, sines first in each."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(grid, dtype=torch.float64)
    angles = place[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = table[:, None].expand(-1, grid, -1), table[None].expand(grid, -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()
