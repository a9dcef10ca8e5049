"""Section `candidates`: other launch configurations of the kernels beside their defaults.

The configurations are constants of the modules, not tuned at run time: a run must repeat bit for bit in every process,
and another tile size is another order of summation. This table is what an engineer changes them by.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bench import kernel_cases
from bench.kernel_cases import Case, Draw
from bench.kernel_times import Runner
from bench.section import Context, Section, sentence
from bench.timing import measure
from lsep_kernels import adaln, attention, gelu_pool, mlp, probe_head


@dataclass(frozen=True)
class Candidates:
    """Values for one constant, and the case and phase that show what they do."""

    module: ModuleType
    constant: str
    values: list[Any]
    case: Case
    phase: str

    @property
    def name(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.constant}"

    @property
    def default(self) -> Any:
        return getattr(self.module, self.constant)

    @contextmanager
    def using(self, value: Any) -> Iterator[None]:
        """The constant is `value`; the launches read it each time."""
        before = self.default
        setattr(self.module, self.constant, value)
        try:
            yield
        finally:
            setattr(self.module, self.constant, before)


def _grid(keys: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(keys.split(), row, strict=True)) for row in rows]


def _lists(sizes: kernel_cases.Sizes, device: torch.device) -> list[Candidates]:
    """What is tried; the defaults are added where they are missing."""
    cases = {c.name.partition(" ")[0]: c for c in reversed(kernel_cases.time_cases(sizes, device))}
    gate, attend = cases["gate_residual_norm_modulate"], cases["attention"]  # of several, the first: head 72
    gelu, probe, hidden = cases["gelu_pool"], cases["probe_head"], cases["gelu_backward"]
    pools = "BLOCK_T BLOCK_D num_warps"
    pool_rows = (8, 256, 4), (16, 64, 4), (16, 256, 4), (16, 256, 8), (32, 128, 4), (32, 128, 8), (16, 512, 8)
    blocks = "BLOCK_M BLOCK_N STAGES num_warps"
    return [
        Candidates(adaln, "FORWARD", _grid(
            "ROWS num_warps", (1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 16), (8, 8), (8, 16)), gate, "forward"),
        Candidates(adaln, "BACKWARD", _grid(
            "ROWS STAGES num_warps",
            (1, 1, 4), (1, 2, 4), (1, 3, 4), (1, 1, 8), (1, 3, 8), (1, 4, 8), (2, 1, 8), (2, 2, 8), (2, 2, 16),
        ), gate, "backward"),
        Candidates(adaln, "TOKENS", [8, 16, 32, 64, 128], gate, "backward"),
        Candidates(attention, "FORWARD", _grid(
            "BLOCK_M num_warps num_stages", (64, 8, 1), (128, 4, 1), (128, 8, 1)), attend, "forward"),
        Candidates(attention, "BACKWARD_Q", _grid(
            blocks, (64, 64, 2, 4), (64, 64, 1, 4), (64, 128, 2, 4), (128, 64, 1, 8), (128, 64, 3, 8), (128, 128, 1, 8),
            (128, 32, 2, 8)), attend, "backward"),
        Candidates(attention, "BACKWARD_KV", _grid(
            blocks, (64, 64, 2, 4), (64, 64, 1, 4), (32, 128, 2, 8), (64, 128, 1, 8), (64, 128, 3, 8), (128, 64, 2, 4),
            (32, 64, 2, 4)), attend, "backward"),
        Candidates(gelu_pool, "FORWARD", _grid(pools, *pool_rows), gelu, "forward"),
        Candidates(gelu_pool, "BACKWARD", _grid(pools, *pool_rows), gelu, "backward"),
        Candidates(mlp, "BACKWARD", _grid(
            "BLOCK_M BLOCK_N STAGES num_warps", (8, 256, 2, 4), (16, 128, 1, 4), (16, 128, 3, 4), (16, 256, 2, 8),
            (32, 128, 2, 8), (32, 64, 2, 4), (8, 128, 2, 4)), hidden, "forward"),
        Candidates(mlp, "ROWS", [64, 128, 512, 1024], hidden, "forward"),
        Candidates(probe_head, "MATMUL", _grid(
            "BLOCK_M BLOCK_N BLOCK_L num_warps num_stages", (64, 32, 64, 4, 3), (64, 32, 128, 4, 3), (64, 64, 64, 4, 3),
            (64, 64, 64, 4, 4), (128, 32, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3)), probe, "forward"),
    ]  # fmt: skip


def candidates(context: Context, section: Section) -> None:
    """The best of a few configurations of each kernel beside its default."""
    sizes = kernel_cases.sizes(context.smoke, context.device, kernel_cases.TIME)
    lists = _lists(sizes, context.device)
    if not section.begun:
        section.notes.append(
            "A configuration counts that compiles, fits and gives the default's results to 2 % of their largest entry. "
            "Nothing is changed by this: the defaults are constants in kernels/. After a change "
            "`python -m bench.resources` shows registers and spills."
        )

    def one(numbered: tuple[int, Candidates]) -> None:
        i, wanted = numbered
        # Its part of what is left, so that a slow compilation takes nothing from the lists after it.
        share = context.seconds_left(math.inf) / (len(lists) - i)
        section.rows.append(_try(context, section, wanted, time.monotonic() + share))

    context.each(section, [(wanted.name, (i, wanted)) for i, wanted in enumerate(lists)], one)


def _try(context: Context, section: Section, wanted: Candidates, end: float) -> dict[str, Any]:
    case, default = wanted.case, wanted.default
    inputs = case.make(Draw(context.device, context.seed))
    runner = Runner(case.kernel, case, inputs, context.seed)
    call: Callable[[], Any] = getattr(runner, wanted.phase)
    expected = call()
    values = [v for v in wanted.values if v != default]
    if context.smoke:
        values = values[:1]
    good: dict[str, Callable[[], Any]] = {str(default): call}
    dropped = {}
    for k, value in enumerate(values):
        if time.monotonic() > end:
            section.skipped.append(f"{wanted.name}: {len(values) - k} of {len(values)} configurations, for time")
            break
        try:
            with wanted.using(value):
                if _same(call(), expected):
                    good[str(value)] = lambda value=value: _under(wanted, value, call)
                else:
                    dropped[str(value)] = "other results"
        except Exception as error:  # does not compile, or takes too much shared memory or too many registers
            context.synchronize()  # raises where the GPU itself failed
            dropped[str(value)] = sentence(error)
    times = measure(good, context.device, rounds=4, repeats=6)
    best = min(times, key=lambda name: times[name].median)
    section.details[wanted.name] = {"us": {n: t.median * 1e6 for n, t in times.items()}, "dropped": dropped}
    return {
        "constant": wanted.name, "case": f"{case.title}, {wanted.phase}", "default": str(default),
        "default us": times[str(default)].median * 1e6, "best": best, "best us": times[best].median * 1e6,
        "default / best": times[str(default)].median / times[best].median, "tried": len(times), "dropped": len(dropped),
    }  # fmt: skip


def _under(wanted: Candidates, value: Any, call: Callable[[], Any]) -> Any:
    with wanted.using(value):
        return call()


def _same(got: Any, expected: Any) -> bool:
    pairs = zip(*(list(x) if isinstance(x, tuple) else [x] for x in (got, expected)), strict=True)
    for a, b in pairs:
        if a.is_floating_point():
            a, b = a.detach().float(), b.detach().float()
            if not float((a - b).abs().max()) <= 0.02 * float(b.abs().max()):
                return False
    return True
