"""Time of a training step: plain SiT, LSEP the authors' way, LSEP as it is here; interleaved, beside their FLOPs.

    python -m bench.step [--preset NAME] [--batch-size N] [--variants NAME ...] [--steps N] [--rounds N]
                         [--no-compile] [--json FILE] [--markdown FILE]

Variants: `plain` SiT; `authors`, LSEP in two separate passes with full `fc2`, eager, PyTorch's own operations; `paper`,
the same mathematics through this project's joint pass, kernels and compiler; `shared-E`, LSEP with second passes for a
share E of the batch. Presets are those of `lsep presets` on random latents, and `cpu` and `tiny` of this file's own.

Only `train_step` is timed, its batches lie on the device. A round times every variant, in rotating order; times are
medians over rounds, ratios medians of the ratios within a round. Where the weights of all variants would leave too
little memory for activations they run one after the other, and the report says so. The exit code is 1 when a variant
failed, 2 for a command that cannot be meant.
"""

import argparse
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from bench.section import Context, Section, plain, sentence, show
from bench.timing import measure as time_calls
from lsep import flops
from lsep.checks import check
from lsep.config import PRESETS, Config, override
from lsep.data.writer import write_store
from lsep.errors import UserError, nearest
from lsep.model import SiT
from lsep.plan import branch_plan
from lsep.train import open_loader, pick_device, setup, train_step
from lsep_kernels.reference import gate_residual

# depth 10 and probe 3: by FLOPs LSEP costs 21 % here, as much as for SiT-XL/2.
OWN: dict[str, dict[str, Any]] = {
    "cpu": {
        "model.depth": 10, "model.hidden_size": 192, "model.num_heads": 3, "model.input_size": 16, "probe.depth": 3,
        "probe.window_min": 6, "train.batch_size": 64, "model.num_classes": 100,
    },
    "tiny": {
        "model.depth": 3, "model.hidden_size": 32, "model.num_heads": 2, "model.input_size": 8, "probe.depth": 2,
        "probe.window_min": 3, "train.batch_size": 20, "model.num_classes": 5,
    },
}  # fmt: skip
"""Presets for machines without a GPU."""
VARIANTS = ("plain", "authors", "paper", "shared-0.8", "shared-0.2", "shared-0")
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "A40": 150, "RTX 4090": 165,
}  # fmt: skip
"""Dense bf16 TFLOP/s by what a GPU's name contains; of several, the longest counts (NVIDIA's data sheets)."""
ROOMS = {
    "attention": r"attention|flash|fmha|sdpa",
    "optimizer": r"adam|multi_tensor|foreach|norm_pass|update_pass|lerp|linalg_vector_norm",
    "probe and loss": r"token_pool|probe_|velocity_loss|interpolate|softmax|nll_loss|cross_entropy",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|triton_tem|mm(backward\d*)?$|conv(?!ert)",
    "adaLN": r"adaln|layer_?norm",
    "GELU": r"gelu",
}
"""What a kernel (on a CPU, an operator) is there for, by its name; the first that matches counts."""
_PAPER = {"probe.branch": "paper", "probe.extra_fraction": None, "probe.pool_before_fc2": False}
_EAGER = {"backend.kernels": "reference", "backend.attention": "sdpa", "backend.optimizer": "torch"}


@dataclass
class Measured:
    """What was found about one variant."""

    config: Config
    """Resolved."""
    probe_classes: int
    parameters: int
    seconds: list[float] = field(default_factory=list)
    """Of a step, by round."""
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    """Of the device's memory, the other variants' weights left out."""
    rooms: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by what they were spent on, see ROOMS."""

    @property
    def flops(self) -> int:
        """Of one step."""
        return flops.total(flops.step_parts(self.config, self.probe_classes)).training

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Runner:
    """One variant, warmed up."""

    def __init__(self, config: Config, two_passes: bool = False) -> None:
        before = allocated()
        self.state = setup(config)
        if two_passes:
            model = self.state.forward.model  # of the module that runs, maybe a copy of `objective`
            model.forward_with_probe = partial(separate_passes, model)  # type: ignore[method-assign]
        self.batches = list(islice(open_loader(self.state, 0, 2), 2))
        self.steps = 0
        manifest, parameters = self.state.source.manifest, self.state.objective.parameters()
        self.found = Measured(self.state.config, manifest.probe_classes, sum(p.numel() for p in parameters))
        self.resident = 0
        first, second, third = self.time(1), self.time(1), self.time(1)
        if config.train.compile:
            self.found.compile_seconds = max(0.0, first - min(second, third))
        self.resident = allocated() - before
        self.found.peak_bytes = None

    def time(self, steps: int) -> float:
        """Seconds a step, over `steps`."""
        cuda = self.state.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        others = allocated() - self.resident
        start = time.perf_counter()
        for _ in range(steps):
            train_step(self.state, self.steps, self.batches[self.steps % len(self.batches)])
            self.steps += 1
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        if cuda:
            self.found.peak_bytes = max(self.found.peak_bytes or 0, torch.cuda.max_memory_allocated() - others)
        return seconds

    def profile(self) -> None:
        """Where the time of a step goes, by room."""
        cuda = self.state.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.time(2)
        for event in profile.key_averages():
            room = room_of(event.key)
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            self.found.rooms[room] = self.found.rooms.get(room, 0.0) + spent / 2e6


def separate_passes(
    model: SiT, x: Tensor, t: Tensor, y: Tensor, extra_y: Tensor, depth: int, window: Tensor, pool_before_fc2: bool
) -> tuple[Tensor, Tensor]:
    """`SiT.forward_with_probe` as the authors compute it: a whole pass, and one more through the first blocks.

    It embeds patches and times twice, which the FLOPs of the variant leave out (0.1 % of SiT-XL/2).
    """
    assert len(extra_y) == len(x) and not pool_before_fc2
    patches = model.patches(x, t, y)
    c = model.t_embedder(t) + model.y_embedder(extra_y)
    x = model._tokens(x)
    for block in model.blocks[:depth]:
        m = block.modulation(c)
        h = model.ops.norm_modulate(x, m.shift1, m.scale1)
        x, h = model.ops.gate_residual_norm_modulate(x, m.gate1, block.attn(h), m.shift2, m.scale2)
        x = gate_residual(x, m.gate2, block.mlp(h))
    return patches, model.ops.pool(x, window)


def room_of(kernel: str) -> str:
    """The one of ROOMS that a kernel or operator belongs to, else `other`."""
    return next((room for room, pattern in ROOMS.items() if re.search(pattern, kernel.lower())), "other")


def allocated() -> int:
    """Bytes of the device's memory in use."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Variants


def configuration(name: str) -> Config:
    """The preset `name`, of this file or of `lsep.config`, its data still open."""
    known = [*OWN, *PRESETS]
    if name not in known:
        raise UserError(f"preset {name!r} is unknown{nearest(name, known)}")
    return override(Config(), OWN[name]) if name in OWN else PRESETS[name]


def variant(name: str, base: Config, compiled: bool) -> Config:
    """`base` as the variant `name`; raises UserError for one that does not exist."""
    values: dict[str, Any] = {"train.compile": compiled}
    if name == "plain":
        values |= {"probe.enabled": False}
    elif name == "authors":
        values |= _PAPER | _EAGER | {"train.compile": False}
    elif name == "paper":
        values |= _PAPER
    else:
        kind, _, share = name.partition("-")
        try:
            values |= {"probe.branch": "shared", "probe.extra_fraction": float(share)}
        except ValueError:
            kind = ""
        if kind != "shared":
            known = ", ".join(VARIANTS)
            raise UserError(f"variant {name!r} is unknown, expected some of {known} (or another shared-E)")
    return override(base, values)


def with_data(config: Config, folder: Path) -> Config:
    """`config` over random moments of the model's shape below `folder`, all in device memory; digits stay digits."""
    if config.data.path is None:
        side, channels = config.model.input_size or 32, config.model.in_channels or 4
        classes, rows = config.model.num_classes or 1000, 2 * config.train.batch_size
        path = folder / f"{side}-{channels}-{classes}-{rows}"
        if not path.exists():
            rng = np.random.default_rng(0)
            x = rng.uniform(0.1, 1.0, (rows, 2 * channels, side, side)).astype(np.float32)
            y = rng.integers(classes, size=rows)
            write_store(path, kind="moments", x=x, y=y, num_classes=classes)
        config = override(config, {"data.path": str(path)})
    return override(config, {"data.loader": "resident"})


def interleaves(configs: Iterable[Config], device: torch.device) -> bool:
    """Whether the weights of all variants, with moments and average, take at most a quarter of the GPU's memory."""
    if device.type != "cuda":
        return True
    # 18 D^2 a block, 12 of them its matrices and 6 its modulation; 16 bytes a parameter.
    size = sum(16 * 18 * c.model.hidden_size**2 * c.model.depth for c in configs)
    return size <= torch.cuda.get_device_properties(device).total_memory / 4


def measure(
    configs: dict[str, Config], steps: int, rounds: int, interleaved: bool, budget: bool = False
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every configuration, `rounds` times `steps` steps: what was found, and of those that failed, why.

    UserError ends it; whatever else a variant raises is its own failure. Two separate passes are `authors`'s alone.
    """
    torch._dynamo.config.recompile_limit = max(64, 4 * len(configs))  # one code object, a graph for every variant
    found: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    for group in [list(configs)] if interleaved else [[name] for name in configs]:
        runners: dict[str, Runner] = {}
        for turn in range(-1, rounds + budget):
            for name in [*group[turn % len(group) :], *group[: turn % len(group)]]:
                if name in failed:
                    continue
                try:
                    if turn < 0:
                        runners[name] = Runner(configs[name], two_passes=name == "authors")
                    elif turn < rounds:
                        runners[name].found.seconds.append(runners[name].time(steps))
                    else:
                        runners[name].profile()
                except UserError:
                    raise
                except Exception as error:
                    failed[name] = sentence(error)
                    runners.pop(name, None)
        found |= {name: runner.found for name, runner in runners.items()}
        del runners
        torch._dynamo.reset()  # what it compiled holds on to weights
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {name: found[name] for name in configs if name in found}, failed


# ---------------------------------------------------------------------------------------------------------------------
# Rates, rows and the report


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
        "blocks": flops.second_pass_blocks(m.config, plan), "GFLOP/image": m.flops / batch / 1e9,
        "MFU": speed / device_peak if device_peak else None, "of matrix rate": speed / matrix_rate,
        "peak GiB": None if m.peak_bytes is None else m.peak_bytes / 2**30, "compile s": m.compile_seconds,
    }  # fmt: skip


def floors(found: Measured, copy_rate: float, matrix_rate: float) -> list[dict[str, Any]]:
    """What a step has to compute and move, its time at the measured rates, and what was measured, all in ms.

    Bytes are docs/kernels.md's: forward and backward of adaLN 20 an element of the stream in bf16, attention 24, GELU
    by itself 10 of the hidden layer (none where it is fused); the optimizer 40 a parameter.
    """
    config, parts = found.config, flops.step_parts(found.config, found.probe_classes)
    model, size = config.model, 2 if config.train.precision == "bf16" else 4
    second = branch_plan(config).extra
    # Samples through blocks, all together; a sample has grid^2 tokens.
    passes = config.train.batch_size * model.depth + second * config.probe.depth
    elements = passes * config.grid**2 * model.hidden_size
    attention = sum(f.training for name, f in parts.items() if name.endswith("attention"))
    head = sum(f.training for name, f in parts.items() if name in ("pooling", "probe head"))
    products = flops.total(parts).training - attention - head
    needs = {
        "matrix products": (0.0, products), "attention": (12 * size * elements, attention),
        "adaLN": (10 * size * elements, 0), "GELU": (5 * size * elements * model.mlp_ratio, 0),
        "probe and loss": (0.0, head), "optimizer": (40.0 * found.parameters, 0), "other": (0.0, 0),
    }  # fmt: skip
    out = []
    for room, (moved, computed) in needs.items():
        floor = max(moved / copy_rate, computed / matrix_rate)
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
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="yes on a GPU, else no")
    parser.add_argument("--budget", action=argparse.BooleanOptionalAction, help="profile each variant; yes on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All figures, and the report."""
    device = pick_device("auto")
    cuda = device.type == "cuda"
    compiled, budget = (cuda if given is None else given for given in (args.compile, args.budget))
    steps = args.steps if args.steps is not None else (10 if cuda else 1)
    for flag, value in (("steps", steps), ("rounds", args.rounds)):
        if value < 1:
            raise UserError(f"--{flag} is {value}, expected at least 1")
    preset = args.preset or ("sit-xl-2-256" if cuda else "cpu")
    base = configuration(preset)
    if args.batch_size is not None:
        base = override(base, {"train.batch_size": args.batch_size})
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: variant(name, base, compiled) for name in args.variants}
        for config in configs.values():
            check(config)
        configs = {name: with_data(config, Path(folder)) for name, config in configs.items()}
        together = interleaves(configs.values(), device)
        copy_rate, matrix_rate = rates(device)
        found, failed = measure(configs, steps, args.rounds, together, budget)
    copy_rate, matrix_rate = again(device, (copy_rate, matrix_rate))
    rows = [row(name, found, matrix_rate, peak(device)) for name in found]
    budgets = {name: floors(m, copy_rate, matrix_rate) for name, m in found.items() if budget}
    result = {
        **facts(device), "preset": preset, "batch size": base.train.batch_size, "steps": steps, "rounds": args.rounds,
        "interleaved": together, "compiled": compiled, "copy rate": copy_rate, "matrix rate": matrix_rate,
        "variants": rows, "budgets": budgets, "failed": failed,
        "round ms": {name: [s * 1e3 for s in m.seconds] for name, m in found.items()},
        "parts": {
            name: {p: f._asdict() for p, f in flops.step_parts(m.config, m.probe_classes).items()}
            for name, m in found.items()
        },
    }  # fmt: skip
    return result, report(result)


def report(result: dict[str, Any]) -> str:
    """The tables in Markdown, and where they come from."""
    notes = [f"{key}: {value}" for key, value in result.items() if not isinstance(value, dict | list)]
    table = [{k: v for k, v in r.items() if k != "quartiles"} for r in result["variants"]]
    sections = [Section("bench.step", table, notes, [f"{n}: {why}" for n, why in result["failed"].items()])]
    sections += [Section(f"budget of {name}", rows) for name, rows in result["budgets"].items()]
    return "\n".join(show(s) for s in sections)


def write(result: dict[str, Any], text: str, args: argparse.Namespace) -> None:
    """What `--json` and `--markdown` ask for; the text to the terminal without the latter."""
    for path, content in ((args.json, json.dumps(plain(result), indent=1) + "\n"), (args.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    if not args.markdown:
        print(text)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and return the exit code."""
    args = parse(arguments)
    try:
        result, text = run(args)
    except UserError as error:
        print(f"bench.step: {error}", file=sys.stderr)
        return 2
    write(result, text, args)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
