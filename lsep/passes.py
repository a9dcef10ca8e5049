"""What a joint pass of a backbone is asked for, and what it gives; see `lsep.backbone.Backbone`.

N samples, T tokens of width D, p side of a patch, C channels
"""

from typing import NamedTuple

from torch import Tensor


class Second(NamedTuple):
    """The probe's part of a joint pass, see `Backbone.forward_with_probe`."""

    extra_y: Tensor
    depth: int
    window: Tensor
    pool_before_fc2: bool = True


class Aligned(NamedTuple):
    """What a pass gives whose tokens are aligned."""

    patches: Tensor
    """The prediction `(N, H W / p^2, p p C)`."""
    features: Tensor | None
    """The probe's `(N, D)` float32, where there was a second pass to ask for."""
    tokens: Tensor
    """The main pass's after a block `(N, T, D)`."""
