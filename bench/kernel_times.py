"""Section `kernels`: every operator at the shapes of a training step, beside its floor and what it competes with."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import kernel_cases, optimizer
from bench.kernel_cases import Case, Draw, Operation, Work
from bench.section import Context, Section, sentence
from bench.timing import Timing, measure
from lsep_kernels import libraries, mlp

TARGET_SHARE = 0.8
LEAST_FLOOR = 10e-6
"""A kernel whose floor is shorter has no target: starting and ending it takes as long."""
OURS, EAGER, COMPILED = "triton", "eager", "compiled"


def kernels(context: Context, section: Section) -> None:
    """Time of each operator forward and backward, its share of the floor, and its lead over the best alternative."""
    sizes = kernel_cases.sizes(context.smoke, context.device, kernel_cases.TIME)
    if not section.begun:
        section.notes += _notes(sizes)

    def one(numbered: tuple[int, Case]) -> None:
        i, case = numbered
        _time_case(context, section, case, Draw(context.device, context.seed + i))
        torch._dynamo.reset()

    # A backward that may reuse its saved tensors' memory runs only once.
    with torch._functorch.config.patch(donated_buffer=False):
        cases = enumerate(kernel_cases.time_cases(sizes, context.device))
        context.each(section, [(case.title, (i, case)) for i, case in cases], one)
    context.each(section, [("adamw_ema", None)], lambda _: section.rows.append(optimizer.row(context, section)))


def _notes(sizes: kernel_cases.Sizes) -> list[str]:
    return [
        f"Batch {sizes.batch}, medians of five interleaved rounds of eight calls (optimizer: four) with a cold cache; "
        "`spread` is the distance of the quartiles, `host us` what PyTorch's dispatcher takes to queue a call, which "
        "the GPU's times leave out.",
        "The floor is what the bytes take at the measured copy rate or the products at the measured matrix rate, "
        "whichever is longer; `share` is floor / time. `compiled` is torch.compile of the reference.",
        "The probe's forward computes its gradients as well, so that only forward + backward compares it.",
    ]


def alternatives(context: Context, section: Section, case: Case) -> dict[str, Operation]:
    """Whatever else computes the same: plain PyTorch, eager and compiled, and libraries for attention and the MLP."""
    backend = "eager" if context.smoke else "inductor"
    found: dict[str, Operation] = {
        EAGER: case.reference,
        COMPILED: torch.compile(case.reference, dynamic=False, backend=backend),
    }
    if case.heads:
        for name, function in _attentions(context, section, case):
            found[name] = lambda qkv, function=function: function(qkv, case.heads)
    if case.name.startswith("mlp ") and context.cuda:
        found["cublaslt"] = mlp.mlp_cublaslt
    return found


def _attentions(
    context: Context, section: Section, case: Case
) -> Iterator[tuple[str, Callable[[Tensor, int], Tensor]]]:
    """Name and function of every attention there is for this head and type; the others are noted."""
    head = int(case.name.rpartition("x")[2])
    yield "sdpa", libraries.sdpa
    problem = libraries.missing_cudnn(context.device, head, case.dtype)
    if problem is None:
        yield "cudnn", libraries.cudnn
    else:
        section.skipped.append(f"cudnn for {case.title}: {problem}")
    if context.cuda:
        yield "sdpa flash", _sdpa_flash
    chosen = libraries.choose_flash(context.device, head, case.dtype)
    if isinstance(chosen, int):
        yield f"flash-attn {chosen}", libraries.flash(chosen)
    else:
        section.skipped.append(f"flash-attn for {case.title}: {chosen}")


def _sdpa_flash(qkv: Tensor, num_heads: int) -> Tensor:
    """The flash-attention kernels inside PyTorch."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return libraries.sdpa(qkv, num_heads)


class Runner:
    """One implementation of a case on given inputs, ready to be called forward and backward."""

    def __init__(self, operation: Operation, case: Case, inputs: list[Tensor], seed: int) -> None:
        self.operation = operation
        self.inputs = [x.detach().requires_grad_(i < case.grads) for i, x in enumerate(inputs)]
        self.leaves = self.inputs[: case.grads]
        out = operation(*self.inputs)  # compiles; and it is here that something does not work
        values = list(out) if isinstance(out, tuple) else [out]
        self.through = [v for v in values if v.requires_grad]
        draw = Draw(inputs[0].device, seed)
        self.back = [draw.normal(*v.shape, dtype=v.dtype) for v in self.through]
        if self.through:
            self.backward()

    def forward(self) -> Any:
        return self.operation(*self.inputs)

    def backward(self) -> Any:
        return torch.autograd.grad(self.through, self.leaves, self.back, retain_graph=True)


def _time_case(context: Context, section: Section, case: Case, draw: Draw) -> None:
    inputs, runners = case.make(draw), {}
    for name, operation in ({OURS: case.kernel} | alternatives(context, section, case)).items():
        try:
            runners[name] = Runner(operation, case, inputs, context.seed)
        except Exception as error:
            context.synchronize()  # raises where this process can do no more
            text = f"{name} for {case.title}: {sentence(error)}"
            (section.failures if name == OURS else section.skipped).append(text)
    phases: dict[str, dict[str, Timing]] = {}
    phases["forward"] = measure({n: r.forward for n, r in runners.items()}, context.device)
    if case.backward:
        phases["backward"] = measure({n: r.backward for n, r in runners.items()}, context.device)
    works = {"forward": case.forward, "backward": case.backward}
    for phase, times in phases.items():
        section.rows.append(_row(context, case, phase, works[phase], times, len(phases) == 1))
    if len(phases) > 1:
        both = {n: Timing(*map(sum, zip(*(phases[p][n] for p in phases), strict=True))) for n in runners}
        work = Work(*(sum(getattr(w, k) for w in works.values() if w) for k in ("bytes", "flops")))
        section.rows.append(_row(context, case, "both", work, both, True))


def _row(context: Context, case: Case, phase: str, work: Work, times: dict[str, Timing], last: bool) -> dict[str, Any]:
    """A line of the table; `last` is the one of the whole operator."""
    floor = context.floor(work.bytes, work.flops)
    row: dict[str, Any] = {"operator": case.title, "phase": phase}
    others = {n: t.median for n, t in times.items() if n != OURS}
    best = min(others, key=lambda n: others[n]) if others else None
    ours = times.get(OURS)
    if ours:
        row |= {
            "us": ours.median * 1e6, "spread": f"{ours.spread:.0%}", "host us": ours.host * 1e6,
            "floor us": floor * 1e6, "share": f"{floor / ours.median:.0%}",
        }  # fmt: skip
    row |= {"eager us": _micro(others.get(EAGER)), "compiled us": _micro(others.get(COMPILED))}
    libraries_us = [f"{n} {t * 1e6:.0f}" for n, t in others.items() if n not in (EAGER, COMPILED)]
    row |= {"libraries, us": ", ".join(libraries_us), "best other": best}
    if ours and best:
        row["speedup"] = others[best] / ours.median
        row["target"], met = _target(case, floor, floor / ours.median, row["speedup"], last)
        row["met"] = None if met is None else "yes" if met else "missed"
    return row


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _target(case: Case, floor: float, share: float, speedup: float, last: bool) -> tuple[str, bool | None]:
    if case.heads or case.name.startswith("mlp "):
        return ("faster than the best other", speedup > 1) if last else ("", None)
    if case.name.startswith("probe_head"):
        return "none: bound by launches", None
    if floor < LEAST_FLOOR:
        return f"none: the floor is below {LEAST_FLOOR * 1e6:.0f} us", None
    return f"{TARGET_SHARE:.0%} of the copy rate", share >= TARGET_SHARE
