"""A step on many GPUs: what they exchange, what of it no work hides, the loader and the checkpoints.

Every figure of a GPU, a network or a disk is an assumption until it is measured. A step is

    compute + launches + optimizer + exposed communication, or the loader where that is slower, + checkpoint

Gradients go out in buckets while the backward runs. With k buckets of c seconds each under a backward of b seconds the
last one ends max(c, b/k + kc - b) after it: its own time, or what does not fit. Gradients that come at the very end
(with a joint modulation a third of all) have no backward to hide under. A collective is a ring in a node, then one over
the nodes (for an all-reduce with a tree's latency), in which each GPU exchanges its own part with its like elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from lsep.config import Config, override
from lsep.cost import flops
from lsep.cost.operations import optimizer_bytes
from lsep.errors import UserError


def assumed(default: float, meaning: str) -> float:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Cluster:
    """What is assumed about GPUs, links and disks."""

    matrix_rate: float = assumed(790e12, "FLOP/s of a large bf16 matrix product on an H200")
    fraction: float = assumed(0.5, "share of it that a step's model FLOPs reach, whatever the batch size")
    copy_rate: float = assumed(4.3e12, "bytes/s of the GPU's memory, read and written, in the optimizer")
    launch: float = assumed(2e-3, "seconds a step in which the GPU waits for the host")
    per_node: int = assumed(8, "GPUs a node")  # type: ignore[assignment]
    nvlink: float = assumed(360e9, "bytes/s that a GPU sends to its neighbour in a node's ring")
    nvlink_latency: float = assumed(3e-6, "seconds a hop of that ring")
    network: float = assumed(45e9, "bytes/s that a GPU sends to another node: nine tenths of 400 Gb/s a GPU")
    network_latency: float = assumed(
        10e-6, "seconds a hop between nodes: an all-reduce has 2 log2(nodes), others nodes - 1"
    )
    bucket: float = assumed(25 * 2**20, "bytes of gradients that DDP sends at once (PyTorch's default)")
    reduce: int = assumed(2, "bytes an averaged gradient has: 2 for bf16, 4 for fp32")  # type: ignore[assignment]
    loader: float = assumed(math.inf, "images/s the loaders of a node read")
    host_copy: float = assumed(25e9, "bytes/s from a GPU to the host, when a checkpoint is staged")
    storage: float = assumed(2e9, "bytes/s to the disk, behind the training's back")


@dataclass(frozen=True)
class Work:
    """What one GPU computes and the run keeps."""

    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    parameters: int
    late: int
    """Parameters whose gradients come only when the backward is over: those of a joint modulation."""
    units: int
    """Parts that FSDP gathers and scatters one after the other."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step, term by term; together, the whole."""

    compute: float
    launches: float
    optimizer: float
    communication: float
    """Exposed: beyond forward and backward."""
    loader: float
    """Beyond all of these."""
    checkpoint: float
    exchange: float = 0.0
    """What communication takes by itself, hidden or not; no term."""

    @property
    def terms(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "exchange"}

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def largest(self) -> list[str]:
        """The terms' names, what binds first."""
        return sorted(self.terms, key=self.terms.__getitem__, reverse=True)


def ring(size: float, members: int, bandwidth: float, latency: float, rounds: int = 2) -> float:
    """Seconds of a ring over `members`: 2 rounds are an all-reduce, 1 an all-gather or a reduce-scatter."""
    return rounds * ((members - 1) / members * size / bandwidth + (members - 1) * latency)


def between(cluster: Cluster, size: float, nodes: int, rounds: int = 2) -> float:
    """Seconds of the same over one GPU of each node; NCCL has trees for all-reduces only."""
    hops = 2 * math.log2(nodes) if rounds == 2 else nodes - 1
    return rounds * (nodes - 1) / nodes * size / cluster.network + hops * cluster.network_latency


def collective(cluster: Cluster, size: float, gpus: int, rounds: int = 2) -> float:
    """Seconds of one call over all GPUs: in each node, and over the nodes with a node's GPUs side by side."""
    inside, nodes = layout(cluster, gpus)
    within = ring(size, inside, cluster.nvlink, cluster.nvlink_latency, rounds)
    return within + between(cluster, size / inside, nodes, rounds)


def layout(cluster: Cluster, gpus: int) -> tuple[int, int]:
    """GPUs a node, and nodes."""
    inside = min(gpus, cluster.per_node)
    if gpus % inside:
        raise UserError(f"--gpus has {gpus}, expected at most {cluster.per_node} or a multiple of it")
    return inside, gpus // inside


def exposed(work: float, pieces: int, each: float) -> float:
    """Seconds by which `pieces` exchanges of `each` seconds, ready one after the other, outlast `work` seconds."""
    return max(each, work / pieces + pieces * each - work)


def ddp(cluster: Cluster, work: Work, gpus: int) -> tuple[float, float]:
    """Seconds of communication, exposed and in all: gradients averaged in buckets."""
    early, late = (n * cluster.reduce for n in (work.parameters - work.late, work.late))
    pieces, rest = math.ceil(early / cluster.bucket), math.ceil(late / cluster.bucket)
    each = collective(cluster, early / pieces, gpus)
    after = rest * collective(cluster, late / rest, gpus) if rest else 0.0
    return exposed(work.backward, pieces, each) + after, pieces * each + after


def fsdp(cluster: Cluster, work: Work, gpus: int, nodes_apart: bool = False) -> tuple[float, float]:
    """The same for weights in shards, gathered in bf16 for forward and backward, gradients scattered.

    nodes_apart: hsdp, shards within a node and an average of each shard over the nodes.
    """
    inside, nodes = layout(cluster, gpus)
    group = inside if nodes_apart else gpus

    def gather(n: float) -> float:
        return collective(cluster, 2 * n, group, 1)

    def scatter(n: float) -> float:
        size = cluster.reduce * n
        average = between(cluster, size / inside, nodes) if nodes_apart else 0.0
        return collective(cluster, size, group, 1) + average

    unit, k = (work.parameters - work.late) / work.units, work.units
    there, back = gather(unit), gather(unit) + scatter(unit)
    late = 2 * gather(work.late) + scatter(work.late) if work.late else 0.0
    hidden = exposed(work.forward, k, there) + exposed(work.backward, k, back)
    return hidden + late, k * (there + back) + late


MODES: dict[str, Callable[[Cluster, Work, int], tuple[float, float]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": lambda cluster, work, gpus: fsdp(cluster, work, gpus, nodes_apart=True),
}


def work_of(cluster: Cluster, config: Config, images: int, gpus: int, parameters: int) -> Work:
    """`config` (resolved) at `images` a step over `gpus`."""
    assert config.model.num_classes is not None
    whole = flops.total(flops.step_parts(override(config, {"train.batch_size": images}), config.model.num_classes))
    rate = cluster.matrix_rate * cluster.fraction * gpus
    forward = whole.forward / rate
    late = 0 if config.backend.modulation == "block" else late_parameters(config)
    return Work(forward, whole.training / rate - forward, parameters, late, config.model.depth + 1)


def late_parameters(config: Config) -> int:
    """Those of a joint modulation."""
    width, depth = config.model.hidden_size, config.model.depth
    return (6 * depth + 2) * width * (width + 1)


def step(
    cluster: Cluster, config: Config, mode: str, images: int, gpus: int, parameters: int, every: int | None = None
) -> Step:
    """A step of `images` images over `gpus`; `every`: steps between checkpoints, None for the configuration's."""
    work = work_of(cluster, config, images, gpus, parameters)
    inside, _ = layout(cluster, gpus)
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": inside}[mode]
    hidden, exchange = MODES[mode](cluster, work, gpus) if gpus > 1 else (0.0, 0.0)
    compute = work.forward + work.backward
    optimizer = optimizer_bytes(parameters) / shards / cluster.copy_rate
    busy = compute + cluster.launch + optimizer + hidden
    loader = max(0.0, images / gpus * inside / cluster.loader - busy)
    # Weights, EMA and two moments in float32; staged by those who hold them, written while training goes on.
    size, every = 16 * parameters, every or config.train.checkpoint_every
    waiting = max(0.0, size / cluster.storage - every * (busy + loader))
    checkpoint = (size / shards / cluster.host_copy + waiting) / every
    return Step(compute, cluster.launch, optimizer, hidden, loader, checkpoint, exchange)
