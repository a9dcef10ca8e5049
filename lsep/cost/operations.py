"""What a step computes and moves, operation by operation: the one list behind every floor and every estimate.

    found = step_operations(config, probe_classes=1000, count=675_973_480, row_bytes=16384)
    sum(operation.floor(rates) for operation in found)

The floor of an operation is the longer of its bytes at the rate of a copy and its FLOPs at the rate of a product: a GPU
moves and computes at once. The floor of a step is their sum: operations follow one another. (A maximum over a whole
step would let the products of one block hide the norms of another, which no order of kernels does; a sum within an
operation would charge a product for operands that it reads while it computes.)

FLOPs are those of `lsep.cost.flops`. Bytes are what an operation reads and writes at least, fused as docs/kernels.md
has it: GELU is a pass of its own, softmax and biases are parts of others. Of a U-Net, which has no kernels here, only
the FLOPs are known.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lsep.config import Config
from lsep.cost.flops import SECOND, Product, parts, products
from lsep.cost.parameters import hidden
from lsep.plan import BranchPlan, branch_plan

ROOMS = {
    "modulation": "adaLN", "qkv": "attention", "attention": "attention", "proj": "attention", "fc1": "MLP",
    "fc2": "MLP", "pooling": "probe", "probe head": "probe", "projector": "align",
    "embedding": "other", "final layer": "other", "U-Net": "other",
}  # fmt: skip
"""The room of `lsep profile` that a part of `lsep.cost.flops` is in."""
PRODUCTS, ATTENTION, ADALN, GELU = "matrix products", "attention", "adaLN", "GELU"
PROBE, INPUTS, OPTIMIZER = "probe", "inputs and loss", "optimizer"
KINDS = (PRODUCTS, ATTENTION, ADALN, GELU, PROBE, INPUTS, OPTIMIZER)
"""What an operation is, whatever room it is in."""


class Rates(NamedTuple):
    """What a device reaches."""

    flops: float
    """FLOP/s of a large matrix product in the training's type."""
    bytes: float
    """Bytes/s of a large copy, read and written."""


@dataclass(frozen=True)
class Operation:
    """`times` equal calls, forward or backward."""

    name: str
    kind: str
    room: str
    flops: float = 0.0
    """Of all calls together."""
    bytes: float = 0.0
    """Likewise."""
    times: int = 1
    shape: tuple[int, int, int] | None = None
    """Rows, columns and inner length of a matrix product."""
    backward: bool = False

    def often(self, times: int) -> "Operation":
        """The same so many times."""
        return replace(self, flops=self.flops * times, bytes=self.bytes * times, times=self.times * times)

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def floor(size: float, flops: float, rates: Rates) -> float:
    """Seconds of one operation that moves `size` bytes and computes `flops`."""
    return Operation("", "", "", flops, size).floor(rates)


def optimizer_bytes(count: int) -> int:
    """Of an update with one average, gradients in float32: 4 a parameter for the norm, then p, m, v and average read
    and written, and the gradient read."""
    return 40 * count


def step_operations(
    config: Config, probe_classes: int, count: int, row_bytes: int | None = None, probe: bool = True
) -> list[Operation]:
    """Those of a whole step over one process's batch.

    `config` is resolved, with its precision; `count` is the number of all parameters, `row_bytes` a stored row's size,
    None for float32 moments.
    """
    m = config.model
    assert m.in_channels is not None and m.input_size is not None
    row_bytes = 8 * m.in_channels * m.input_size**2 if row_bytes is None else row_bytes
    found: list[Operation] = []
    for plan, times in branch_plans(config, probe).items():
        found += [o.often(times) for o in operations(config, plan, probe_classes, row_bytes)]
    return [*found, Operation("optimizer", OPTIMIZER, "optimizer", bytes=optimizer_bytes(count))]


def branch_plans(config: Config, probe: bool = True) -> Counter[BranchPlan]:
    """The different micro-batches of a step of one process, and how many there are of each."""
    shards = config.optim.accumulate
    return Counter(branch_plan(config, shard, shards, probe) for shard in range(shards))


def operations(config: Config, plan: BranchPlan, probe_classes: int, row_bytes: int) -> Iterator[Operation]:
    """Those of one micro-batch, forward and backward."""
    if config.model.backbone == "unet":
        for name, found in parts(config, plan, probe_classes).items():
            if name.removeprefix(SECOND) == "U-Net":
                yield Operation(name, PRODUCTS, "other", found.training)
    for product in products(config, plan, probe_classes):
        if product.part != "pooling":  # it is no product of two matrices in memory: see `_pooling`
            yield from _of_product(config, product)
    if plan.probe:
        yield from _pooling(config, plan)
    yield from _between(config, plan, row_bytes)


def _element(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4


def _of_product(config: Config, product: Product) -> Iterator[Operation]:
    part = product.part.removeprefix(SECOND)
    room, size, times = ROOMS[part], _element(config), product.times
    m, k, n = product.rows, product.inner, product.columns
    forward, backward = product.flops.forward, product.flops.training - product.flops.forward
    if part == "attention":
        # qkv read and the result written; backward those, the result and its gradient read, qkv's gradient written.
        width = size * m * k * (times // 2)
        yield Operation(product.part, ATTENTION, room, forward, 4 * width, times // 2)
        yield Operation(product.part, ATTENTION, room, backward, 8 * width, times // 2, backward=True)
        return
    kind = PROBE if part == "probe head" else PRODUCTS
    moved = size * times * (m * k + k * n + m * n)
    yield Operation(product.part, kind, room, forward, moved, times, (m, n, k))
    yield Operation(product.part + ", gradient of the weight", kind, room, forward, moved, times, (n, k, m), True)
    if product.both_gradients:
        yield Operation(product.part + ", gradient of the input", kind, room, forward, moved, times, (m, k, n), True)


def _between(config: Config, plan: BranchPlan, row_bytes: int) -> Iterator[Operation]:
    """The operations between the matrix products."""
    m, probe, tokens = config.model, config.probe, config.grid**2
    assert m.in_channels is not None and m.input_size is not None
    size, sit = _element(config), m.backbone == "sit"
    latent = plan.batch * m.in_channels * m.input_size**2
    yield Operation("interpolant", INPUTS, "interpolant", bytes=plan.batch * row_bytes + 8 * latent)
    yield Operation("velocity loss", INPUTS, "losses", bytes=(3 * size + 8) * latent)
    extra = plan.extra if plan.probe else 0
    # Of the probed block the second half of the extra rows goes another way.
    apart = extra if probe.pool_before_fc2 else 0
    if sit:
        rows = plan.batch * m.depth + extra * probe.depth
        seams, width = 2 * rows - extra, tokens * m.hidden_size * size
        yield Operation("norm", ADALN, "adaLN", bytes=2 * width * (plan.batch + extra))
        yield Operation("norm", ADALN, "adaLN", bytes=3 * width * (plan.batch + extra), backward=True)
        yield Operation("gate, residual and norm", ADALN, "adaLN", bytes=4 * width * seams, times=2 * m.depth)
        yield Operation(
            "gate, residual and norm", ADALN, "adaLN", bytes=6 * width * seams, times=2 * m.depth, backward=True
        )
        inner = tokens * hidden(config) * size * (rows - apart)
        yield Operation("GELU", GELU, "MLP", bytes=2 * inner, times=m.depth)
        yield Operation("GELU", GELU, "MLP", bytes=3 * inner, times=m.depth, backward=True)


def _pooling(config: Config, plan: BranchPlan) -> Iterator[Operation]:
    """Over the tokens of each sample's window; those outside are not read, but their gradient is written."""
    m, probe, tokens, size = config.model, config.probe, config.grid**2, _element(config)
    window = probe.window_min**2
    width = plan.batch * m.hidden_size
    yield Operation("pool", PROBE, "probe", 2 * width * tokens, width * size * window)
    yield Operation("pool", PROBE, "probe", 2 * width * tokens, width * size * tokens, backward=True)
    if m.backbone == "sit" and probe.pool_before_fc2 and plan.extra:
        inner = plan.extra * hidden(config)
        yield Operation("GELU and pool", PROBE, "probe", 2 * inner * tokens, inner * size * window)
        yield Operation(
            "GELU and pool", PROBE, "probe", 2 * inner * tokens, inner * size * (window + tokens), backward=True
        )
