"""What `bench.gpu` asks of the optimizer: steps against the reference, repeated steps, and its time on SiT-XL/2."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases import Draw
from bench.programs import unbuilt
from bench.section import Context, Section
from bench.timing import Timing, measure
from lsep.cost.operations import optimizer_bytes
from lsep_kernels import reference
from lsep_kernels.adamw_ema import AdamwEma, why_missing

ODD_SHAPES = [(1,), (3,), (0,), (1025,), (17, 33), (128, 130), (16384,), (5, 8191)]
"""Around the chunk of 16384 and around 16 bytes."""
SMOKE_SHAPES = ODD_SHAPES[:6]
BETAS, EPS, MAX_NORM = (0.9, 0.99), 1e-8, 1.0
COPY_SHARE, SPEEDUP = 0.85, 2.0
"""The targets."""


@dataclass(frozen=True)
class Variant:
    """What a step is given."""

    name: str
    grads: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    averages: int = 1
    missing: bool = False
    """Two gradients are None."""
    broken: bool = False
    """The second step's gradient has an infinity."""


VARIANTS = [
    Variant("float32"),
    Variant("bf16 gradients and weight copy", torch.bfloat16, torch.bfloat16),
    Variant("two averages, float32 copy", weights=torch.float32, averages=2),
    Variant("missing gradients", missing=True),
    Variant("a gradient that is not finite", broken=True),
]


class Problem:
    """Tensors of `shapes`, stepped by the operator or by the reference from the same start."""

    def __init__(
        self, fused: bool, variant: Variant, shapes: list[tuple[int, ...]], device: torch.device, seed: int
    ) -> None:
        draw = Draw(device, seed)
        self.params = [draw.normal(*s) for s in shapes]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.averages = [[p + k for p in self.params] for k in range(variant.averages)]
        self.weights = [torch.zeros_like(p, dtype=variant.weights) for p in self.params] if variant.weights else None
        self.lr = torch.tensor([3e-3, 1e-2], device=device)
        self.counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        group = [i % 2 for i in range(len(shapes))]
        settings: dict[str, Any] = {
            "betas": BETAS, "eps": EPS, "weight_decay": [0.1, 0.0], "max_norm": MAX_NORM,
            "ema_decays": [0.95, 0.999][: variant.averages],
        }  # fmt: skip
        lists = self.params, *self.moments, self.averages, self.weights
        self.step: Callable[[list[Tensor | None]], Tensor]
        if fused:
            one = AdamwEma(*lists, group, **settings)
            self.counts = [one.step_count, one.skipped]
            self.step = lambda grads: one.step(grads, self.lr)
        else:
            self.step = lambda grads: reference.adamw_ema(*lists, grads, self.lr, *self.counts, group=group, **settings)

    def tensors(self) -> list[Tensor]:
        found = [*self.params, *self.moments[0], *self.moments[1], *(t for a in self.averages for t in a)]
        return found + (self.weights or [])


def gradients(variant: Variant, like: list[Tensor], step: int, seed: int) -> list[Tensor | None]:
    """Of a norm that is clipped in even steps and not in odd ones."""
    draw = Draw(like[0].device, seed + 1000 + step)
    scale = (1.3 if step % 2 == 0 else 0.4) / sum(p.numel() for p in like) ** 0.5
    grads: list[Tensor | None] = [(draw.normal(*p.shape) * scale).to(variant.grads) for p in like]
    if variant.broken and step == 1:
        last = grads[-1]
        assert last is not None
        last.view(-1)[-1] = float("inf")
    if variant.missing:
        grads[0] = grads[len(grads) // 2] = None
    return grads


def missing(context: Context, section: Section) -> bool:
    """Whether there is no library here; on a GPU that is a failure, since nothing was checked."""
    why = unbuilt(context.device) if context.cuda else why_missing(context.device.type)
    if why is not None:
        (section.failures if context.cuda else section.skipped).append(f"adamw_ema: {why}")
    return why is not None


def correctness(context: Context, section: Section, steps: int = 5) -> None:
    """Rows: the operator against the reference after several steps of each variant."""
    if missing(context, section):
        return

    def one(variant: Variant) -> None:
        section.rows.append(compare(context, section, variant, steps))

    context.each(section, [(f"adamw_ema {v.name}", v) for v in VARIANTS], one)


def compare(context: Context, section: Section, variant: Variant, steps: int) -> dict[str, Any]:
    """A row of `correctness`."""
    shapes = SMOKE_SHAPES if context.smoke else ODD_SHAPES
    ours, theirs = (Problem(fused, variant, shapes, context.device, context.seed) for fused in (True, False))
    norms = []
    for step in range(steps):
        grads = gradients(variant, ours.params, step, context.seed)
        norms.append([p.step([None if g is None else g.clone() for g in grads]) for p in (ours, theirs)])
    # One rounding of a bf16 copy, a few of float32; a norm that is not finite has no error.
    pairs = [(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True) if a.numel()]
    errors = [_relative(a, b) / (1e-6 if a.dtype == torch.float32 else 2**-7) for a, b in pairs]
    worst = max([*errors, *(_relative(a, b) / 1e-6 for a, b in norms if bool(b.isfinite()))])
    counts = [[int(c) for c in p.counts] for p in (ours, theirs)]
    norms_agree = all(bool(a.isfinite()) == bool(b.isfinite()) for a, b in norms)
    good = worst <= 1 and counts[0] == counts[1] == [steps - variant.broken, int(variant.broken)] and norms_agree
    text = f"adamw_ema, {variant.name}: {worst:.3g} of the allowed error, updates and skips {counts}"
    return {
        "operator": f"adamw_ema {variant.name}", "nearest to its limit": f"{steps} steps, skipped {counts[0][1]}",
        "error": worst * 1e-6, "allowed": 1e-6, "ok": section.check(good, text),
    }  # fmt: skip


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest entry; infinite for a NaN, which `max` would lose."""
    error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def determinism(context: Context, section: Section, runs: int) -> dict[str, Any] | None:
    """A row: three steps from the same start, again and again; None where there is no library."""
    from bench.kernel_checks import same_bits

    if missing(context, section):
        return None
    variant = replace(VARIANTS[1], name="three steps")
    shapes = SMOKE_SHAPES if context.smoke else [*ODD_SHAPES, (1152, 4608), (4608, 1152)]

    def once() -> list[Tensor]:
        problem = Problem(True, variant, shapes, context.device, context.seed)
        norms = [problem.step(gradients(variant, problem.params, step, context.seed)) for step in range(3)]
        return [*problem.tensors(), *norms]

    first = once()
    equal = 1 + sum(all(map(same_bits, first, once())) for _ in range(runs - 1))
    good = section.check(equal == runs, f"adamw_ema: {runs - equal} of {runs} runs differ")
    return {"operator": "adamw_ema, 3 steps", "runs": runs, "equal bit for bit": equal, "ok": good}


def shapes_of(smoke: bool) -> list[tuple[int, ...]]:
    """The shapes of all parameters of SiT-XL/2, which is built without memory."""
    from lsep.config import override
    from lsep.model import SiT
    from lsep.presets import PRESETS

    if smoke:
        return list(SMOKE_SHAPES)
    data = {"model.input_size": 32, "model.in_channels": 4, "model.num_classes": 1000}
    with torch.device("meta"):
        return [tuple(p.shape) for p in SiT(override(PRESETS["sit-xl-2-256"], data)).parameters()]


def times(context: Context) -> tuple[int, dict[str, Timing]]:
    """Number of parameters, and the time of a step by csrc and by torch's fused AdamW with clipping and EMA."""
    shapes = shapes_of(context.smoke)
    draw = Draw(context.device, context.seed)
    params = [torch.nn.Parameter(0.02 * draw.normal(*s)) for s in shapes]
    data = [p.detach() for p in params]
    moments = [[torch.zeros_like(p) for p in data] for _ in range(2)]
    average = [p.clone() for p in data]
    grads = [1e-4 * draw.normal(*s) for s in shapes]
    lr = torch.tensor([1e-4], device=context.device)
    settings: dict[str, Any] = {
        "betas": BETAS, "eps": EPS, "weight_decay": [0.0], "max_norm": MAX_NORM, "ema_decays": [0.9999],
    }  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {}
    if why_missing(context.device.type) is None:
        fused = AdamwEma(data, *moments, [average], None, [0] * len(data), **settings)
        calls["csrc"] = lambda: fused.step(grads, lr)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def by_torch() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, data, 1 - 0.9999)

    calls["torch"] = by_torch
    return sum(p.numel() for p in params), measure(calls, context.device, repeats=4, flush=False)


def row(context: Context, section: Section) -> dict[str, Any]:
    """The optimizer's line in the table of `kernels`: 36 bytes a parameter, and 4 for the norm."""
    count, found = times(context)
    theirs = found["torch"].median
    if "csrc" not in found:
        missing(context, section)
        return {"operator": "adamw_ema", "phase": "step", "eager us": theirs * 1e6}
    ours, floor = found["csrc"], context.floor(optimizer_bytes(count), 0)
    share, speedup = floor / ours.median, theirs / ours.median
    met = share >= COPY_SHARE and speedup >= SPEEDUP
    return {
        "operator": f"adamw_ema, {count / 1e6:.0f} M parameters", "phase": "step", "us": ours.median * 1e6,
        "spread": f"{ours.spread:.0%}", "host us": ours.host * 1e6, "floor us": floor * 1e6, "share": f"{share:.0%}",
        "eager us": theirs * 1e6, "best other": "torch fused AdamW, EMA, clipping", "speedup": speedup,
        "target": f"{COPY_SHARE:.0%} of the copy rate and {SPEEDUP:.0f}x torch", "met": "yes" if met else "missed",
    }  # fmt: skip
