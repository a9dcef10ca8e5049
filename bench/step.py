"""Time of a training step: plain SiT, LSEP the authors' way, LSEP as it is here; interleaved, beside their FLOPs.

    python -m bench.step [--preset NAME] [--batch-size N] [--variants NAME ...] [--steps N] [--rounds N]
                         [--compile off|block|model] [--json FILE] [--markdown FILE]

Variants: `plain` SiT; `authors`, LSEP in two separate passes with full `fc2`, eager, PyTorch's own operations; `paper`,
the same mathematics through this project's joint pass, kernels and compiler; `shared-E`, LSEP with second passes for a
share E of the batch. A name followed by `+SECTION.FIELD=VALUE` is that variant with the field changed: so every
optimisation can be put beside the step without it (`shared-0.8 shared-0.8+train.graphs=off`). Presets are those of
`lsep presets` on random latents, and `cpu` and `tiny` of this file's own.

Only `train_step` is timed, its batches lie on the device. A round times every variant, in rotating order; times are
medians over rounds, ratios medians of the ratios within a round. Where the weights of all variants would leave too
little memory for activations they run one after the other, and the report says so; the files are then written after
each. A variant that does not fit the GPU's memory has its batch cut into micro-batches, and its row says so. A table
names the program that each row timed; a variant that would be another one because csrc is not built has failed.

The exit code is 1 when a variant failed, 2 for a command that cannot be meant.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from bench.section import Context, Section, plain, show, write_whole
from bench.timing import measure as time_calls
from bench.variants import ROOMS, VARIANTS, Measured, configuration, interleaves, measure, missing, variant, with_data
from lsep.checks import check
from lsep.config import Config, override
from lsep.cost import flops
from lsep.cost.operations import INPUTS, PROBE, Operation, Rates, step_operations
from lsep.errors import UserError
from lsep.plan import branch_plan
from lsep.step import pick_device

PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "A40": 150, "RTX 4090": 165,
}  # fmt: skip
"""Dense bf16 TFLOP/s by what a GPU's name contains; of several, the longest counts (NVIDIA's data sheets)."""

COMPILE = ("auto", "off", "block", "model")


def rates(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a matrix product: on a GPU bench.machine's, in bf16, on a CPU small, in fp32."""
    if device.type == "cuda":
        from bench.machine import copy_rate, matrix_rate

        context = Context(device, smoke=False, seed=0)
        return copy_rate(context), matrix_rate(context)
    a, source = torch.randn(1024, 1024), torch.ones(1 << 26, dtype=torch.uint8)
    target = source.clone()
    calls = {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}
    seen = [time_calls(calls, device) for _ in range(10)]
    # The best, since a ceiling is asked for, and a short measurement on a shared machine has outliers to one side.
    product, copy = (min(t[name].median for t in seen) for name in calls)
    return 2 * source.numel() / copy, 2 * 1024**3 / product


def again(device: torch.device, before: tuple[float, float]) -> tuple[float, float]:
    """The higher of the rates `before` the steps and, on a CPU, which others may have used then, those now."""
    after = before if device.type == "cuda" else rates(device)
    return max(before[0], after[0]), max(before[1], after[1])


def peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s on the data sheet; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [key for key in PEAKS if re.search(rf"\b{key}\b", name)]
    return PEAKS[max(known, key=len)] * 1e12 if known else None


def row(name: str, found: dict[str, Measured], matrix_rate: float, device_peak: float | None) -> dict[str, Any]:
    """The figures of one variant, times in ms, by their titles."""
    m = found[name]
    times = m.seconds * (2 if len(m.seconds) == 1 else 1)  # one round has no spread
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    batch = m.config.train.batch_size
    out: dict[str, Any] = {
        "variant": name, "images/s": batch / median, "ms": median * 1e3, "quartiles": [low * 1e3, high * 1e3],
        "spread": (high - low) / median,
    }  # fmt: skip
    for base in ("plain", "authors"):
        if base in found:
            pairs = zip(m.seconds, found[base].seconds, strict=True)
            out[f"time / {base}"] = statistics.median(a / b for a, b in pairs)
            out[f"FLOPs / {base}"] = m.flops / found[base].flops
    plan, speed = branch_plan(m.config), m.flops / median
    return out | {
        "micro-batches": m.config.optim.accumulate,
        "blocks": flops.second_pass_blocks(m.config, plan), "GFLOP/image": m.flops / batch / 1e9,
        "MFU": speed / device_peak if device_peak else None, "of matrix rate": speed / matrix_rate,
        "peak GiB": None if m.peak_bytes is None else m.peak_bytes / 2**30, "compile s": m.compile_seconds,
    }  # fmt: skip


def floors(found: Measured, copy_rate: float, matrix_rate: float) -> list[dict[str, Any]]:
    """What a step has to compute and move, its time at the measured rates, and what was measured, all in ms; see
    `lsep.cost.operations`. Bytes are those beside the matrix products' own."""
    config, rates = found.config, Rates(matrix_rate, copy_rate)
    rooms: dict[str, list[Operation]] = {room: [] for room in (*ROOMS, "other")}
    for operation in step_operations(config, found.probe_classes, found.parameters):
        rooms["probe and loss" if operation.kind in (PROBE, INPUTS) else operation.kind].append(operation)
    out = []
    for room, needs in rooms.items():
        computed, moved = sum(o.flops for o in needs), sum(o.bytes for o in needs if o.shape is None)
        floor = sum(o.floor(rates) for o in needs)
        measured = found.rooms.get(room, 0.0)
        ratio = measured / floor if floor else None
        out.append({
            "room": room, "GFLOP": computed / 1e9, "GB": moved / 1e9, "floor ms": floor * 1e3,
            "measured ms": measured * 1e3, "measured / floor": ratio,
        })  # fmt: skip
    return out


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    try:
        from bench.machine import commit  # needs triton
    except ImportError:
        commit = lambda: "unknown"  # noqa: E731
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", "GPU": gpu,
        "Python": platform.python_version(), "torch": torch.__version__, "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", help="sit-xl-2-256 on a GPU, cpu without one")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images in a step; the preset's where not given")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="NAME", help="all where not given")
    parser.add_argument("--steps", type=int, metavar="N", help="in a round: 10 on a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="9 where not given")
    parser.add_argument("--compile", choices=COMPILE, default="auto", help="train.compile; auto where not given")
    parser.add_argument("--budget", action=argparse.BooleanOptionalAction, help="profile each variant; yes on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All figures, and the report."""
    device = pick_device("auto")
    cuda = device.type == "cuda"
    budget = cuda if args.budget is None else args.budget
    steps = args.steps if args.steps is not None else (10 if cuda else 1)
    for flag, value in (("steps", steps), ("rounds", args.rounds)):
        if value < 1:
            raise UserError(f"--{flag} is {value}, expected at least 1")
    preset = args.preset or ("sit-xl-2-256" if cuda else "cpu")
    base = configuration(preset)
    if args.batch_size is not None:
        base = override(base, {"train.batch_size": args.batch_size})
    ceilings = (math.nan, math.nan)

    def result(found: dict[str, Measured], failed: dict[str, str]) -> dict[str, Any]:
        copy_rate, matrix_rate = ceilings
        return {
            **facts(device), "preset": preset, "batch size": base.train.batch_size, "steps": steps,
            "rounds": args.rounds, "interleaved": together, "compile": args.compile, "copy rate": copy_rate,
            "matrix rate": matrix_rate, "variants": [row(name, found, matrix_rate, peak(device)) for name in found],
            "budgets": {name: floors(m, copy_rate, matrix_rate) for name, m in found.items() if budget and m.rooms},
            "failed": failed, "skipped": skipped,
            "programs": {name: m.program for name, m in found.items()},
            "cut": {name: m.cut for name, m in found.items() if m.cut},
            "round ms": {name: [s * 1e3 for s in m.seconds] for name, m in found.items()},
            "parts": {
                name: {p: f._asdict() for p, f in flops.step_parts(m.config, m.probe_classes).items()}
                for name, m in found.items()
            },
        }  # fmt: skip

    def so_far(found: dict[str, Measured], failed: dict[str, str]) -> None:
        if args.json or args.markdown:
            present = result(found, failed)
            write(present, report(present), args, quietly=True)

    with tempfile.TemporaryDirectory() as folder:
        configs, skipped = prepared(args.variants, base, args.compile, device, Path(folder))
        together = interleaves(configs.values(), device)
        ceilings = rates(device)
        found, failed = measure(configs, steps, args.rounds, together, budget, so_far)
    ceilings = again(device, ceilings)
    final = result(found, failed)
    return final, report(final)


def prepared(
    names: Sequence[str], base: Config, compiled: str, device: torch.device, folder: Path
) -> tuple[dict[str, Config], dict[str, str]]:
    """The variants `names` of `base` over data below `folder`, and of those that cannot run here, why."""
    configs = {name: variant(name, base, compiled) for name in names}
    skipped = {name: why for name, config in configs.items() if (why := missing(name, config, device))}
    configs = {name: config for name, config in configs.items() if name not in skipped}
    for config in configs.values():
        check(config)
    return {name: with_data(config, folder) for name, config in configs.items()}, skipped


def report(result: dict[str, Any]) -> str:
    """The tables in Markdown, and where they come from."""
    notes = [f"{key}: {value}" for key, value in result.items() if not isinstance(value, dict | list)]
    table = [{k: v for k, v in r.items() if k != "quartiles"} for r in result["variants"]]
    failed, skipped = ([f"{n}: {why}" for n, why in result[key].items()] for key in ("failed", "skipped"))
    notes += [f"{name} runs in micro-batches: {why}" for name, why in result["cut"].items()]
    programs = [{"variant": name, **program} for name, program in result["programs"].items()]
    sections = [Section("bench.step", table, notes, failed, skipped), Section("programs", programs)]
    sections += [Section(f"budget of {name}", rows) for name, rows in result["budgets"].items()]
    return "\n".join(show(s) for s in sections)


def write(result: dict[str, Any], text: str, args: argparse.Namespace, quietly: bool = False) -> None:
    """What `--json` and `--markdown` ask for; the text to the terminal without the latter, unless `quietly`."""
    for path, content in ((args.json, json.dumps(plain(result), indent=1) + "\n"), (args.markdown, text)):
        if path:
            write_whole(path, content)
    if not args.markdown and not quietly:
        print(text)


def finish(name: str, args: argparse.Namespace, run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]]) -> int:
    """Run, write, and return the exit code: 1 when something failed, 2 for a command that cannot be meant."""
    try:
        result, text = run(args)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    write(result, text, args)
    return 1 if result.get("failed") else 0


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and return the exit code."""
    return finish("bench.step", parse(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
