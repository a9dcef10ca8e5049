"""Milliseconds of a training step by part, computed: what each operation takes at the rates of a card that others have
measured, beside its floor.

    step_time(config, choice, probe_classes=1000, known=CARDS["h200"])

A floor is what `lsep.cost.operations` says at the rates of large products and copies. The estimate adds what the
implementations in `choice` do besides: passes that are not fused, sums for biases, casts, recomputation, and the gaps
between kernels. Nothing here was measured by this project: each part names what it rests on.
"""

from dataclasses import dataclass, replace

from lsep.backends import Choice
from lsep.config import Config
from lsep.cost.cards import GRAPH_NODE, KERNEL, Known
from lsep.cost.flops import SECOND
from lsep.cost.operations import (
    ADALN,
    ATTENTION,
    GELU,
    INPUTS,
    OPTIMIZER,
    PROBE,
    PRODUCTS,
    Operation,
    branch_plans,
    step_operations,
)  # fmt: skip
from lsep.cost.parameters import hidden, parameters

RAMP = 192
"""Products of inner length K reach K / (K + RAMP) of what long ones do: filling and emptying a tile. Assumed: nobody
has published cuBLAS at N and K from 1152 to 4608."""
LONG = 8192
"""K of the products whose rate is known."""
NARROW = 2048
"""Products of a shorter K stand apart in the table."""
NODES_A_BLOCK, NODES_BESIDE = 32, 700
"""Kernels of a block, forward and backward, and of the rest of a micro-batch: a graph of XL/2 had 1,602 nodes."""
IN_A_BLOCK = ("qkv", "attention", "proj", "fc1", "fc2", "GELU", "gate, residual and norm")
"""What `--train.memory recompute-blocks` computes again; elementwise the last alone."""


@dataclass(frozen=True)
class Part:
    """Of a step."""

    name: str
    floor: float
    """Seconds."""
    seconds: float
    rests_on: str


def step_time(config: Config, choice: Choice, probe_classes: int, known: Known, probe: bool = True) -> list[Part]:
    """The parts of a step of one process, whose batch `train.batch_size` is; seconds add up to the step's.

    `config` is resolved, with its precision; `probe` is False once the probe has ended.
    """
    count = parameters(config, probe_classes).total
    found = step_operations(config, probe_classes, count, probe=probe)
    products = [o for o in found if o.kind == PRODUCTS]
    groups: dict[str, list[Operation]] = {}
    for operation in products:
        groups.setdefault(_shape_class(operation), []).append(operation)
    parts = [_part(name, needs, known, choice, _on_products(known, choice)) for name, needs in groups.items()]
    attention = "FlashAttention-3's figures at head 64, 512 tokens; at other shapes assumed alike"
    copy = f"{known.copy / 1e12:.2f} TB/s: {known.copy_source}"
    for kind, name, rests_on in ((ATTENTION, ATTENTION, attention), (ADALN, ADALN, copy), (GELU, GELU, copy)):
        parts.append(_part(name, [o for o in found if o.kind == kind], known, choice, rests_on))
    parts.append(Part("sums for biases", 0.0, _bias_bytes(config, choice, probe) / known.copy, copy))
    for kind in (PROBE, INPUTS):
        parts.append(_part(kind, [o for o in found if o.kind == kind], known, choice, copy))
    casts = _cast_bytes(config, choice, count)
    if casts:
        parts.append(Part("casts and sums of gradients", 0.0, casts / known.copy, copy))
    again = [o for o in found if _computed_again(config, o)]
    if again:
        parts.append(Part("recomputation", 0.0, sum(_seconds(o, known, choice) for o in again), "the parts above"))
    update = next(o for o in found if o.kind == OPTIMIZER)
    moved = _optimizer_bytes(choice) * count
    parts.append(Part(OPTIMIZER, min(update.floor(known.rates), moved / known.copy), moved / known.copy, copy))
    nodes = config.optim.accumulate * (NODES_A_BLOCK * config.model.depth + NODES_BESIDE)
    gap, what = (GRAPH_NODE, "assumed") if choice.graphs else (KERNEL, "pytorch/ao's roofline_utils")
    parts.append(Part("gaps between kernels", 0.0, nodes * gap, f"{nodes:,} kernels, {gap * 1e6:.1f} us each: {what}"))
    return [part for part in parts if part.seconds]


def seconds(parts: list[Part]) -> float:
    """Of the whole step."""
    return sum(part.seconds for part in parts)


def split(parts: list[Part]) -> tuple[float, float]:
    """Seconds of the forward and of the backward, as far as an exchange between processes can hide under them: a third
    and two of all but the optimizer."""
    busy = sum(part.seconds for part in parts if part.name != OPTIMIZER)
    return busy / 3, 2 * busy / 3


def _shape_class(product: Operation) -> str:
    if _of_weight(product):
        return "products, gradients of weights"
    assert product.shape is not None
    return f"products, K {'below' if product.shape[2] < NARROW else 'from'} {NARROW:,}"


def _of_weight(product: Operation) -> bool:
    return product.name.endswith("gradient of the weight")


def _part(name: str, needs: list[Operation], known: Known, choice: Choice, rests_on: str) -> Part:
    return Part(
        name, sum(o.floor(known.rates) for o in needs), sum(_seconds(o, known, choice) for o in needs), rests_on
    )  # fmt: skip


def _on_products(known: Known, choice: Choice) -> str:
    fp8 = f"; in fp8 {known.fp8 / 1e12:.0f}" if choice.mlp_by == "fp8" else ""
    return f"{known.product / 1e12:.0f} TFLOP/s{fp8}: {known.product_source}; K / (K + {RAMP}) assumed"


def _seconds(operation: Operation, known: Known, choice: Choice) -> float:
    """What an operation takes as `choice` computes it."""
    if operation.kind == ATTENTION:
        # Its backward computes the scores again: 5 products for 4 that the mathematics needs.
        rate = known.attention[operation.backward] / (1.25 if operation.backward else 1)
        return max(operation.flops / rate, operation.bytes / known.copy)
    if operation.kind == GELU:
        return operation.bytes * _gelu_share(choice, operation.backward) / known.copy
    moved = operation.bytes
    if operation.kind == ADALN and operation.backward:
        moved *= 1 + 0.75 / 12  # partial sums of shift, scale and gate, written and read
    if operation.shape is None:
        return replace(operation, bytes=moved).floor(known.rates)
    inner = operation.shape[2]
    part = operation.name.removeprefix(SECOND).partition(",")[0]
    fp8 = choice.mlp_by == "fp8" and part in ("qkv", "proj", "fc1", "fc2") and not _of_weight(operation)
    rate = (known.fp8 if fp8 else known.product) * min(1.0, inner / (inner + RAMP) * (1 + RAMP / LONG))
    return max(operation.flops / rate, moved / known.copy)


def _gelu_share(choice: Choice, backward: bool) -> float:
    """Bytes that the implementation moves over those of the operation, 2 elements forward and 3 backward."""
    forward, back = {"torch": (2, 3), "triton": (2, 4), "cublaslt": (0, 2), "fp8": (1.5, 4.5)}[choice.mlp_by]
    return back / 3 if backward else forward / 2


def _bias_bytes(config: Config, choice: Choice, probe: bool) -> float:
    """What the sums over rows for the biases of qkv, proj and fc2 read; fc1's too where no kernel has it on its way."""
    size = 2 if config.train.precision == "bf16" else 4
    rows = sum(
        times * (plan.batch * config.model.depth + plan.extra * config.probe.depth)
        for plan, times in branch_plans(config, probe).items()
    )
    widths = 5 * config.model.hidden_size + (hidden(config) if choice.mlp_by == "torch" else 0)
    return float(rows * config.grid**2 * widths * size)


def _cast_bytes(config: Config, choice: Choice, count: int) -> float:
    """Weights cast for each micro-batch, their gradients cast back and added to those there are."""
    if choice.bf16_weights or config.train.precision == "fp32":
        return 0.0
    shards = config.optim.accumulate
    return float(count * ((6 + 6) * shards + 12 * (shards - 1)))


def _optimizer_bytes(choice: Choice) -> int:
    """A parameter: in one operation 40, 2 less with gradients and copies in bf16; else clipping and average apart."""
    if choice.optimizer in ("csrc", "reference"):
        return 38 if choice.bf16_weights else 40
    return 4 + 8 + 28 + 12


def _computed_again(config: Config, operation: Operation) -> bool:
    again = {"recompute-blocks": IN_A_BLOCK, "recompute-elementwise": IN_A_BLOCK[-1:]}.get(config.train.memory, ())
    return not operation.backward and operation.name.removeprefix(SECOND) in again
