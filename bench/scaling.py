"""Time of a step against batch size, width, tokens and the share e of second passes; fitted as floor + overhead.

    python -m bench.scaling [--preset NAME] [--batch-sizes N ...] [--widths N ...] [--tokens N ...]
                            [--extra-fractions E ...] [--steps N] [--rounds N] [--json FILE] [--markdown FILE]

Each axis varies one of them and leaves the rest as the preset has it, in LSEP's `shared` plan. A least-squares fit of
time = a FLOPs + b over each axis gives the rate 1 / a at which more work is done and the overhead b that comes
whatever the work (launches, optimizer, host); one over all points says how well FLOPs alone explain the time. Points
are timed interleaved as those of `bench.step`, whose presets these are; the default is small on a CPU.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.section import Section, show
from bench.step import COMPILE, again, facts, finish, floors, rates
from bench.variants import configuration, interleaves, measure, with_data
from lsep.checks import check
from lsep.config import Config, override
from lsep.errors import UserError
from lsep.step import pick_device

AXES = ("batch size", "width", "tokens", "extra fraction")


def defaults(base: Config, cuda: bool) -> tuple[Sequence[float], ...]:
    """Values of AXES around `base`, up to four times its tokens on a GPU; digits have the tokens they have."""
    model, batch = base.model, base.train.batch_size
    head, side = model.hidden_size // model.num_heads, (model.input_size or 32) // model.patch_size
    heads = dict.fromkeys(max(1, model.num_heads * n // 2) for n in (1, 2, 3))
    sides = dict.fromkeys(max(1, side * n // 2) for n in (1, 2, 4 if cuda else 3))
    full = base.extra_fraction
    return (
        [batch // n for n in ((8, 4, 2, 1) if cuda else (4, 2, 1)) if batch // n],
        [n * head for n in heads],
        [n * n for n in sides] if base.data.path is None else [],
        [share for share in dict.fromkeys((0.0, 0.2, 0.4, full)) if share <= full],
    )


def at(base: Config, axis: str, value: float) -> Config:
    """`base` with one of AXES at `value`; raises UserError for what no model can have."""
    model = base.model
    if axis == "batch size":
        return override(base, {"train.batch_size": int(value)})
    if axis == "extra fraction":
        return override(base, {"probe.extra_fraction": float(value)})
    if axis == "width":
        head = model.hidden_size // model.num_heads
        if value < head or value % head:
            raise UserError(f"--widths has {value}, expected a multiple of the preset's head_dim {head}")
        return override(base, {"model.hidden_size": int(value), "model.num_heads": int(value) // head})
    side = math.isqrt(max(0, int(value)))
    if value < 1 or side * side != value:
        raise UserError(f"--tokens has {value}, expected a square number")
    # The window keeps its share of the grid, three quarters as in the paper.
    values = {"model.input_size": side * model.patch_size, "probe.window_min": max(1, side * 3 // 4)}
    return replace(override(base, values), probe=replace(override(base, values).probe, window_max=None))


def fit(flops: Sequence[float], seconds: Sequence[float]) -> dict[str, float] | None:
    """Least squares of seconds = a flops + b: FLOP/s (1 / a), overhead b in ms, R^2; None where flops do not vary."""
    x, y = np.asarray(flops, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    spread = ((x - x.mean()) ** 2).sum()
    if len(x) < 2 or spread <= 1e-18 * (x**2).sum():
        return None
    a = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    b = float(y.mean() - a * x.mean())
    left, whole = float(((y - a * x - b) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return {"FLOP/s": 1 / a if a else math.inf, "overhead ms": b * 1e3, "R^2": 1 - left / whole if whole else 1.0}


def points(args: argparse.Namespace, base: Config, around: Sequence[Sequence[float]]) -> dict[tuple[str, float], str]:
    """The name under which each point of each axis is measured; equal configurations are measured once."""
    given = (args.batch_sizes, args.widths, args.tokens, args.extra_fractions)
    names: dict[tuple[str, float], str] = {}
    seen: dict[Config, str] = {}
    for axis, values, default in zip(AXES, given, around, strict=True):
        for value in dict.fromkeys(default if values is None else values):
            config = at(base, axis, value)
            check(config)
            names[axis, value] = seen.setdefault(config, f"{axis} {value}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", help="sit-xl-2-256 on a GPU, cpu without one")
    for flag, kind in (("batch-sizes", int), ("widths", int), ("tokens", int), ("extra-fractions", float)):
        parser.add_argument(f"--{flag}", type=kind, nargs="*", metavar="VALUE", help="no value leaves the axis out")
    parser.add_argument("--steps", type=int, metavar="N", help="in a round: 10 on a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="5 where not given")
    parser.add_argument("--compile", choices=COMPILE, default="auto", help="train.compile; auto where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All figures, and the report."""
    device = pick_device("auto")
    cuda = device.type == "cuda"
    steps = (10 if cuda else 1) if args.steps is None else args.steps
    for flag, count in (("steps", steps), ("rounds", args.rounds)):
        if count < 1:
            raise UserError(f"--{flag} is {count}, expected at least 1")
    preset = args.preset or ("sit-xl-2-256" if cuda else "cpu")
    base = override(configuration(preset), {"train.compile": args.compile})
    # As a number, so that the share the preset means by None is the same point as its value on the axis.
    base = override(base, {"probe.extra_fraction": round(base.extra_fraction, 9), "probe.branch": "shared"})
    names = points(args, base, defaults(base, cuda))
    with tempfile.TemporaryDirectory() as folder:
        wanted = {name: at(base, *point) for point, name in reversed(names.items())}
        configs = {name: with_data(config, Path(folder)) for name, config in wanted.items()}
        together = interleaves(configs.values(), device)
        before = rates(device)
        found, failed = measure(configs, steps, args.rounds, together)
    copy_rate, matrix_rate = again(device, before)
    rows = [
        {
            "axis": axis, "value": value, "TFLOP": found[name].flops / 1e12, "ms": found[name].median * 1e3,
            "images/s": found[name].config.train.batch_size / found[name].median,
            "floor ms": sum(line["floor ms"] for line in floors(found[name], copy_rate, matrix_rate)),
            "of matrix rate": found[name].flops / found[name].median / matrix_rate,
        }
        for (axis, value), name in names.items() if name in found
    ]  # fmt: skip
    fits = {}
    for axis in (*AXES, "all"):
        chosen = [found[name] for (a, _), name in names.items() if name in found and axis in (a, "all")]
        fits[axis] = fit([m.flops for m in chosen], [m.median for m in chosen])
    result = {
        **facts(device), "preset": preset, "steps": steps, "rounds": args.rounds, "interleaved": together,
        "compile": args.compile, "matrix rate": matrix_rate, "points": rows,
        "fits": {axis: values for axis, values in fits.items() if values}, "failed": failed,
    }  # fmt: skip
    return result, report(result)


def report(result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    notes = [f"{key}: {value}" for key, value in result.items() if not isinstance(value, dict | list)]
    failures = [f"{name}: {why}" for name, why in result["failed"].items()]
    rate = result["matrix rate"]
    fits = [
        {
            "axis": axis, "TFLOP/s": f["FLOP/s"] / 1e12, "of matrix rate": f["FLOP/s"] / rate,
            "overhead ms": f["overhead ms"], "R^2": f["R^2"],
        }
        for axis, f in result["fits"].items()
    ]  # fmt: skip
    table = Section("bench.scaling", result["points"], notes, failures)
    return "\n".join(show(s) for s in (table, Section("time = FLOPs / rate + overhead", fits)))


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and return the exit code."""
    return finish("bench.scaling", parse(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
