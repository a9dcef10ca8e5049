"""How many parameters a SiT with its probe and projector has, by where they are used; no module is built for it."""

from itertools import pairwise
from typing import NamedTuple

from lsep.config import Config

TIME_FEATURES = 256
"""Cosines and sines of t, see `lsep.model.TimestepEmbedder`."""


class Parameters(NamedTuple):
    """Counts of scalars."""

    block: int
    """Of one block, without its modulation."""
    modulation: int
    """Of the adaLN map of one block."""
    embedding: int
    """Of patches, times and labels."""
    final: int
    """Of the final layer, without its modulation."""
    final_modulation: int
    classifier: int
    projector: int
    depth: int

    @property
    def modulations(self) -> int:
        """All adaLN maps."""
        return self.depth * self.modulation + self.final_modulation

    @property
    def model(self) -> int:
        """The transformer alone."""
        return self.depth * self.block + self.modulations + self.embedding + self.final

    @property
    def total(self) -> int:
        return self.model + self.classifier + self.projector


def hidden(config: Config) -> int:
    """Width H of the MLP's hidden activation."""
    return int(config.model.hidden_size * config.model.mlp_ratio)


def parameters(config: Config, probe_classes: int) -> Parameters:
    """Of a resolved SiT configuration; a probe that ends later still has its classifier."""
    m, align = config.model, config.align
    assert m.in_channels is not None and m.num_classes is not None
    d, h, patch = m.hidden_size, hidden(config), m.patch_size**2 * m.in_channels
    qk_norm = 4 * (d // m.num_heads) if m.qk_norm else 0
    projector = 0
    if align.enabled:
        assert align.width is not None
        sizes = (d, align.projector_dim, align.projector_dim, align.width)
        projector = sum((inner + 1) * columns for inner, columns in pairwise(sizes))
    return Parameters(
        block=3 * d * (d + 1) + d * (d + 1) + h * (d + 1) + d * (h + 1) + qk_norm,
        modulation=6 * d * (d + 1),
        embedding=(patch + 1) * d + (TIME_FEATURES + 1) * d + (d + 1) * d + (m.num_classes + 1) * d,
        final=(d + 1) * patch,
        final_modulation=2 * d * (d + 1),
        classifier=(d + 1) * probe_classes + 2 * d if config.probe.enabled else 0,
        projector=projector,
        depth=m.depth,
    )
