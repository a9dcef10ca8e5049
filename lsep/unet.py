"""A U-Net as the backbone: diffusers' `UNet2DModel`, whose probe reads the mid-block (arXiv 2006.11239 for the net).

Level i of L has `hidden_size / 2^(L-1-i)` channels on `input_size / 2^i` positions a side. The joint pass runs the
second pass's rows down to the mid-block beside the batch, where they leave: the way up is the main rows' alone.

    N rows, T positions of the mid-block, D its channels, C channels of the image
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lsep.config import Config, ModelConfig
from lsep.errors import UserError
from lsep.inductor import COMPILE
from lsep.interpolant import inside, to_velocity
from lsep.passes import Aligned, Second
from lsep.ranges import span
from lsep_kernels.ops import REFERENCE, Ops
from lsep_kernels.reference import unpatchify

INSTALL = 'pip install "diffusers>=0.32"'
TIME_SCALE = 1000.0
"""Its sines and cosines are for the steps 0 to 999 of DDPM; t is from 0 to 1."""
_ENDS = ("conv2", "to_out.0", "conv_out")
"""Last layers of the residual branches, of attention and of the whole."""


def require() -> Any:
    """The class `UNet2DModel`; raises UserError where diffusers cannot be imported."""
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: what its lazy imports turn an ImportError into
        told = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model.backbone unet needs diffusers, which cannot be imported ({told}): {INSTALL}"
        ) from None
    return UNet2DModel


def channels(m: ModelConfig) -> tuple[int, ...]:
    """Of each level, from the first, which has the input's side, to the last, which has the mid-block's."""
    return tuple(m.hidden_size >> (m.depth - 1 - i) for i in range(m.depth))


def settings(m: ModelConfig) -> dict[str, Any]:
    """Of diffusers' `UNet2DModel`, for a resolved `m`; attention is in the last level and the mid-block."""
    assert m.num_classes is not None
    widths, above = channels(m), m.depth - 1
    return {
        "sample_size": m.input_size,
        "in_channels": m.in_channels,
        "out_channels": m.in_channels,
        "block_out_channels": widths,
        "down_block_types": (*["DownBlock2D"] * above, "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", *["UpBlock2D"] * above),
        "layers_per_block": m.layers_per_level,
        "attention_head_dim": m.hidden_size // m.num_heads,
        "norm_num_groups": min(32, widths[0] // 4),
        "num_class_embeds": m.num_classes + 1,  # the last is the null class
    }


class UNet(nn.Module):
    """Velocity field v(x_t, t, y) of a class-conditional U-Net; a `lsep.backbone.Backbone`."""

    patch_size = 1
    """Its prediction is handed on as patches of one pixel."""

    def __init__(self, config: Config, ops: Ops = REFERENCE) -> None:
        """`config` must be resolved (input_size, in_channels and num_classes known); `ops` pools for the probe."""
        super().__init__()
        m = config.model
        assert m.num_classes is not None
        self.null_class, self.ops, self.interpolant = m.num_classes, ops, config.interpolant
        self.unet = require()(**settings(m))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of x, both `(N, C, H, W)`, at times t `(N,)` under labels y `(N,)`; `null_class` is no label."""
        t = inside(self.interpolant, t)
        return to_velocity(self.interpolant, unpatchify(self.patches(x, t, y), self.patch_size), x, t)

    def patches(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (v, or e or x) as patches of one pixel `(N, H W, C)`, see `unpatchify`."""
        return self._pass(x, t, y).patches

    def features(self, x: Tensor, t: Tensor, y: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """The mid-block's output `(N, T, D)` for each of `depths`, all of which are 1; the way up does not run."""
        assert set(depths) <= {1}, depths
        h, _ = self._down(self.unet.conv_in(x), self._times(t) + self.unet.class_embedding(y))
        return [_tokens(h)] * len(depths)

    def forward_with_probe(
        self, x: Tensor, t: Tensor, y: Tensor, extra_y: Tensor, depth: int, window: Tensor, pool_before_fc2: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The prediction as patches and pooled features of the mid-block, in one pass.

        The last `len(extra_y)` of the N samples go down to the mid-block a second time, under the labels `extra_y`,
        appended to the batch. The probe reads those rows for these samples and the main pass for the others.

        depth is 1; pool_before_fc2 has no meaning here, as there is no fc2. window `(N, T)` holds each sample's pooling
        weights. Returns `(N, H W, C)` and `(N, D)` float32.
        """
        patches, features, _ = self._pass(x, t, y, Second(extra_y, depth, window, pool_before_fc2))
        assert features is not None
        return patches, features

    def forward_aligned(self, x: Tensor, t: Tensor, y: Tensor, tokens_at: int, second: Second | None = None) -> Aligned:
        """`patches`, or with `second` what `forward_with_probe` gives, and the mid-block's tokens, at depth 1."""
        assert tokens_at == 1, tokens_at
        return self._pass(x, t, y, second)

    def _pass(self, x: Tensor, t: Tensor, y: Tensor, second: Second | None = None) -> Aligned:
        """Patches, the probe's features with `second`, and the main rows' tokens of the mid-block."""
        assert second is None or second.depth == 1, second
        rows, extra = len(x), len(second.extra_y) if second else 0
        keep, features = rows - extra, None
        with span("embedding"):
            times, h = self._times(t), self.unet.conv_in(x)
            c = joint = times + self.unet.class_embedding(y)
            if second and extra:
                h = torch.cat([h, h[keep:]])
                joint = torch.cat([c, times[keep:] + self.unet.class_embedding(second.extra_y)])
        h, skips = self._down(h, joint)
        if second:
            with span("probe"):
                probed = _tokens(h)
                if extra:
                    probed = torch.cat([probed[:keep], probed[rows:]])
                features = self.ops.pool(probed, second.window)
        if extra:
            h, *skips = (part.split([rows, extra])[0] for part in (h, *skips))
        return Aligned(self._up(h, skips, c), features, _tokens(h))

    def _times(self, t: Tensor) -> Tensor:
        """Times `(N,)` in [0, 1], embedded `(N, 4 x the first level's channels)`."""
        return self.unet.time_embedding(self.unet.time_proj(t.float() * TIME_SCALE))

    def _down(self, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mid-block's output `(N, D, side, side)` for what conv_in gives, and the skip connections."""
        skips = [h]
        with span("down"):
            for block in self.unet.down_blocks:
                h, passed = block(hidden_states=h, temb=c)
                skips += passed
        with span("mid"):
            return self.unet.mid_block(h, c), skips

    def _up(self, h: Tensor, skips: list[Tensor], c: Tensor) -> Tensor:
        """From the mid-block's output to the prediction as patches `(N, H W, C)`."""
        with span("up"):
            for block in self.unet.up_blocks:
                skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
                h = block(hidden_states=h, res_hidden_states_tuple=tuple(own), temb=c)
        with span("final layer"):
            return _tokens(self.unet.conv_out(F.silu(self.unet.conv_norm_out(h))))

    def compile_blocks(self) -> None:
        """From here on the blocks of each level and the mid-block run compiled."""
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            block.compile(**COMPILE)

    def initialize(self, generator: torch.Generator) -> None:
        """DDPM's initialisation: Xavier weights, zeros at the end of every residual branch, of attention and output.

        Labels start at the size of the embedded time they are added to: of 0.02, as in SiT, they would count for little
        through the first hundreds of steps.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if name.endswith(_ENDS):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.unet.class_embedding.weight, std=1.0, generator=generator)


def count_flops(config: Config, probed: bool) -> tuple[int, int]:
    """Of a resolved `config`: an image's matrix products and convolutions, forward, and forward and backward.

    probed: only down to the mid-block, as the second pass goes. Counted by PyTorch, without memory or arithmetic.
    """
    m = config.model
    assert m.in_channels is not None and m.input_size is not None
    with torch.device("meta"):
        model = UNet(config)
        x, t, y = torch.empty(1, m.in_channels, m.input_size, m.input_size), torch.empty(1), torch.zeros(1).long()
    with FlopCounterMode(display=False) as forward:
        out = model.features(x, t, y, [1])[0] if probed else model.patches(x, t, y)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def _tokens(h: Tensor) -> Tensor:
    """`(N, D, H, W)` as `(N, H W, D)`."""
    return h.flatten(2).transpose(1, 2)
