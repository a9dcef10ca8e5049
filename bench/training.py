"""Section `training`: with every optimisation that leaves the mathematics alone a model trains as with plain PyTorch.

A small SiT with its probe is trained on random images that can be learned: with plain PyTorch from two seeds, and from
the first of them with the optimisations, added one after the other and each with the switch that turns it off. Two
curves of one seed may differ by no more than those of two seeds do.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from bench.section import Context, Section
from lsep.config import Config, override
from lsep.data.writer import write_store
from lsep.step import open_loader, setup, train_step
from lsep_kernels.adamw_ema import why_missing

WINDOW = 20
"""Steps of the running mean of a curve."""
CLASSES = 10

PLAIN: dict[str, Any] = {
    "backend.kernels": "reference", "backend.attention": "reference", "backend.mlp": "torch",
    "backend.modulation": "block", "backend.optimizer": "torch", "train.weights": "fp32", "train.compile": "off",
    "train.graphs": "off", "train.memory": "keep",
}  # fmt: skip
"""Every switch off."""


def switches(context: Context) -> dict[str, dict[str, Any]]:
    """Rows of the table: what is changed from PLAIN. In the interpreter, which has no bf16 products, but few."""
    own_optimizer = "csrc" if why_missing(context.device.type) is None else "reference"
    kernels = {"backend.kernels": "triton", "backend.attention": "triton", "backend.mlp": "triton"}
    optimizer = {**kernels, "backend.optimizer": own_optimizer}
    rows = {"kernels": kernels, "kernels, optimizer": optimizer}
    if not context.cuda:
        return rows
    weights = {**optimizer, "train.weights": "bf16"}
    joint = {**weights, "backend.modulation": "joint"}
    rows |= {
        "... and bf16 weights": weights,
        "... and joint modulations": joint,
        "... and blocks compiled": {**joint, "train.compile": "block"},
        "... and a CUDA graph": {**joint, "train.compile": "block", "train.graphs": "on"},
        "joint, whole model compiled": {**joint, "train.compile": "model"},
        "joint, CUDA graph": {**joint, "train.graphs": "on"},
        "joint, MLP by PyTorch": {**joint, "backend.mlp": "torch"},
        "joint, MLP by cuBLASLt": {**joint, "backend.mlp": "cublaslt"},
        "joint, elementwise recomputed": {**joint, "train.memory": "recompute-elementwise"},
        "joint, blocks recomputed": {**joint, "train.memory": "recompute-blocks"},
    }
    return {name: rows[name] for name in SMOKE_ROWS} if context.smoke else rows


SMOKE_ROWS = (
    "kernels, optimizer", "... and a CUDA graph", "joint, MLP by cuBLASLt", "joint, elementwise recomputed",
)  # fmt: skip
"""Of a smoke test on a GPU, which compiles in earnest."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the runs."""

    steps: int
    batch: int
    rows: int
    side: int
    guarded: int
    """The last steps run under CUDA's check for host syncs, and out of the clock."""
    model: dict[str, Any]


FULL = Plan(
    200, 64, 2048, 32, 10,
    {"model.depth": 4, "model.hidden_size": 384, "model.num_heads": 6, "probe.depth": 2, "probe.window_min": 12},
)  # fmt: skip
SMOKE = Plan(
    2, 4, 8, 4, 1,
    {"model.depth": 1, "model.hidden_size": 32, "model.num_heads": 2, "probe.depth": 1, "probe.window_min": 1},
)  # fmt: skip
SMOKE_GPU = replace(SMOKE, side=32, model=SMOKE.model | {"model.hidden_size": 128})
"""Attention's kernel takes 256 tokens and heads of 64."""


@dataclass(frozen=True)
class Curve:
    """A run's losses `(steps, 2)`, denoising and LSEP, and its speed."""

    losses: Tensor
    images_per_second: float
    skipped: int

    def smooth(self) -> Tensor:
        """Running means `(steps - window + 1, 2)`."""
        return self.losses.unfold(0, min(WINDOW, len(self.losses)), 1).mean(-1)


def write_patterns(path: Path, rows: int, side: int) -> None:
    """A store of latents `(rows, 4, side, side)` of ten classes: a smooth pattern each, and noise."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(CLASSES, 4, 4, 4))
    patterns = coarse.repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    y = rng.integers(CLASSES, size=rows)
    x = (patterns[y] + 0.3 * rng.normal(size=(rows, 4, side, side))).astype(np.float32)
    write_store(path, kind="samples", x=x, y=y, num_classes=CLASSES)


def configuration(store: Path, plan: Plan, context: Context, changes: dict[str, Any]) -> Config:
    """Settings of a run by plain PyTorch and its optimizer, but for `changes`."""
    return override(Config(), {
        **plan.model, "optim.lr": 5e-4, "optim.probe_lr": 1e-3, "optim.warmup_steps": 20, "optim.ema_decay": 0.99,
        "data.path": str(store), "data.loader": "resident", "train.steps": plan.steps, "train.batch_size": plan.batch,
        "train.device": context.device.type, "train.precision": "bf16" if context.cuda else "fp32",
        **PLAIN, **changes,
    })  # fmt: skip


@contextmanager
def no_sync(active: bool) -> Iterator[None]:
    """PyTorch raises on whatever makes the host wait for the GPU."""
    if not active:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def run(config: Config, plan: Plan, context: Context, guard: bool) -> Curve:
    """Train; `guard` runs the last steps under the check for syncs."""
    torch._dynamo.reset()
    state = setup(config)
    statistics: list[Tensor] = []
    first, last = plan.steps // 4, plan.steps - plan.guarded  # the clock's
    marks = {}
    for step, batches in enumerate(open_loader(state, 0, plan.steps)):
        if step in (first, last):
            marks[step] = _now(context)
        with no_sync(guard and context.cuda and step >= last):
            statistics.append(train_step(state, step, batches))
    found = torch.stack(statistics).cpu()
    speed = (last - first) * plan.batch / (marks[last] - marks[first])
    curve = Curve(copy.deepcopy(found[:, :2]), speed, int(found[:, -1].sum()))
    del state, statistics
    context.free()
    return curve


def _now(context: Context) -> float:
    context.synchronize()
    return time.perf_counter()


def training(context: Context, section: Section) -> None:
    """Loss curves inside the spread of two reference seeds, no host sync, and images/s as ratios."""
    plan = FULL if not context.smoke else SMOKE_GPU if context.cuda else SMOKE
    if not section.begun:
        section.notes += _notes(context, plan)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_patterns(store, plan.rows, plan.side)
        base = run(configuration(store, plan, context, {}), plan, context, guard=False)
        other = run(configuration(store, plan, context, {"train.seed": 1}), plan, context, guard=False)
        spread = (base.smooth() - other.smooth()).abs()
        allowed = spread.amax(0), spread.mean(0)
        if not section.begun:
            section.rows += [_row("plain PyTorch", base, base, base)]
            section.rows += [_row("plain PyTorch, other seed", other, base, base)]
            section.details["losses"] = {"plain PyTorch": base.losses.tolist(), "other seed": other.losses.tolist()}
            _learned(section, base, plan)

        def one(switch: tuple[str, dict[str, Any]]) -> None:
            name, changes = switch
            curve = run(configuration(store, plan, context, changes), plan, context, guard=True)
            section.rows.append(_judge(section, name, curve, base, allowed))
            section.details[name] = {"changes": changes, "losses": curve.losses.tolist()}

        context.each(section, [(name, (name, changes)) for name, changes in switches(context).items()], one)


def _row(name: str, curve: Curve, same_seed: Curve, reference: Curve) -> dict[str, Any]:
    apart = (curve.smooth() - same_seed.smooth()).abs()
    top, mean = (", ".join(f"{x:.2e}" for x in values.tolist()) for values in (apart.amax(0), apart.mean(0)))
    return {
        "run": name,
        "last losses": ", ".join(f"{x:.4f}" for x in curve.smooth()[-1].tolist()),
        "largest difference": top,
        "mean difference": mean,
        "images/s": curve.images_per_second,
        "times plain PyTorch": curve.images_per_second / reference.images_per_second,
    }


def _judge(section: Section, name: str, curve: Curve, base: Curve, allowed: tuple[Tensor, Tensor]) -> dict[str, Any]:
    apart = (curve.smooth() - base.smooth()).abs()
    inside = bool((apart.amax(0) <= allowed[0]).all() and (apart.mean(0) <= allowed[1]).all())
    sentence = f"{name}: its losses leave the spread of two seeds, or {curve.skipped} skipped steps are too many"
    good = section.check(inside and curve.skipped == 0, sentence)
    return _row(name, curve, base, base) | {"inside the spread": good}


def _learned(section: Section, base: Curve, plan: Plan) -> None:
    """Curves that stay where they begin would agree whatever the kernels do."""
    if plan.steps >= 4 * WINDOW:
        smooth = base.smooth()[:, 0]
        section.check(float(smooth[-1]) < 0.8 * float(smooth[0]), "plain PyTorch did not learn: nothing is compared")


def _notes(context: Context, plan: Plan) -> list[str]:
    why = why_missing(context.device.type)
    return [
        f"{plan.steps} steps of batch {plan.batch}, {(plan.side // 2) ** 2} tokens, {plan.model}. Losses are denoising "
        f"and LSEP, as running means over {WINDOW} steps; differences are to plain PyTorch of the same seed.",
        f"The last {plan.guarded} steps of this project's runs are under torch.cuda.set_sync_debug_mode('error')"
        + ("." if context.cuda else ", on a GPU."),
        *([f"adamw_ema by the reference: {why}"] if why else []),
    ]
