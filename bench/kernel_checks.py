"""Sections `correctness` and `determinism`: every kernel against plain PyTorch, and against itself."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import kernel_cases, optimizer
from bench.kernel_cases import Case, Draw, Operation
from bench.section import Context, Section, sentence

RUNS = 20


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN (integers: their largest value), so that an element nobody writes shows.

    PyTorch fills the results of `torch.empty` itself in its deterministic mode: all that an operator allocates,
    scratch memory included, and no more than that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def poison_works(device: torch.device) -> bool:
    """Whether `poisoned` reaches every way the kernels allocate."""
    x = torch.zeros(1 << 12, device=device)
    with poisoned():
        found = [torch.empty(n, dtype=t, device=device) for n in (1, 1 << 20) for t in kernel_cases.FLOATS]
        found += [torch.empty_like(x), x.new_empty(1 << 16)]
    return all(bool(y.isnan().all()) for y in found)


def results(operation: Operation, inputs: list[Tensor], grads: int, seed: int) -> list[Tensor]:
    """What `operation` returns, and the gradients of the first `grads` inputs for random ones coming back."""
    copies = [x.detach().requires_grad_(i < grads) for i, x in enumerate(inputs)]
    out = operation(*copies)
    values = list(out) if isinstance(out, tuple) else [out]
    if not grads:
        return [v.detach() for v in values]
    draw = Draw(values[0].device, seed)
    through = [v for v in values if v.requires_grad]
    # Drawn in float32 and rounded to bfloat16: the same numbers in every type.
    back = [draw.normal(*v.shape).to(torch.bfloat16).to(v.dtype) for v in through]
    return [*(v.detach() for v in values), *torch.autograd.grad(through, copies[:grads], back)]


@dataclass
class Worst:
    """The result of a case that comes nearest to its limit, or exceeds it most."""

    share: float = -1.0
    what: str = ""
    error: float = 0.0
    allowed: float = 0.0


def compare(case: Case, inputs: list[Tensor], seed: int) -> Worst:
    """The worst of a case's results; errors are shares of the largest entry of the truth."""
    theirs = results(case.reference, inputs, case.grads, seed)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = results(case.truth or case.reference, wide, case.grads, seed)
    del wide
    with poisoned():
        ours = results(case.kernel, inputs, case.grads, seed)
    worst = Worst()
    for i, (got, plain, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        values = len(ours) - case.grads
        what = f"result {i}" if i < values else f"gradient of input {i - values}"
        if (got.shape, got.dtype) != (plain.shape, plain.dtype):
            return Worst(float("inf"), f"{what} is {got.dtype} {tuple(got.shape)}")
        if not got.is_floating_point():
            wrong = int((got != true).sum())
            found = Worst(float(wrong), what, float(wrong), 0.0)
        else:
            found = _error(got, plain, true, case, what)
        # A NaN is no number that is larger: it has to be asked for.
        if not found.share <= worst.share:
            worst = found
        if worst.share != worst.share:
            break
    return worst


def _error(got: Tensor, plain: Tensor, true: Tensor, case: Case, what: str) -> Worst:
    true = true.double()
    largest = float(true.abs().max()) or 1.0
    error, theirs = (float((x.double() - true).abs().max()) / largest for x in (got, plain))
    # Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles an error.
    factor = 4 if got.dtype == torch.bfloat16 and not got.is_cuda else 2
    # Of a few numbers, a loss say, PyTorch's own can be exact by luck: one rounding of the type is always allowed.
    luck = torch.finfo(case.dtype).eps if true.numel() < 64 and case.dtype.is_floating_point else 0.0
    allowed = factor * theirs + case.floor + luck
    return Worst(error / allowed, what, error, allowed)


def correctness(context: Context, section: Section) -> None:
    """Values and gradients on fresh random inputs and poisoned memory, at most twice as far off as plain PyTorch."""
    section.check(poison_works(context.device), "uninitialised memory could not be poisoned")
    sizes = kernel_cases.SMOKE if context.smoke else kernel_cases.CHECK
    for i, case in enumerate(kernel_cases.check_cases(sizes, context.device)):
        row: dict[str, Any] = {"operator": case.title}
        try:
            worst = compare(case, case.make(Draw(context.device, context.seed + i)), context.seed + i)
        except Exception as error:
            context.synchronize()  # raises where this process can do no more
            worst = Worst(float("inf"), sentence(error), float("nan"))
        row |= {"nearest to its limit": worst.what, "error": worst.error, "allowed": worst.allowed}
        what = f"{case.title}: {worst.what}, error {worst.error:.3g} of the largest entry, {worst.allowed:.3g} allowed"
        section.rows.append(row | {"ok": section.check(worst.share <= 1, what)})
        context.free()
    section.rows += optimizer.correctness(context, section)
    section.notes += [
        f"Inputs are drawn from the seed {context.seed} (`--seed` repeats them).",
        "Truth is the reference in float64 (interpolate: on the CPU); allowed is twice the error of plain PyTorch in "
        "the same type and 1e-6 of the largest entry (interpolate: 1e-5); one rounding more for fewer than 64 numbers.",
    ]


def determinism(context: Context, section: Section) -> None:
    """Twenty runs of every operator, bit for bit."""
    sizes = kernel_cases.SMOKE if context.smoke else kernel_cases.TIME
    runs = 2 if context.smoke else RUNS
    cases = kernel_cases.time_cases(sizes, context.device) + kernel_cases.cublaslt_cases(sizes, context.device)
    for i, case in enumerate(cases):
        inputs = case.make(Draw(context.device, context.seed + i))
        first = results(case.kernel, inputs, case.grads, context.seed)
        equal = 1
        for _ in range(runs - 1):
            again = results(case.kernel, inputs, case.grads, context.seed)
            equal += all(same_bits(a, b) for a, b in zip(first, again, strict=True))
        good = section.check(equal == runs, f"{case.title}: {runs - equal} of {runs} runs differ")
        section.rows.append({"operator": case.title, "runs": runs, "equal bit for bit": equal, "ok": good})
        del inputs, first
        context.free()
    section.rows += optimizer.determinism(context, section, runs)
    section.rows += _same_everywhere(context, section, kernel_cases.SMOKE if context.smoke else kernel_cases.CHECK)


def _same_everywhere(context: Context, section: Section, sizes: kernel_cases.Sizes) -> Iterator[dict[str, Any]]:
    """Rows: the noised latents of a GPU are those of the reference on a CPU."""
    for i, case in enumerate(c for c in kernel_cases.check_cases(sizes, context.device) if not c.grads):
        inputs = case.make(Draw(context.device, context.seed + i))
        pairs = zip(case.kernel(*inputs), case.reference(*(x.cpu() for x in inputs)), strict=True)
        error = max(float((a.cpu() - b).abs().max()) for a, b in pairs)
        good = section.check(error <= 1e-5, f"{case.title}: {error:.3g} from the reference on a CPU, 1e-5 allowed")
        yield {"operator": f"{case.title}, beside a CPU's", "largest difference": error, "ok": good}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """As `torch.equal`, but a NaN equals itself and 0 is not -0."""
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
