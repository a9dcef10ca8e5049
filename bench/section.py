"""What a section of `bench.gpu` gets and gives, how it runs its cases, and how it is shown."""

import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lsep.cost.operations import Rates, floor

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


class GpuLost(Exception):
    """The GPU cannot be used any more by this process: after an illegal access to memory, say."""


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
    """Value of `time.monotonic()` at which the section that runs begins no further case."""
    case_limit: float = math.inf
    """Seconds after which a case counts as hanging: whoever watches this process ends it."""
    tell: Callable[["Section", str | None, float], None] = lambda section, case, until: None
    """Hands on what a section has so far, the case that begins, and when that counts as hanging."""
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The `details` of the sections before, by their names; a fresh process has them too."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def floor(self, size: float, flops: float) -> float:
        """Seconds that moving `size` bytes or computing `flops` takes at the measured rates, whichever is longer."""
        return floor(size, flops, Rates(self.matrix_rate, self.copy_rate))

    def synchronize(self) -> None:
        """Wait for the GPU; raises GpuLost where it failed and this process can use it no more."""
        if not self.cuda:
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise GpuLost(sentence(error)) from error

    def free(self) -> None:
        """Give PyTorch's unused memory back."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def seconds_left(self, at_most: float) -> float:
        """Time for an optional part."""
        return max(0.0, min(at_most, self.deadline - time.monotonic()))

    def each(self, section: "Section", cases: Iterable[tuple[str, T]], run: Callable[[T], None]) -> None:
        """`run` every case while the section has time; one that raises an error is a failure by its name.

        A name occurs once in a section. Cases that a former process has begun are left out: it was ended in the last.
        Raises GpuLost where a case has broken the GPU for this process.
        """
        todo = [(name, case) for name, case in cases if name not in section.begun]
        for i, (name, case) in enumerate(todo):
            if not self.seconds_left(math.inf):
                section.skipped.append(f"{', '.join(n for n, _ in todo[i:])}: the section's time is over")
                return
            section.begun.append(name)
            self.tell(section, name, time.monotonic() + self.case_limit)
            try:
                run(case)
            except GpuLost:
                raise
            except Exception as error:
                section.fail(name, error)
                self.synchronize()
            self.free()
        self.tell(section, None, math.inf)


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
    begun: list[str] = field(default_factory=list)
    """Cases that were begun, by their names."""
    running: bool = False

    @property
    def state(self) -> str:
        if self.failures:
            return f"FAILED ({len(self.failures)})"
        if self.running:
            return "running"
        return "skipped" if self.skipped and not self.rows else "ok"

    def check(self, good: bool, what: str) -> str:
        """Record a failure unless `good`; "yes" or "NO" for a table."""
        if not good:
            self.failures.append(what)
        return "yes" if good else "NO"

    def fail(self, what: str, error: Exception) -> None:
        """Record the failure of `what` by `error`, whose traceback goes to the terminal and the JSON file."""
        self.failures.append(f"{what}: {sentence(error)}")
        text = "".join(traceback.format_exception(error))
        self.details.setdefault("tracebacks", {})[what] = text
        print(text, file=sys.stderr, flush=True)


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


def write_whole(path: Path, text: str) -> None:
    """`text` into `path`, whose folder is made; whoever ends this process leaves all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def sentence(error: BaseException) -> str:
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
