"""The seam between the trainer and its model: what objective, sampler, evaluation and probes ask of a backbone.

    model = build(config, ops)

A backbone is an `nn.Module` with the methods of `Backbone`; there are two, `SiT` and `UNet`. Another one is a class
with these methods, a choice in `model.backbone`, and a line in `build`.

    N samples, C channels of side H = W, T tokens of width D at the probe's depth, p side of a patch
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from lsep import unet
from lsep.config import Config, ModelConfig
from lsep.model import SiT
from lsep.passes import Aligned, Second
from lsep_kernels.ops import REFERENCE, Ops

NAMES = {"sit": "SiT", "unet": "U-Net"}


class Features(Protocol):
    """A model with features at depths, which is all that the probes after training need."""

    @property
    def null_class(self) -> int:
        """The label that is none."""
        ...

    def features(self, x: Tensor, t: Tensor, y: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Features `(N, T, D)` at each of `depths`, from 1 to `Config.probe_depths`; nothing behind the last runs."""
        ...


@runtime_checkable
class Backbone(Features, Protocol):
    """A velocity field with features at depth; and, as far as it is used, an `nn.Module`."""

    @property
    def patch_size(self) -> int:
        """Side p of the patches it predicts; 1 where it predicts pixels."""
        ...

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of x, both `(N, C, H, W)`, at times t `(N,)` in [0, 1] under labels y `(N,)`."""
        ...

    def patches(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What is predicted (`interpolant.prediction`), as the loss wants it: patches `(N, H W / p^2, p p C)`."""
        ...

    def forward_with_probe(
        self, x: Tensor, t: Tensor, y: Tensor, extra_y: Tensor, depth: int, window: Tensor, pool_before_fc2: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`patches`, and features at `depth` pooled with the weights window `(N, T)` to `(N, D)` float32.

        The features of the last `len(extra_y)` samples are those under the labels `extra_y`, the others' those of the
        main pass.
        """
        ...

    def forward_aligned(self, x: Tensor, t: Tensor, y: Tensor, tokens_at: int, second: Second | None = None) -> Aligned:
        """`patches`, or with `second` what `forward_with_probe` gives, and the main pass's tokens at that depth."""
        ...

    def initialize(self, generator: torch.Generator) -> None:
        """Fill all weights from `generator`, and from nothing else."""
        ...

    def compile_blocks(self) -> None:
        """From here on what is repeated in it runs compiled."""
        ...

    @property
    def training(self) -> bool: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def to(self, device: torch.device | str) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


def build(config: Config, ops: Ops = REFERENCE) -> Backbone:
    """The backbone of a resolved `config`; `ops` computes what it has kernels for."""
    if config.model.backbone == "unet":
        return unet.UNet(config, ops)
    return SiT(config, ops)


def require(config: Config) -> None:
    """Raises UserError where the backbone of `config` needs a package that is not installed."""
    if config.model.backbone == "unet":
        unet.require()


def described(m: ModelConfig) -> str:
    """The backbone in a few words."""
    if m.backbone == "unet":
        widths = ", ".join(map(str, unet.channels(m)))
        return f"U-Net, levels of {widths} channels with {m.layers_per_level} layers each, {m.num_heads} heads"
    return f"SiT, {m.depth} blocks of width {m.hidden_size}, {m.num_heads} heads, patch {m.patch_size}"
