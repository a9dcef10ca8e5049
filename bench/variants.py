"""The variants that `bench.step` and `bench.scaling` time: their configurations, their data, and the timing itself."""

import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from bench.programs import another_program, only_own_weights, out_of_memory, program, smaller
from bench.section import sentence
from lsep.config import Config, override
from lsep.cost import flops
from lsep.data.writer import write_store
from lsep.errors import UserError, nearest
from lsep.graphs import WARM_UP, Graphs
from lsep.model import SiT
from lsep.presets import PRESETS
from lsep.step import open_loader, pick_device, setup, train_step
from lsep_kernels import ops
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
VARIANTS = ("plain", "authors", "paper", "shared-0.8", "shared-0.2", "shared-0", "fp8")
"""`fp8` is shared-0.8 with the matrix products of its blocks in fp8, where the GPU has it."""
ROOMS = {
    "attention": r"attention|flash|fmha|sdpa",
    "optimizer": r"adam|multi_tensor|foreach|norm_pass|update_pass|lerp|linalg_vector_norm",
    "probe and loss": (
        r"token_pool|probe_|velocity_loss|interpolate|_(uniform|normal|windows)_kernel|softmax|nll_loss|cross_entropy"
    ),
    "matrix products": r"quantize_[rc]|gemm|cutlass|nvjet|xmma|cublas|triton_tem|mm(backward\d*)?$|conv(?!ert)",
    "adaLN": r"adaln|layer_?norm|row_sums",
    "GELU": r"gelu",
}
"""What a kernel (on a CPU, an operator) is there for, by its name; the first that matches counts."""
_PAPER = {"probe.branch": "paper", "probe.extra_fraction": None, "probe.pool_before_fc2": False}
_EAGER = {
    "backend.kernels": "reference", "backend.attention": "sdpa", "backend.optimizer": "torch",
    "backend.mlp": "torch", "backend.modulation": "block", "train.compile": "off", "train.graphs": "off",
}  # fmt: skip


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
    """What the first steps took beyond the time of a step: compilers, capture of a graph."""
    peak_bytes: int | None = None
    """Of the device's memory, the other variants' weights left out; while it was warmed up (a graph's replay allocates
    nothing) or timed."""
    rooms: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by what they were spent on, see ROOMS."""
    program: dict[str, str] = field(default_factory=dict)
    """What ran, see `programs.program`."""
    cut: str | None = None
    """Why the batch is in more micro-batches than the variant says."""

    @property
    def flops(self) -> int:
        """Of one step."""
        return flops.total(flops.step_parts(self.config, self.probe_classes)).training

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Runner:
    """One variant, warmed up."""

    resident: int | None = None
    """Bytes that stay allocated between steps."""

    def __init__(self, config: Config, two_passes: bool = False) -> None:
        self.others = allocated()
        with only_own_weights():
            self.state = setup(config)
        if two_passes:
            model = self.state.learning.model  # of the module that runs, maybe a copy of `objective`
            model.forward_with_probe = partial(separate_passes, model)  # type: ignore[method-assign]
        self.batches = list(islice(open_loader(self.state, 0, 2), 2))
        self.steps = 0
        manifest, parameters = self.state.source.manifest, self.state.objective.parameters()
        self.found = Measured(self.state.config, manifest.probe_classes, sum(p.numel() for p in parameters))
        self.found.program = program(self.state.config, self.state.device)
        graphed = isinstance(self.state.compute, Graphs)
        warm = [self.time(1) for _ in range(WARM_UP + 2 if graphed else 3)]
        if self.state.device.type == "cuda" or config.train.compile not in ("auto", "off"):
            self.found.compile_seconds = max(0.0, sum(warm) - len(warm) * min(warm))
        self.resident: int | None = allocated() - self.others

    def time(self, steps: int) -> float:
        """Seconds a step, over `steps`."""
        cuda = self.state.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        others = self.others if self.resident is None else allocated() - self.resident
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


def configuration(name: str) -> Config:
    """The preset `name`, of this file or of `lsep.config`, its data still open."""
    known = [*OWN, *PRESETS]
    if name not in known:
        raise UserError(f"preset {name!r} is unknown{nearest(name, known)}")
    return override(Config(), OWN[name]) if name in OWN else PRESETS[name]


def variant(name: str, base: Config, compiled: str) -> Config:
    """`base` as the variant `name`, compiled as `train.compile` says; raises UserError for one that does not exist.

    A name may change fields: `shared-0.8+train.graphs=off+train.memory=recompute-blocks`.
    """
    name, *changes = name.split("+")
    values: dict[str, Any] = {"train.compile": compiled}
    if name == "plain":
        values |= {"probe.enabled": False}
    elif name == "authors":
        values |= _PAPER | _EAGER
    elif name == "paper":
        values |= _PAPER
    elif name == "fp8":
        values |= {"probe.branch": "shared", "probe.extra_fraction": 0.8, "train.fp8": True}
    else:
        kind, _, share = name.partition("-")
        try:
            values |= {"probe.branch": "shared", "probe.extra_fraction": float(share)}
        except ValueError:
            kind = ""
        if kind != "shared":
            known = ", ".join(VARIANTS)
            raise UserError(f"variant {name!r} is unknown, expected some of {known} (or another shared-E)")
    for change in changes:
        field_name, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"variant {name!r} is changed by {change!r}, expected SECTION.FIELD=VALUE")
        values[field_name] = _value(value)
    return override(base, values)


def _value(text: str) -> Any:
    """A number, `true`, `false` or `null` as JSON has them, any other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def missing(name: str, config: Config, device: torch.device) -> str | None:
    """Why the variant `name`, which is `config`, cannot run on `device`; None when it can."""
    if name.startswith("fp8"):
        if device.type != "cuda":
            return f"fp8 needs a GPU, and the device is {device.type}"
        return ops.missing_fp8("triton", device) or ops.missing_triton(device)
    dtype = torch.bfloat16 if device.type == "cuda" and config.train.precision != "fp32" else torch.float32
    model, wanted = config.model, config.backend
    tokens, head = ((model.input_size or 32) // model.patch_size) ** 2, model.hidden_size // model.num_heads
    return (
        (wanted.attention != "auto" and ops.missing_attention(wanted.attention, device, dtype, tokens, head))
        or (wanted.mlp != "auto" and ops.missing_mlp(wanted.mlp, device, dtype))
        or None
    )


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


def nothing(found: dict[str, Measured], failed: dict[str, str]) -> None:
    """For a `measure` that nobody watches."""


def measure(
    configs: dict[str, Config],
    steps: int,
    rounds: int,
    interleaved: bool,
    budget: bool = False,
    after: Callable[[dict[str, Measured], dict[str, str]], None] = nothing,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every configuration, `rounds` times `steps` steps: what was found, and of those that failed, why.

    UserError ends it; whatever else a variant raises is its own failure. One that does not fit the GPU's memory is cut
    into micro-batches. Two separate passes are `authors`'s alone. `after` gets what there is after each group that runs
    together.
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
                        runners[name] = started(name, configs[name])
                    elif turn < rounds:
                        runners[name].found.seconds.append(runners[name].time(steps))
                    else:
                        runners[name].profile()
                except UserError:
                    raise
                except Exception as error:
                    failed[name] = sentence(error)
                    if turn < rounds:  # else only its budget is missing
                        runners.pop(name, None)
        found |= {name: runner.found for name, runner in runners.items()}
        del runners
        release()
        after({name: found[name] for name in configs if name in found}, failed)
    return {name: found[name] for name in configs if name in found}, failed


def started(name: str, config: Config) -> Runner:
    """The variant `name`, warmed up; in as few micro-batches as fit the GPU's memory, of which its row speaks.

    Raises RuntimeError for one that would be another program without a word, because csrc is not built.
    """
    device = pick_device(config.train.device)
    problem = another_program(config, device)
    if problem:
        raise RuntimeError(problem)
    wanted, cut = config.optim.accumulate, None
    while True:
        try:
            runner = Runner(config, two_passes=name.split("+")[0] == "authors")
        except Exception as error:
            less = smaller(config)
            if less is None or not out_of_memory(error):
                if cut is None or not isinstance(error, UserError):
                    raise
                # Asked for in words that micro-batches exclude: its own failure, not the end of all.
                raise RuntimeError(f"{cut}, and in {config.optim.accumulate}: {sentence(error)}") from None
            cut = f"the GPU's memory is too small for {_micro_batches(config)}"
            config = less
        else:
            used = runner.found.config.optim.accumulate
            if used != wanted:
                runner.found.cut = cut or f"in {used} micro-batches of the trainer's own choice"
            return runner
        release()  # what the attempt had allocated; not before its error, which holds on to it, is gone


def _micro_batches(config: Config) -> str:
    count = config.optim.accumulate
    return f"{count} micro-batch{'es' if count > 1 else ''} of {config.train.batch_size // count}"


def release() -> None:
    """Give back what a variant that is gone has held."""
    torch._dynamo.reset()  # what it compiled holds on to weights
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
