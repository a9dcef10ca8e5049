"""What a section of `bench.gpu` gets and gives, and how it is shown."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lsep.cost.operations import Rates, floor

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Context:
    """What all sections share. A section may not change it, but `machine`, which comes first, sets the rates."""

    device: torch.device
    smoke: bool
    seed: int
    copy_rate: float = math.nan
    """Bytes/s of a device copy, read and written bytes counted."""
    matrix_rate: float = math.nan
    """FLOP/s of a bf16 matrix product."""
    deadline: float = math.inf
    """Value of `time.monotonic()` at which what is optional ends."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def floor(self, size: float, flops: float) -> float:
        """Seconds that moving `size` bytes or computing `flops` takes at the measured rates, whichever is longer."""
        return floor(size, flops, Rates(self.matrix_rate, self.copy_rate))

    def synchronize(self) -> None:
        """Wait for the GPU; raises where it failed and this process can use it no more."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give PyTorch's unused memory back."""
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds_left(self, at_most: float) -> float:
        """Time for an optional part."""
        return max(0.0, min(at_most, self.deadline - time.monotonic()))


@dataclass
class Section:
    """One section's results: a table, sentences about it, and what went wrong."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the table; keys are the column titles."""
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Checks that failed: each makes the exit code 1."""
    skipped: list[str] = field(default_factory=list)
    """What was left out, and why."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the JSON file only."""
    seconds: float = 0.0

    @property
    def state(self) -> str:
        if self.failures:
            return f"FAILED ({len(self.failures)})"
        return "skipped" if self.skipped and not self.rows else "ok"

    def check(self, good: bool, what: str) -> str:
        """Record a failure unless `good`; "yes" or "NO" for a table."""
        if not good:
            self.failures.append(what)
        return "yes" if good else "NO"


def show(section: Section) -> str:
    """The section in Markdown."""
    lines = [f"## {section.name}: {section.state}, {section.seconds:.0f} s", ""]
    if section.rows:
        titles = list(dict.fromkeys(key for row in section.rows for key in row))
        lines += [_line(titles), _line(["---"] * len(titles))]
        lines += [_line([_cell(row.get(title)) for title in titles]) for row in section.rows]
        lines.append("")
    for kind, sentences in (("", section.notes), ("Skipped: ", section.skipped), ("FAILED: ", section.failures)):
        lines += [f"* {kind}{sentence}" for sentence in sentences]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def sentence(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def plain(value: Any) -> Any:
    """`value` for strict JSON, which knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
