"""What cards have and reach. None of it was measured by this project: each figure says where it comes from.

Where two sources disagree the lower counts. Between the shapes that somebody has measured, estimates are off by 20 %
until a card has been seen.
"""

from dataclasses import dataclass

from lsep.cost.operations import Rates
from lsep_kernels.limits import Card

SHARE_BF16 = 0.78
"""Of the data sheet's dense bf16 rate, where no product was measured (pytorch/ao, testing/training/roofline_utils)."""
SHARE_COPY = 0.835
"""Of the data sheet's memory rate that a copy reaches: H200, the lower of it and H100's 0.866."""
GRAPH_NODE = 1.3e-6
"""Seconds from one kernel of a CUDA graph to the next. Assumed: nobody has published it for Hopper."""
KERNEL = 2e-6
"""Seconds a kernel costs outside of a graph (pytorch/ao, as above)."""


@dataclass(frozen=True)
class Known:
    """A card that estimates are made for."""

    name: str
    title: str
    capability: tuple[int, int]
    memory: int
    """Bytes, as the driver counts them: a little less than on the label."""
    dense: float
    """bf16 FLOP/s on the data sheet."""
    hbm: float
    """Bytes/s of its memory on the data sheet."""
    product: float
    """FLOP/s of large bf16 products."""
    product_source: str
    copy: float
    """Bytes/s of a large copy, read and written."""
    copy_source: str
    attention: tuple[float, float]
    """FLOP/s of attention by FlashAttention-2, forward and backward, head 64, 512 tokens."""
    fp8: float = 0.0
    """FLOP/s of large fp8 products with scales; 0 without."""

    @property
    def card(self) -> Card:
        return Card(self.capability)

    @property
    def rates(self) -> Rates:
        return Rates(self.product, self.copy)


_H100_ATTENTION = (282e12, 198e12)
"""FlashAttention-3's figures, 512 tokens, head 64; whether with a mask is not said there."""


def _scaled(dense: float) -> tuple[float, float]:
    """Attention of a card for which nobody has published it, by the data sheets' ratio to H100."""
    forward, backward = _H100_ATTENTION
    return forward * dense / 989e12, backward * dense / 989e12


CARDS: dict[str, Known] = {
    card.name: card
    for card in (
        Known(
            "h100", "H100 SXM 80 GB", (9, 0), 79 * 2**30, 989e12, 3.35e12,
            546e12, "cuBLAS at M = 65536, N = 3584, K = 8192 and 500 W, the lower of two shapes (FBGEMM#2546)",
            2.90e12, "Azure/AI-benchmarking-guide", _H100_ATTENTION, 877e12,
        ),
        Known(
            "h200", "H200 141 GB", (9, 0), 139 * 2**30, 989e12, 4.8e12,
            769e12, "8192^3 on an H200 through torch, the lower of 769 to 798",
            4.01e12, "Azure/AI-benchmarking-guide; 4.3 was measured as well", _H100_ATTENTION, 877e12,
        ),
        Known(
            "b200", "B200 180 GB", (10, 0), 178 * 2**30, 2250e12, 7.7e12,
            SHARE_BF16 * 2250e12, "0.78 of the data sheet (pytorch/ao)",
            SHARE_COPY * 7.7e12, "0.835 of the data sheet, as H200's", _scaled(2250e12), 1.4 * SHARE_BF16 * 2250e12,
        ),
        Known(
            "a100", "A100 SXM 80 GB", (8, 0), 79 * 2**30, 312e12, 2.039e12,
            SHARE_BF16 * 312e12, "0.78 of the data sheet (pytorch/ao)",
            SHARE_COPY * 2.039e12, "0.835 of the data sheet, as H200's", _scaled(312e12),
        ),
    )
}  # fmt: skip


def nearest(capability: tuple[int, int]) -> Known:
    """The slowest known card of a GPU's generation, else H100."""
    alike = [c for c in CARDS.values() if c.capability[0] == capability[0]] or [CARDS["h100"]]
    return min(alike, key=lambda card: card.product)
