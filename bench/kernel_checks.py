"""Sections `correctness` and `determinism`: every kernel against plain PyTorch, and against itself."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    values = len(ours) - case.grads
    names = [f"result {i}" if i < values else f"gradient of input {i - values}" for i in range(len(ours))]
    return worst_of(names, ours, theirs, truth, case.dtype, case.floor)


def worst_of(
    names: list[str], ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], dtype: torch.dtype, floor: float
) -> Worst:
    """The worst of `ours`, which are called `names`; `theirs` are plain PyTorch's in the same type `dtype`."""
    worst = Worst()
    for what, got, plain, true in zip(names, ours, theirs, truth, strict=True):
        if (got.shape, got.dtype) != (plain.shape, plain.dtype):
            return Worst(float("inf"), f"{what} is {got.dtype} {tuple(got.shape)}")
        # Of zeros alone every kernel is right that writes nothing; and so is all on a device that computes nothing.
        if true.numel() and not bool((true != 0).any()):
            return Worst(float("inf"), f"{what} is zero throughout in float64, so nothing is compared", float("nan"))
        if not got.is_floating_point():
            wrong = int((got != true).sum())
            found = Worst(float(wrong), what, float(wrong), 0.0)
        else:
            found = _error(got, plain, true, dtype, floor, what)
        # A NaN is no number that is larger: it has to be asked for.
        if not found.share <= worst.share:
            worst = found
        if worst.share != worst.share:
            break
    return worst


def _error(got: Tensor, plain: Tensor, true: Tensor, dtype: torch.dtype, floor: float, what: str) -> Worst:
    true = true.double()
    largest = float(true.abs().max()) or 1.0
    error, theirs = (float((x.double() - true).abs().max()) / largest for x in (got, plain))
    # Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles an error.
    factor = 4 if got.dtype == torch.bfloat16 and not got.is_cuda else 2
    # Of a few numbers, a loss say, PyTorch's own can be exact by luck: one rounding of the type is always allowed.
    luck = torch.finfo(dtype).eps if true.numel() < 64 and dtype.is_floating_point else 0.0
    allowed = factor * theirs + floor + luck
    return Worst(error / allowed, what, error, allowed)


def correctness(context: Context, section: Section) -> None:
    """Values and gradients on fresh random inputs and poisoned memory, at most twice as far off as plain PyTorch."""
    if not section.begun:
        section.check(poison_works(context.device), "uninitialised memory could not be poisoned")
        section.notes += [
            f"Inputs are drawn from the seed {context.seed} (`--seed` repeats them).",
            "Truth is the reference in float64 (interpolate: on the CPU); allowed is twice the error of plain PyTorch "
            "in the same type and 1e-6 of the largest entry (interpolate: 1e-5); one rounding more for fewer than 64 "
            "numbers.",
        ]

    def one(numbered: tuple[int, Case]) -> None:
        i, case = numbered
        try:
            worst = compare(case, case.make(Draw(context.device, context.seed + i)), context.seed + i)
        except Exception as error:
            context.synchronize()  # raises where this process can do no more
            worst = Worst(float("inf"), sentence(error), float("nan"))
        what = f"{case.title}: {worst.what}, error {worst.error:.3g} of the largest entry, {worst.allowed:.3g} allowed"
        section.rows.append({
            "operator": case.title, "nearest to its limit": worst.what, "error": worst.error, "allowed": worst.allowed,
            "ok": section.check(worst.share <= 1, what),
        })  # fmt: skip

    sizes = kernel_cases.sizes(context.smoke, context.device, kernel_cases.CHECK)
    context.each(section, _named(kernel_cases.check_cases(sizes, context.device)), one)
    optimizer.correctness(context, section)


def _named(cases: list[Case], after: str = "") -> list[tuple[str, tuple[int, Case]]]:
    """Cases by their names, with their numbers, of which their inputs are a function."""
    return [(case.title + after, (i, case)) for i, case in enumerate(cases)]


def determinism(context: Context, section: Section) -> None:
    """Twenty runs of every operator, bit for bit."""
    sizes = kernel_cases.sizes(context.smoke, context.device, kernel_cases.TIME)
    runs = 2 if context.smoke else RUNS

    def one(numbered: tuple[int, Case]) -> None:
        i, case = numbered
        inputs = case.make(Draw(context.device, context.seed + i))
        first = results(case.kernel, inputs, case.grads, context.seed)
        equal = 1
        for _ in range(runs - 1):
            again = results(case.kernel, inputs, case.grads, context.seed)
            equal += all(same_bits(a, b) for a, b in zip(first, again, strict=True))
        good = section.check(equal == runs, f"{case.title}: {runs - equal} of {runs} runs differ")
        section.rows.append({"operator": case.title, "runs": runs, "equal bit for bit": equal, "ok": good})

    def of_optimizer(_: None) -> None:
        if found := optimizer.determinism(context, section, runs):
            section.rows.append(found)

    def beside_a_cpu(numbered: tuple[int, Case]) -> None:
        """The noised latents of a GPU are those of the reference on a CPU."""
        i, case = numbered
        inputs = case.make(Draw(context.device, context.seed + i))
        pairs = zip(case.kernel(*inputs), case.reference(*(x.cpu() for x in inputs)), strict=True)
        # The largest by torch: Python's max loses a NaN.
        error = float(torch.stack([(a.cpu() - b).abs().max() for a, b in pairs]).max())
        good = section.check(error <= 1e-5, f"{case.title}: {error:.3g} from the reference on a CPU, 1e-5 allowed")
        section.rows.append({"operator": f"{case.title}, beside a CPU's", "largest difference": error, "ok": good})

    cases = kernel_cases.time_cases(sizes, context.device) + kernel_cases.cublaslt_cases(sizes, context.device)
    context.each(section, _named(cases), one)
    context.each(section, [("adamw_ema", None)], of_optimizer)
    sizes = kernel_cases.sizes(context.smoke, context.device, kernel_cases.CHECK)
    drawn = kernel_cases.check_cases(sizes, context.device)
    context.each(section, _named([case for case in drawn if not case.grads], ", beside a CPU's"), beside_a_cpu)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """As `torch.equal`, but a NaN equals itself and 0 is not -0."""
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
