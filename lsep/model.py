"""SiT: patches, adaLN-Zero blocks, velocity out; and the joint pass that brings the probe its features.

Parameter names are those of the published weights (`blocks.0.attn.qkv.weight`, `final_layer.linear.weight`, ...).

    N rows, T tokens, D width, C channels
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsep import memory
from lsep.config import Config
from lsep.inductor import COMPILE
from lsep.interpolant import inside, to_velocity
from lsep.passes import Aligned, Second
from lsep.ranges import span
from lsep_kernels.joint_linear import join, joint_linear
from lsep_kernels.ops import REFERENCE, Ops
from lsep_kernels.reference import Activation, gate_residual, gelu, plain, unpatchify


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

    def __init__(self, width: int, heads: int, qk_norm: bool, ops: Ops) -> None:
        super().__init__()
        self.num_heads, self.ops = heads, ops
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Activation) -> Tensor:
        qkv = self.ops.linear(x, self.qkv.weight, self.qkv.bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=2).flatten(2)
        out = self.ops.attention(qkv, self.num_heads)
        return self.ops.linear(out, self.proj.weight, self.proj.bias)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear; `first` and `second` are its two halves, for the block that pools between them."""

    def __init__(self, width: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Activation) -> Tensor:
        return self.ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def first(self, x: Activation) -> Tensor:
        return self.ops.linear(x, self.fc1.weight, self.fc1.bias)

    def second(self, hidden: Tensor) -> Tensor:
        return self.ops.linear(gelu(hidden), self.fc2.weight, self.fc2.bias)


class Modulation(NamedTuple):
    """What conditions one block, `(N, D)` each."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Block(nn.Module):
    """adaLN-Zero block.

    Its parts meet in one operation, gate + residual + LayerNorm + modulation, and so do two blocks: a block takes the
    residual stream x `(N, T, D)` with its own modulated input h, and hands on the stream with the next norm's output,
    whose shift and scale come as `following`. What `ops` hands on as h may carry its fp8 form.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.attn = Attention(width, heads, qk_norm, ops)
        self.mlp = Mlp(width, int(width * mlp_ratio), ops)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, c: Tensor) -> Modulation:
        """From the conditioning c `(N, D)`."""
        return Modulation(*self.adaLN_modulation(c).chunk(6, dim=-1))

    def forward(
        self, x: Tensor, h: Activation, m: Modulation, following: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Activation]:
        x, h = self._attend(x, h, m)
        with span("MLP"):
            branch = self.mlp(h)
        with span("adaLN"):
            return self.ops.gate_residual_norm_modulate(x, m.gate2, branch, *following)

    def _attend(self, x: Tensor, h: Activation, m: Modulation) -> tuple[Tensor, Activation]:
        """The first half: the stream after attention, and the input of the MLP."""
        with span("attention"):
            branch = self.attn(h)
        with span("adaLN"):
            return self.ops.gate_residual_norm_modulate(x, m.gate1, branch, m.shift2, m.scale2)

    def forward_probed(
        self,
        x: Tensor,
        h: Activation,
        m: Modulation,
        following: tuple[Tensor, Tensor],
        window: Tensor,
        pool_before_fc2: bool,
    ) -> tuple[Tensor, Activation, Tensor]:
        """As `forward`, but the last `len(window)` rows leave here, pooled before `fc2`.

        `fc2` is linear and its gate constant over tokens, and the window's weights sum to 1, so
        pool(x + gate (GELU(h) W + b)) = pool(x) + gate (pool(GELU(h)) W + b): one row a sample instead of T.

        Returns stream and next input of the other rows and the pooled features `(len(window), D)` float32.
        """
        x, h = self._attend(x, h, m)
        # split, not slices: the backward of a slice fills a tensor of the full size with zeros.
        rows = [len(x) - len(window), len(window)]
        (x, x_extra), (gate, gate_extra) = x.split(rows), m.gate2.split(rows)
        with span("MLP"):
            hidden, hidden_extra = self.mlp.first(h).split(rows)
        if pool_before_fc2:
            with span("probe"):
                pooled = self.mlp.fc2(self.ops.gelu_pool(hidden_extra, window))
                features = gate_residual(self.ops.pool(x_extra, window), gate_extra, pooled)
        else:
            with span("MLP"):
                branch = self.mlp.second(hidden_extra)
            with span("probe"):
                features = self.ops.pool(gate_residual(x_extra, gate_extra, branch), window)
        with span("MLP"):
            branch = self.mlp.second(hidden)
        with span("adaLN"):
            return *self.ops.gate_residual_norm_modulate(x, gate, branch, *following), features


class FinalLayer(nn.Module):
    """adaLN, applied by the last block, and a linear map to patches, `(N, T, D)` -> `(N, T, p p C)`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale `(N, D)` from the conditioning c `(N, D)`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return shift, scale

    def forward(self, h: Activation) -> Tensor:
        return self.linear(plain(h))


class SiT(nn.Module):
    """Velocity field v(x_t, t, y) of a class-conditional flow transformer."""

    pos_embed: Tensor

    def __init__(self, config: Config, ops: Ops = REFERENCE) -> None:
        """`config` must be resolved (input_size, in_channels and num_classes known); `ops` computes the blocks."""
        super().__init__()
        m = config.model
        assert m.in_channels is not None and m.num_classes is not None
        self.patch_size, self.null_class, self.ops = m.patch_size, m.num_classes, ops
        self.interpolant = config.interpolant
        self.fp32_residual = config.train.fp32_residual
        self.joint_modulation = False
        self.run = memory.runner(config.train.memory)
        self.embed: Callable[[SiT, Tensor, int], Tensor] = _embed
        self.x_embedder = PatchEmbed(m.in_channels, m.hidden_size, m.patch_size)
        self.t_embedder = TimestepEmbedder(m.hidden_size)
        self.y_embedder = LabelEmbedder(m.num_classes, m.hidden_size)
        self.register_buffer("pos_embed", sincos_positions(config.grid, m.hidden_size)[None])
        self.blocks = nn.ModuleList(
            Block(m.hidden_size, m.num_heads, m.mlp_ratio, m.qk_norm, ops) for _ in range(m.depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(m.hidden_size, m.patch_size**2 * m.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of x, both `(N, C, H, W)`, at times t `(N,)` under labels y `(N,)`; `null_class` is no label."""
        t = inside(self.interpolant, t)
        return to_velocity(self.interpolant, unpatchify(self.patches(x, t, y), self.patch_size), x, t)

    def patches(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (v, or e or x) as patches `(N, T, p p C)`, see `unpatchify`."""
        return self._pass(x, t, y)[0]

    def features(self, x: Tensor, t: Tensor, y: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """The stream `(N, T, D)` after each block of `depths`, counted from 1; blocks behind the last do not run."""
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self._tokens(x)
        modulations, following = self._modulations(c, c, 0)
        h = self.ops.norm_modulate(x, *modulations[0][:2])
        after = {}
        for i, block in enumerate(islice(self.blocks, max(depths))):
            x, h = self.run(block, x, h, modulations[i], following[i])
            if i + 1 in depths:
                after[i + 1] = x
        return [after[depth] for depth in depths]

    def forward_with_probe(
        self, x: Tensor, t: Tensor, y: Tensor, extra_y: Tensor, depth: int, window: Tensor, pool_before_fc2: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The prediction as patches and pooled features of block `depth`, in one pass.

        The last `len(extra_y)` of the N samples go through the first `depth` blocks a second time, under the labels
        `extra_y`, appended to the batch: one set of matmuls of N + extra rows. The probe reads those rows for these
        samples and the main pass for the others.

        window `(N, T)` holds each sample's pooling weights. Returns `(N, T, p p C)` and `(N, D)` float32.
        """
        patches, features, _ = self._pass(x, t, y, Second(extra_y, depth, window, pool_before_fc2))
        assert features is not None
        return patches, features

    def forward_aligned(self, x: Tensor, t: Tensor, y: Tensor, tokens_at: int, second: Second | None = None) -> Aligned:
        """`patches`, or with `second` what `forward_with_probe` gives, and the tokens of block `tokens_at`."""
        patches, features, tokens = self._pass(x, t, y, second, tokens_at)
        assert tokens is not None
        return Aligned(patches, features, tokens)

    def _pass(
        self, x: Tensor, t: Tensor, y: Tensor, second: Second | None = None, tokens_at: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Patches, the probe's features with `second`, and the main rows' tokens after block `tokens_at`, if not 0."""
        rows, depth = len(x), second.depth if second else 0
        extra = len(second.extra_y) if second else 0
        keep = rows - extra
        with span("embedding"):
            t_emb = self.t_embedder(t)
            c = t_emb + self.y_embedder(y)
            x, joint = self.embed(self, x, extra), c
            if second and extra:
                joint = torch.cat([c, t_emb[keep:] + self.y_embedder(second.extra_y)])
        with span("adaLN"):
            modulations, following = self._modulations(c, joint, depth)
            h = self.ops.norm_modulate(x, *modulations[0][:2])
        features, tokens = [], None
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            probed = second if i == depth - 1 else None
            with span("block", i + 1):
                if probed and extra:
                    window, pool_first = probed.window[keep:], probed.pool_before_fc2
                    x, h, extra_features = self.run(
                        block.forward_probed, x, h, modulations[i], following[i], window, pool_first
                    )
                    features.append(extra_features)
                else:
                    x, h = self.run(block, x, h, modulations[i], following[i])
            if probed and keep:
                with span("probe"):
                    features.insert(0, self.ops.pool(x[:keep], probed.window[:keep]))
            if i == tokens_at - 1:
                tokens = x if len(x) == rows else x[:rows]
        with span("final layer"):
            return self.final_layer(h), torch.cat(features) if second else None, tokens

    def _modulations(
        self, c: Tensor, joint: Tensor, depth: int
    ) -> tuple[list[Modulation], list[tuple[Tensor, Tensor]]]:
        """Of every block, its modulation and the shift and scale of the norm after it.

        The first `depth` blocks are conditioned on `joint`, the others and the final layer on `c`.
        """
        if self.joint_modulation:
            modulations, final = self._joint_modulations(len(c), joint, depth)
        else:
            modulations = []
            for i, block in enumerate(self.blocks):
                assert isinstance(block, Block)
                modulations.append(block.modulation(joint if i < depth else c))
            final = self.final_layer.modulation(c)
        return modulations, [(m.shift1, m.scale1) for m in modulations[1:]] + [final]

    def _joint_modulations(
        self, rows: int, joint: Tensor, depth: int
    ) -> tuple[list[Modulation], tuple[Tensor, Tensor]]:
        """All modulations in one matrix product; from block `depth` on the first `rows` rows of it count."""
        linears = self._modulation_linears()
        out = joint_linear(F.silu(joint), [m.weight for m in linears], [m.bias for m in linears])
        width = joint.shape[1]
        probed, others = out.split([6 * depth * width, out.shape[1] - 6 * depth * width], dim=1)
        others = others.split([rows, len(joint) - rows])[0]
        parts = [*probed.split(width, dim=1), *others.split(width, dim=1)] if depth else others.split(width, dim=1)
        last = 6 * len(self.blocks)
        return [Modulation(*parts[i : i + 6]) for i in range(0, last, 6)], (parts[last], parts[last + 1])

    def join_modulations(self) -> None:
        """From here on one matrix product gives all modulations; moves their weights together in memory."""
        linears = self._modulation_linears()
        join([cast(nn.Parameter, m.weight) for m in linears])
        join([m.bias for m in linears])
        self.joint_modulation = True

    def compile_blocks(self) -> None:
        """From here on blocks run compiled, one code for all of a shape, and what goes before them.

        Bias, positions and the rows of the second pass are passes over the whole stream, each by itself.
        """
        self.run = torch.compile(self.run, **COMPILE)
        self.embed = torch.compile(_embed, **COMPILE)

    def _modulation_linears(self) -> list[nn.Linear]:
        sequences = [m.adaLN_modulation for m in (*self.blocks, self.final_layer)]
        return [cast(nn.Linear, s[1]) for s in cast(list[nn.Sequential], sequences)]

    def _tokens(self, x: Tensor) -> Tensor:
        """Embedded patches with their positions `(N, T, D)`, in the type of the residual stream."""
        h = self.x_embedder(x)
        # Under autocast h is bf16 and the positions float32: their sum alone would make the stream float32.
        h = (h + self.pos_embed).to(torch.float32 if self.fp32_residual else h.dtype)
        return h.contiguous()  # channels come first from the convolution; every operation after it wants them last

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


def _embed(model: SiT, x: Tensor, extra: int) -> Tensor:
    """Tokens of the images x `(N, C, H, W)`, and once more those of the last `extra`: `(N + extra, T, D)`."""
    h = model._tokens(x)
    return torch.cat([h, h[len(h) - extra :]]) if extra else h


def sincos_positions(grid: int, width: int) -> Tensor:
    """Frozen 2-D positions `(grid^2, width)`: half the width for the column, half for the row, sines first in each."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(grid, dtype=torch.float64)
    angles = place[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = table[:, None].expand(-1, grid, -1), table[None].expand(grid, -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()
