"""LSEP in miniature, against time: a declared set of trainings, their samples' distance, their features, one page.

    python -m bench.study                                  # digits, on a CPU
    python -m bench.study --data cifar10 --cifar10 FOLDER  # CIFAR-10, its size by the device
    python -m bench.study --only paper --seeds 7           # a row more

Rows run one after the other, the first five variants with three seeds first. A row that was interrupted goes on, one
that is done is kept in bench/results/study, and the page is drawn after each. A training writes checkpoints along its
way; from each the EMA weights draw class-balanced samples, which are compared with the training images, and a linear
probe is fitted to the probed block's features.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.section import ROOT
from bench.study_page import render
from bench.study_row import MAIN, VARIANTS, Sizes, row
from bench.study_task import Task, open_task
from lsep.errors import UserError
from lsep.run import write_atomic

SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """One row: a variant and a seed."""

    variant: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def plans(only: list[str] | None, seeds: list[int] | None) -> list[Plan]:
    """The rows in the order they run: what the answer rests on comes first."""
    chosen = [Plan(v, seed) for v in MAIN for seed in (range(SEEDS) if seeds is None else seeds)]
    chosen += [Plan(v, seed) for v in VARIANTS if v not in MAIN for seed in (seeds or [0])]
    return [plan for plan in chosen if only is None or plan.variant in only]


def run_all(
    task: Task, sizes: Sizes, chosen: list[Plan], folder: Path, results: Path, docs: Path, command: str
) -> None:
    """Run the rows that are not in the file `results` yet; each is in it as soon as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": {}}
    if found["rows"] and found["sizes"] != sizes.described():
        raise UserError(f"{results} holds rows of other sizes: choose another --results")
    for i, plan in enumerate(chosen, 1):
        if plan.key in found["rows"]:
            continue
        print(f"row {i} of {len(chosen)}: {plan.key}", flush=True)
        start = time.perf_counter()
        name = "-".join(re.findall("[A-Za-z0-9.]+", plan.key))
        strips = results.with_suffix("") / name if plan.variant in MAIN and plan.seed == 0 else None
        entry = row(task, sizes, VARIANTS[plan.variant], plan.seed, folder / task.name / name, strips)
        entry |= {"variant": plan.variant, "seed": plan.seed, "minutes": (time.perf_counter() - start) / 60}
        entry |= {"machine": machine(), "command": f"{command} --only {shlex.quote(plan.variant)} --seeds {plan.seed}"}
        if strips:
            entry["strips"] = str(strips.relative_to(results.parent))
        found |= {"task": task.name, "note": task.note, "distance": task.distance, "sizes": sizes.described()}
        found["rows"][plan.key] = entry
        results.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(results, json.dumps(found, indent=1) + "\n")
        render(results.parent, docs)
        print(f"  {task.distance} {statistics.mean(entry['final']):.3f} in {entry['minutes']:.1f} minutes", flush=True)


def machine() -> str:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    return f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}"


SIZES = {
    ("digits", "cpu"): Sizes(
        {"optim.schedule": "constant", "train.steps": 400}, points=4, samples=1000, samples_on_the_way=500, probed=1500
    ),
    ("cifar10", "cpu"): Sizes(
        {"model.depth": 6, "model.hidden_size": 96, "model.num_heads": 4, "model.patch_size": 4, "probe.depth": 2,
         "probe.window_min": 6, "optim.lr": 2e-3, "optim.schedule": "constant", "train.steps": 800,
         "train.batch_size": 64},
        points=4, samples=500, samples_on_the_way=250, probed=1500,
    ),
    ("cifar10", "cuda"): Sizes(
        {"model.depth": 12, "model.hidden_size": 384, "model.num_heads": 6, "model.patch_size": 2, "probe.depth": 4,
         "probe.window_min": 12, "optim.lr": 5e-4, "optim.probe_lr": 1e-3, "optim.warmup_steps": 200,
         "optim.ema_decay": 0.999, "optim.schedule": "constant", "train.steps": 4800, "train.batch_size": 256,
         "train.log_every": 100, "sample.batch_size": 1000},
        points=6, samples=10_000, samples_on_the_way=5000, probed=10_000,
    ),
}  # fmt: skip
"""By data and device; digits on a GPU have the sizes of a CPU. On a CPU the sizes follow from minutes, not from what
the data deserves. The rate is constant, so that a point on the way is no training cut short."""
CPU_ROWS = 10_000
"""Training images of CIFAR-10 on a CPU."""


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 where the data is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="data set")
    parser.add_argument("--cifar10", type=Path, help="folder of cifar10.py, with load(split) and features(images)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="variants; all when not given")
    parser.add_argument("--seeds", nargs="+", type=int, help="training seeds; 0 1 2 for the first five, 0 for the rest")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "study", help="folder of the rows")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page study.md and its plots")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of stores and trainings")
    parser.add_argument("--trial", action="store_true", help="tiny sizes, which try the program and tell nothing")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SIZES.get((args.data, device)) or SIZES[args.data, "cpu"]
    if args.trial:
        changes = {**sizes.changes, "train.steps": 4, "model.depth": 2, "model.hidden_size": 32, "model.num_heads": 2}
        sizes = Sizes(changes, points=2, samples=20, samples_on_the_way=20, probed=60, times=(0.3,), sampler_steps=2)
    threads = os.environ.get("OMP_NUM_THREADS")
    command = f"OMP_NUM_THREADS={threads} " if threads else ""
    command += f"python -m bench.study --data {args.data}" + (" --cifar10 FOLDER" if args.cifar10 else "")
    try:
        rows = CPU_ROWS if (args.data, device) == ("cifar10", "cpu") else None
        task = open_task(args.data, args.cifar10, args.work / "data", rows)
        results = args.results / f"{args.data}-{device}.json"
        run_all(task, sizes, plans(args.only, args.seeds), args.work, results, args.docs, command)
    except UserError as error:
        print(f"bench.study: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
