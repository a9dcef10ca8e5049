"""Model FLOPs of a training step, from the configuration and the branch plan; a multiply-add counts 2.

Only products of matrices count: linear layers, convolutions, attention's two and pooling. The count is of what
the mathematics needs: a product's backward is its two gradients, without that of an operand that needs none (the image
patches, the cosines of t, the pooling weights), and nothing that an implementation computes again. Norms, GELU, softmax
and the optimizer are no products and count 0.

    plan = branch_plan(config)
    per_image(total(parts(config, plan, probe_classes=1000)).training, plan)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lsep.config import Config
from lsep.cost.parameters import TIME_FEATURES, hidden
from lsep.plan import BranchPlan, branch_plan

SECOND = "second pass: "
"""What the names of the parts of the extra rows begin with."""


class Flops(NamedTuple):
    """Of a part of one micro-batch."""

    forward: int
    training: int
    """Forward and backward."""


@dataclass(frozen=True)
class Product:
    """`times` products of `(rows, inner)` by `(inner, columns)`."""

    part: str
    rows: int
    inner: int
    columns: int
    times: int = 1
    both_gradients: bool = True
    """False: one operand is fixed, so that the backward is one product, not two."""

    @property
    def flops(self) -> Flops:
        forward = 2 * self.rows * self.inner * self.columns * self.times
        return Flops(forward, forward * (3 if self.both_gradients else 2))


def parts(config: Config, plan: BranchPlan, probe_classes: int) -> dict[str, Flops]:
    """FLOPs of one micro-batch by part, those of the extra rows under names of their own; together, the whole.

    `config` must be resolved; `probe_classes` is the manifest's. Parts: embedding, modulation, qkv, attention, proj,
    fc1, fc2, final layer, and with a probe pooling and probe head; `second pass: ` and modulation to fc2; with
    alignment projector, but not the encoder. Of a U-Net all but pooling and probe head is one part, `U-Net`.
    """
    found: dict[str, Flops] = _unet(config, plan) if config.model.backbone == "unet" else {}
    for product in products(config, plan, probe_classes):
        before, more = found.get(product.part, Flops(0, 0)), product.flops
        found[product.part] = Flops(before.forward + more.forward, before.training + more.training)
    return found


def total(found: dict[str, Flops]) -> Flops:
    """The sum of all parts."""
    return Flops(sum(f.forward for f in found.values()), sum(f.training for f in found.values()))


def step_parts(config: Config, probe_classes: int, probe: bool = True) -> dict[str, Flops]:
    """As `parts`, of a whole step of `train.batch_size` images: the sum over its micro-batches."""
    shards = config.optim.accumulate
    found: dict[str, Flops] = {}
    for shard in range(shards):
        for name, more in parts(config, branch_plan(config, shard, shards, probe), probe_classes).items():
            before = found.get(name, Flops(0, 0))
            found[name] = Flops(before.forward + more.forward, before.training + more.training)
    return found


def per_image(flops: int, plan: BranchPlan) -> float:
    """A count of one micro-batch as its mean over the images."""
    return flops / plan.batch


def second_pass_blocks(config: Config, plan: BranchPlan) -> float:
    """What the second pass of a SiT costs an image, in blocks: its linear layers over tokens beside those of one block.

    SiT-XL/2 with e = 0.8: 0.8 x (7 + 2/3) = 6.13 blocks of 28; `paper` without pooling before fc2: 8.
    """
    if not (plan.probe and plan.extra):
        return 0.0
    layers = ("qkv", "proj", "fc1", "fc2")
    second = _flops(_second_pass(config, plan), [SECOND + layer for layer in layers])
    block = _flops(_block(config, plan.batch, 1), list(layers))
    return second / block


def _flops(products: Iterable[Product], names: list[str]) -> int:
    return sum(p.flops.forward for p in products if p.part in names)


def products(config: Config, plan: BranchPlan, probe_classes: int) -> Iterator[Product]:
    """The products of one micro-batch; of a U-Net those of its probe."""
    m, rows, tokens = config.model, plan.batch, config.grid**2
    assert m.in_channels is not None
    width, patch = m.hidden_size, m.patch_size**2 * m.in_channels
    if m.backbone == "sit":
        yield Product("embedding", rows * tokens, patch, width, both_gradients=False)
        yield Product("embedding", rows, TIME_FEATURES, width, both_gradients=False)
        yield Product("embedding", rows, width, width)
        yield from _block(config, rows, m.depth)
        yield Product("modulation", rows, width, 2 * width)  # of the final layer
        yield Product("final layer", rows * tokens, width, patch)
        if plan.probe:
            yield from _second_pass(config, plan)
    if config.align.enabled:
        sizes = (width, config.align.projector_dim, config.align.projector_dim, config.align.width)
        for inner, columns in pairwise(sizes):
            assert inner is not None and columns is not None
            yield Product("projector", rows * tokens, inner, columns)
    if plan.probe:
        # Of the samples without a second pass the probe reads the main pass.
        yield Product("pooling", rows, tokens, width, both_gradients=False)
        yield Product("probe head", rows, width, probe_classes)


def _unet(config: Config, plan: BranchPlan) -> dict[str, Flops]:
    """Of the whole U-Net over the batch, and of the extra rows down to the mid-block."""
    from lsep.unet import count_flops  # nothing else here needs torch

    found = {"U-Net": Flops(*(plan.batch * count for count in count_flops(config, probed=False)))}
    if plan.probe and plan.extra:
        found[SECOND + "U-Net"] = Flops(*(plan.extra * count for count in count_flops(config, probed=True)))
    return found


def _block(config: Config, rows: int, times: int, prefix: str = "") -> Iterator[Product]:
    """`times` whole blocks over `rows` samples."""
    width = config.model.hidden_size
    yield from _up_to_fc1(config, rows, times, prefix)
    yield Product(prefix + "fc2", rows * config.grid**2, hidden(config), width, times)


def _up_to_fc1(config: Config, rows: int, times: int, prefix: str) -> Iterator[Product]:
    width, tokens = config.model.hidden_size, config.grid**2
    yield Product(prefix + "modulation", rows, width, 6 * width, times)
    yield Product(prefix + "qkv", rows * tokens, width, 3 * width, times)
    yield Product(prefix + "attention", rows * tokens, width, tokens, 2 * times)  # scores, and their product with v
    yield Product(prefix + "proj", rows * tokens, width, width, times)
    yield Product(prefix + "fc1", rows * tokens, width, hidden(config), times)


def _second_pass(config: Config, plan: BranchPlan) -> Iterator[Product]:
    """The extra rows through the first `probe.depth` blocks; in the last one, maybe, pooled before fc2."""
    probe, tokens = config.probe, config.grid**2
    if not plan.extra:
        return
    if not probe.pool_before_fc2:
        yield from _block(config, plan.extra, probe.depth, SECOND)
        return
    yield from _block(config, plan.extra, probe.depth - 1, SECOND)
    yield from _up_to_fc1(config, plan.extra, 1, SECOND)
    yield Product("pooling", plan.extra, tokens, hidden(config), both_gradients=False)
    yield Product(SECOND + "fc2", plan.extra, hidden(config), config.model.hidden_size)
