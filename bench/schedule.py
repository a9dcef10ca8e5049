"""The sections of `bench.gpu` in the order of their worth, how long each may take, and what fits into N minutes."""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    least: float
    """With less than this left, a section is not begun."""
    most: float
    """After these it begins no further case."""
    case: float
    """A case that takes longer counts as hanging, and its process is ended."""


SCHEDULE = {
    "machine": Limits(5, 30, 60),
    "step": Limits(60, 400, 180),
    "compiled": Limits(30, 120, 60),
    "correctness": Limits(20, 150, 60),
    "determinism": Limits(20, 60, 60),
    "kernels": Limits(20, 150, 90),
    "csrc": Limits(20, 60, 90),
    "training": Limits(40, 150, 60),
    "candidates": Limits(20, 100, 60),
    "variants": Limits(60, 480, 180),
    "pretraining": Limits(150, 300, 420),
}
"""Allowances, not measurements: a section that is done earlier leaves its time to those after it."""
PATIENCE = 10.0
"""A smoke test may take so many times its section's seconds: it runs on machines of any speed, beside other tests."""
GRACE = 30.0
"""Seconds beyond its limit that a section may spend outside of its cases: imports, data, tables."""
RESERVE = 5.0
"""Seconds kept of the minutes for ending the process that computes and writing the report."""


def planned(names: Iterable[str], seconds: float, patience: float = 1.0) -> dict[str, float]:
    """Of the sections `names`, in order, those that fit into `seconds`, and the seconds each may take.

    What is left after the last that fits in whole goes to the next, unless that is too little to begin it.
    """
    found, left = {}, seconds
    for name in names:
        limits = SCHEDULE[name]
        if left >= limits.least:
            found[name] = min(patience * limits.most, left)
            left -= found[name]
    return found


def show_plan(names: Iterable[str], seconds: float, patience: float = 1.0) -> str:
    """The plan in a line each, as it is printed before the first section."""
    names = list(names)
    plan = planned(names, seconds, patience)
    total = "no limit on the whole" if math.isinf(seconds) else f"{seconds:.0f} s are left"
    lines = [f"plan ({total}; a section that ends early leaves its time to the next):"]
    for name in names:
        lines.append(f"  {name}: {f'up to {plan[name]:.0f} s' if name in plan else left_out(name, 'what remains')}")
    return "\n".join(lines)


def left_out(name: str, remains: str) -> str:
    """Why `name` is not begun."""
    return f"left out, it needs {SCHEDULE[name].least:.0f} s and {remains} is less"


def process_started() -> float:
    """Value of `time.monotonic()` when this process began; now where the system does not say."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age < 3600 else now
