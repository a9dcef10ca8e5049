"""REPA: tokens of an intermediate block, through a projector, against those of a frozen image encoder.

"Representation Alignment for Generation" (arXiv 2410.06940), section 3.2. The tokens are the main pass's own: with
LSEP or without, no further pass is needed.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsep.config import AlignConfig
from lsep.errors import UserError, told


def build_projector(config: AlignConfig, width: int) -> nn.Sequential:
    """Three linear layers with SiLU between, `(B, T, D)` -> `(B, T, align.width)`; keys as in REPA's weights."""
    assert config.width is not None, "the configuration is not resolved yet"
    sizes = (width, config.projector_dim, config.projector_dim, config.width)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def initialize_projector(projector: nn.Sequential, generator: torch.Generator) -> None:
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)


def align_loss(tokens: Tensor, wanted: Tensor) -> Tensor:
    """One minus the cosine of each token with the encoder's, both `(B, T, E)`, averaged; a float32 scalar.

    REPA's loss plus 1: the same gradient, and a loss that is never negative.
    """
    return 1 - F.cosine_similarity(tokens.float(), wanted.float(), dim=-1).mean()


def take_projectors(projectors: nn.ModuleList, file: Path) -> None:
    """Fill `projectors` from REPA's own that `lsep import --keep-projectors` left in `file`, where they fit.

    Raises UserError where the file is there and cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        return
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--train.init: {file} cannot be read as safetensors ({told(error)})") from None
    own = {f"projectors.{name}": tensor for name, tensor in projectors.state_dict().items()}
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in found.items()}:
        projectors.load_state_dict({name.removeprefix("projectors."): tensor for name, tensor in found.items()})
