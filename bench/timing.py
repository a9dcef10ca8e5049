"""The one timer of `bench.gpu`: device events, interleaved rounds, a cold cache, and a host that runs ahead.

    times = measure({"ours": lambda: f(x), "theirs": lambda: g(x)}, device)

Every variant is called in every round, so that what else happens to the machine (its clocks are left as they are) hits
all alike. Before a call 256 MB are zeroed: nothing of the inputs is left in the cache, and the cache is full of written
lines, which the call pays for as its own last lines are paid for by whatever follows. An operator's own host time (some
50 us of PyTorch's dispatcher) is hidden: a spinning kernel holds the GPU while the host queues the calls, so that the
events see kernels back to back, as in a training step, where the host is ahead.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 << 20
_CYCLES = 2e9  # of the spinning kernel a second, at the highest clock of a Hopper; at a lower one it spins for longer
_LONGEST_HOLD = 0.05


class Timing(NamedTuple):
    """Seconds a call."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    host: float
    """Host time to queue the call."""

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


def measure(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 5,
    repeats: int = 8,
    flush: bool = True,
) -> dict[str, Timing]:
    """Time of each variant over `rounds` of `repeats` calls; on a CPU one call each, by the clock."""
    if device.type != "cuda":
        return {name: _by_clock(call) for name, call in variants.items()}
    buffer = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.uint8, device=device)
    hosts = {name: _warm_up(call, repeats) for name, call in variants.items()}
    seen: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seen[name] += _round(variants[name], repeats, hosts[name], buffer)
    return {name: _summary(seen[name], hosts[name]) for name in names}


def _warm_up(call: Callable[[], Any], repeats: int) -> float:
    """Compile what is compiled on the first call; the host time of one of the others."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    host = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return host


def _round(call: Callable[[], Any], repeats: int, host: float, buffer: torch.Tensor) -> list[float]:
    """Seconds of each of `repeats` calls; the host waits after the last one only."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    hold = min(_LONGEST_HOLD, repeats * (1.5 * host + 50e-6))
    torch.cuda._sleep(int(hold * _CYCLES))
    for start, end in zip(starts, ends, strict=True):
        if buffer.numel():
            buffer.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


def _by_clock(call: Callable[[], Any]) -> Timing:
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return Timing(once, once, once, once)


def _summary(seconds: list[float], host: float) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, host)
