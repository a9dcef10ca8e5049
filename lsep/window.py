"""What is logged of the steps between two lines of metrics.jsonl, and what is wrong with them.

Sums stay on the device; `Window.close` is the one place where the host waits for it.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lsep.checkpoint import Progress
from lsep.dist import World
from lsep.objective import TIME_BINS
from lsep.optim import rate_factor
from lsep.step import State

HISTORY = 20
"""Windows whose median a loss is compared with."""
LEAST_HISTORY = 5


class Clock:
    """Seconds spent training: the time for checkpoints and sample grids is left out."""

    def __init__(self, world: World, before: Progress) -> None:
        self.device, self.cuda = world.device, world.device.type == "cuda"
        self.start = time.perf_counter() - before.seconds
        self.gpu = before.gpu_seconds / world.size
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def gpu_seconds(self) -> float:
        """This process's share: from the begin to the end of each step on its GPU, so without the wait for data.

        Waits for the last step.
        """
        for begin, end in self.events:
            end.synchronize()
            self.gpu += begin.elapsed_time(end) / 1e3
        self.events.clear()
        return self.gpu

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        if not self.cuda:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.events.append((begin, end))

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


class Window:
    """Statistics of the steps since the last log, summed on the device."""

    def __init__(self, state: State, before: Progress) -> None:
        self.state, self.step, self.seconds = state, before.step, before.seconds
        self.sums: Tensor | None = None
        self.row, self.longest = (torch.zeros((), device=state.device) for _ in range(2))
        self.skipped_in_a_row = 0
        """The longest row of skipped steps that the last window ended or saw."""

    def add(self, values: Tensor) -> None:
        """What `train_step` has returned."""
        self.sums = values if self.sums is None else self.sums + values
        self.row = (self.row + values[-1]) * values[-1]
        self.longest = torch.maximum(self.longest, self.row)

    def close(self, step: int, clock: Clock) -> dict[str, Any]:
        """The figures of metrics.jsonl at `step`, averaged over all processes, which call this together."""
        assert self.sums is not None
        config, world, count = self.state.config, self.state.world, step - self.step
        # A skipped step is skipped by all, so the longest row is everyone's.
        own = torch.cat([self.sums, self.longest[None], torch.full_like(self.longest, clock.gpu_seconds)[None]])
        *values, skipped, longest, gpu_seconds = world.average(own.double()).tolist()
        self.skipped_in_a_row = int(longest)
        self.longest = self.row.clone()
        done = count - int(skipped)
        denoising, lsep, norm, align = (v / done if done else None for v in (*values[:3], values[-1]))
        hits, counts = values[3 : 3 + TIME_BINS], values[3 + TIME_BINS : -1]
        parts = [v for v in (denoising, lsep, align) if v is not None]
        seconds = clock.seconds
        line = {
            "step": step,
            "epoch": (step + self.state.offset) / self.state.steps_per_epoch,
            "images": step * config.train.batch_size,
            "seconds": round(seconds, 3),
            "gpu_seconds": round(gpu_seconds * world.size, 3) if clock.cuda else None,
            "loss": sum(parts) if parts else None,
            "denoising": denoising,
            "lsep": lsep,
            "align": align,
            "grad_norm": norm,
            "skipped_steps": int(skipped),
            "lr": config.optim.lr * rate_factor(step - 1, config.optim, config.train.steps),
            "probe_accuracy": sum(hits) / sum(counts) if sum(counts) else None,
            "probe_accuracy_by_time": [h / c if c else None for h, c in zip(hits, counts, strict=True)],
            "images_per_second": count * config.train.batch_size / max(seconds - self.seconds, 1e-9),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(clock.device) if clock.cuda else None,
        }
        self.step, self.seconds, self.sums = step, seconds, None
        return line


class Spikes:
    """Windows whose loss is far above those before."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=HISTORY)

    def seen(self, loss: float | None) -> float | None:
        """The median that `loss` is `factor` times above, or None; a loss that is no spike joins the history."""
        if loss is None:
            return None
        median = statistics.median(self.losses) if len(self.losses) >= LEAST_HISTORY else math.inf
        if loss > self.factor * median:
            return median
        self.losses.append(loss)
        return None
