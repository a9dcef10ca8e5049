"""A model of a training step on 1 to 1024 GPUs: which term binds, and how far more GPUs help.

    python -m bench.scaling_model [--preset NAME] [--batch-size N ...] [--global-batch N ...] [--gpus N ...]
                                  [--ASSUMPTION VALUE ...] [--check] [--json FILE] [--markdown FILE]

Every figure of a GPU, a network or a disk is an assumption until it is measured: each is a flag (`--help`) and is
printed with the table. What is not assumed: FLOPs (`lsep.cost.flops`), parameters, bytes, and the loader's rate,
measured on a CPU. A step is

    compute + launches + optimizer + exposed communication, or the loader where that is slower, + checkpoint

Gradients go out in buckets while the backward runs. With k buckets of c seconds each under a backward of b seconds the
last one ends max(c, b/k + kc - b) after it: its own time, or what does not fit. Gradients that come at the very end
(with a joint modulation a third of all) have no backward to hide under. A collective is a ring in a node, then one over
the nodes (for an all-reduce with a tree's latency), in which each GPU exchanges its own part with its like elsewhere.

`--check` measures 1, 2 and 4 processes here (gloo, CPU) and puts them beside the model: `bench.scaling_check`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from bench.section import ROOT, Section, show
from bench.step import facts, finish
from bench.variants import configuration
from lsep.config import Config, override
from lsep.cost import flops
from lsep.errors import UserError
from lsep.model import SiT

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
LOADER = ROOT / "bench" / "results" / "loader-cpu.json"


def _loader_rate() -> float:
    """Images/s of the ring loader with checksums, as `bench.loader` measured it."""
    return float(json.loads(LOADER.read_text())["loaders"]["ring, crc"]["samples_per_s"])


def assumed(default: float, meaning: str) -> float:
    return field(default=default, metadata={"meaning": meaning})  # type: ignore[no-any-return]


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
    loader: float = assumed(
        0.0, "images/s the loaders of a node read; 0 takes bench/results/loader-cpu.json's ring, crc"
    )
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
    width, depth = config.model.hidden_size, config.model.depth
    late = 0 if config.backend.modulation == "block" else (6 * depth + 2) * width * (width + 1)
    forward = whole.forward / rate
    return Work(forward, whole.training / rate - forward, parameters, late, depth + 1)


def step(
    cluster: Cluster, config: Config, mode: str, images: int, gpus: int, parameters: int, every: int | None = None
) -> Step:
    """A step of `images` images over `gpus`; `every`: steps between checkpoints, None for the configuration's."""
    work = work_of(cluster, config, images, gpus, parameters)
    inside, _ = layout(cluster, gpus)
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": inside}[mode]
    hidden, exchange = MODES[mode](cluster, work, gpus) if gpus > 1 else (0.0, 0.0)
    compute = work.forward + work.backward
    optimizer = 40 * parameters / shards / cluster.copy_rate  # bytes of lsep/cost/floors.py
    busy = compute + cluster.launch + optimizer + hidden
    loader = max(0.0, images / gpus * inside / (cluster.loader or _loader_rate()) - busy)
    # Weights, EMA and two moments in float32; staged by those who hold them, written while training goes on.
    size, every = 16 * parameters, every or config.train.checkpoint_every
    waiting = max(0.0, size / cluster.storage - every * (busy + loader))
    checkpoint = (size / shards / cluster.host_copy + waiting) / every
    return Step(compute, cluster.launch, optimizer, hidden, loader, checkpoint, exchange)


def count(config: Config) -> int:
    """Parameters of the transformer; the probe's classifier, 0.2 % of XL/2, is left out."""
    with torch.device("meta"):
        return sum(p.numel() for p in SiT(config).parameters())


def rows(
    cluster: Cluster, config: Config, parameters: int, gpus: list[int], batches: list[int], weak: bool
) -> list[dict[str, Any]]:
    """The table: `batches` are images a GPU (weak) or images a step (strong)."""
    out = []
    for batch in batches:
        for n in gpus:
            images = batch * n if weak else batch
            if images < n:
                continue
            found = {mode: step(cluster, config, mode, images, n, parameters) for mode in MODES}
            one = step(cluster, config, "ddp", batch, 1, parameters)
            s = found["ddp"]
            out.append({
                "images a GPU": images / n, "images a step": images, "GPUs": n, "ms": s.seconds * 1e3,
                "images/s": images / s.seconds, "efficiency": images / s.seconds / n / (batch / one.seconds),
                "binds": s.largest[0], "then": s.largest[1], "communication ms": s.exchange * 1e3,
                "exposed ms": s.communication * 1e3, "fsdp ms": found["fsdp"].seconds * 1e3,
                "hsdp ms": found["hsdp"].seconds * 1e3, "terms": s.terms,
            })  # fmt: skip
    return out


def assumptions(cluster: Cluster, config: Config) -> list[str]:
    """Each in a sentence."""
    found = [f"assumed: {f.name} = {getattr(cluster, f.name):.6g}, {f.metadata['meaning']}" for f in fields(cluster)]
    return [
        *found,
        f"loader: {cluster.loader or _loader_rate():,.0f} images/s a node, "
        + ("given" if cluster.loader else "measured by bench.loader on 2 cores of a CPU, no GPU"),
        f"checkpoint: 16 bytes a parameter every {config.train.checkpoint_every} steps, written asynchronously: "
        "only staging stalls, and a disk slower than the interval; fsdp and hsdp stage a shard a GPU",
        "the memory a step needs is not modelled: docs/long-runs.md; efficiency is against one GPU of the model",
        "fsdp gathers in bf16, in forward and backward; hsdp within a node",
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="sit-xl-2-256", help="sit-xl-2-256 where not given")
    numbers = {"type": int, "nargs": "*", "metavar": "N"}
    parser.add_argument("--batch-size", default=[32, 64, 128, 256], help="images a GPU, weak scaling", **numbers)
    parser.add_argument("--global-batch", default=[256, 1024, 4096], help="images a step, strong scaling", **numbers)
    parser.add_argument("--gpus", default=list(GPUS), **numbers)
    parser.add_argument("--images-per-second", type=float, help="of one GPU, in place of --fraction")
    parser.add_argument("--network-gbit-per-node", type=float, help="one network for all GPUs of a node, Gb/s")
    for f in fields(Cluster):
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=type(f.default), default=f.default, help=f"{f.metadata['meaning']} (%(default)g)"
        )
    parser.add_argument("--check", action="store_true", help="measure 1, 2 and 4 processes on this machine as well")
    parser.add_argument(
        "--rounds", type=int, default=6, metavar="N", help="launches of each size in --check; 6 where not given"
    )
    parser.add_argument("--check-preset", default="cpu", help="of bench/variants.py; cpu where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    return parser.parse_args(arguments)


def cluster_of(args: argparse.Namespace, config: Config) -> Cluster:
    """The flags as one; raises UserError for what no machine can be."""
    values = {f.name: getattr(args, f.name) for f in fields(Cluster)}
    if args.images_per_second is not None:
        images = config.train.batch_size
        training = flops.total(flops.step_parts(config, config.model.num_classes or 0)).training / images
        values["fraction"] = args.images_per_second * training / values["matrix_rate"]
    if args.network_gbit_per_node is not None:
        values["network"] = args.network_gbit_per_node * 1e9 / 8 / values["per_node"]
    for name, value in values.items():
        if value < 0 or (value == 0 and "latency" not in name and name not in ("launch", "loader")):
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected a positive number")
    return Cluster(**values)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All figures, and the report."""
    config = configuration(args.preset)
    model = config.model
    config = override(config, {
        "model.in_channels": model.in_channels or 4, "model.num_classes": model.num_classes or 1000,
        "model.input_size": model.input_size or 32,
    })  # fmt: skip
    for flag, values in (("batch-size", args.batch_size), ("global-batch", args.global_batch), ("gpus", args.gpus)):
        if any(v < 1 for v in values):
            raise UserError(f"--{flag} has {min(values)}, expected at least 1")
    cluster, parameters = cluster_of(args, config), count(config)
    tables = {
        "weak": rows(cluster, config, parameters, args.gpus, args.batch_size, weak=True),
        "strong": rows(cluster, config, parameters, args.gpus, args.global_batch, weak=False),
    }
    notes = assumptions(cluster, config)
    result: dict[str, Any] = {
        **facts(torch.device("cpu")), "preset": args.preset, "parameters": parameters, "assumptions": notes, **tables
    }  # fmt: skip
    sections = [
        Section("Weak scaling: the same images a GPU", _shown(tables["weak"])),
        Section("Strong scaling: the same images a step", _shown(tables["strong"])),
        Section("Assumptions", notes=[f"{args.preset}: {parameters:,} parameters, by counting", *notes]),
    ]
    if args.check:
        from bench.scaling_check import check

        section = check(args.check_preset, args.rounds)
        result["check"] = {"rows": section.rows, "notes": section.notes, **section.details}
        sections.insert(0, section)
    head = [f"* {key}: {result[key]}" for key in ("machine", "Python", "torch", "commit", "command")]
    return result, "\n".join(["# Scaling: a model, and its check", "", *head, "", *(_text(s) for s in sections)])


def _shown(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "terms"} for row in table]


def _text(section: Section) -> str:
    """As `show`, without state and seconds, which a model has none of."""
    title, *rest = show(section).splitlines()
    return "\n".join([title if section.failures or section.seconds else f"## {section.name}", *rest, ""])


def main(arguments: list[str] | None = None) -> int:
    """Compute, measure where asked, write, and return the exit code."""
    return finish("bench.scaling_model", parse(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
