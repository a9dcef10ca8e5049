"""A model of a training step on 1 to 1024 GPUs: which term binds, and how far more GPUs help.

    python -m bench.scaling_model [--preset NAME] [--batch-size N ...] [--global-batch N ...] [--gpus N ...]
                                  [--ASSUMPTION VALUE ...] [--check] [--json FILE] [--markdown FILE]

Every figure of a GPU, a network or a disk is an assumption until it is measured: each is a flag (`--help`) and is
printed with the table. What is not assumed: FLOPs (`lsep.cost.flops`), parameters, bytes, and the loader's rate,
measured on a CPU. A step is

    compute + launches + optimizer + exposed communication, or the loader where that is slower, + checkpoint

What is exchanged, and what of it no backward hides: `lsep.cost.cluster`.

`--check` measures 1, 2 and 4 processes here (gloo, CPU) and puts them beside the model: `bench.scaling_check`.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bench.section import ROOT, Section, show
from bench.step import facts, finish
from bench.variants import configuration
from lsep.config import Config, override
from lsep.cost import flops
from lsep.cost.cluster import MODES, Cluster, step
from lsep.errors import UserError
from lsep.model import SiT

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
LOADER = ROOT / "bench" / "results" / "loader-cpu.json"


def _loader_rate() -> float:
    """Images/s of the ring loader with checksums, as `bench.loader` measured it."""
    return float(json.loads(LOADER.read_text())["loaders"]["ring, crc"]["samples_per_s"])


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
        f"loader: {cluster.loader:,.0f} images/s a node, "
        + ("measured by bench.loader on 2 cores of a CPU, no GPU" if cluster.loader == _loader_rate() else "given"),
        f"checkpoint: 16 bytes a parameter every {config.train.checkpoint_every} steps, written asynchronously: "
        "only staging stalls, and a disk slower than the interval; fsdp and hsdp stage a shard a GPU",
        "the memory a step needs: lsep plan; efficiency is against one GPU of the model",
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
        default = _loader_rate() if f.name == "loader" else f.default
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(f.default), default=default, help=f"{f.metadata['meaning']} (%(default)g)")
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
        if value < 0 or (value == 0 and "latency" not in name and name != "launch"):
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
