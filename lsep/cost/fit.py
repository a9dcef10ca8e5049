"""How a run is made to fit a card's memory: by micro-batches first, which recompute nothing, then by recomputation.

found = fit(config, Card((9, 0)), probe_classes=1000, free=free_of(80 * 2**30))
config = found.chosen.applied(config)
"""

from dataclasses import dataclass, replace
from typing import Literal

from lsep import backends
from lsep.backends import Choice
from lsep.config import Config
from lsep.cost.cards import CARDS, Known, nearest
from lsep.cost.memory import after_setup, step_memory
from lsep.cost.step import seconds, step_time
from lsep.errors import UserError
from lsep_kernels.limits import Device, capability

Policy = Literal["keep", "recompute-elementwise", "recompute-blocks"]
POLICIES: tuple[Policy, ...] = ("keep", "recompute-elementwise", "recompute-blocks")
CONTEXT = 600_000_000
"""Bytes of a card that CUDA's context, its libraries and the kernels take, outside of the allocator."""
SMALLEST = 16
"""Images in a micro-batch below which recomputation is looked at as well: products no longer fill a GPU."""
RESERVE: dict[Policy, tuple[int, float]] = {
    "keep": (1_600_000_000, 0.045),
    "recompute-elementwise": (1_700_000_000, 0.08),
    "recompute-blocks": (1_500_000_000, 0.35),
}
"""What the allocator holds beyond its peak, because free pieces do not fit what is asked for: bytes, and a share of
what comes and goes in a step. Above all that was seen in bench/results/memory.md."""


@dataclass(frozen=True)
class Setting:
    """One way to run a step."""

    accumulate: int
    """`optim.accumulate`."""
    memory: Policy
    """`train.memory`."""
    peak: int
    """Bytes at the peak of the step, see `step_memory`."""
    needed: int
    """Bytes that must be free: the peak and what the allocator reserves beyond it."""
    seconds: float
    """Of a step, computed; for the order."""

    @property
    def flags(self) -> str:
        """As on the command line."""
        recomputed = f" --train.memory {self.memory}" if self.memory != "keep" else ""
        return f"--optim.accumulate {self.accumulate}{recomputed}"

    def applied(self, config: Config) -> Config:
        """`config` with this setting."""
        return replace(
            config,
            optim=replace(config.optim, accumulate=self.accumulate),
            train=replace(config.train, memory=self.memory),
        )


@dataclass(frozen=True)
class Fit:
    """What fits."""

    chosen: Setting | None
    """None: nothing does."""
    fitting: list[Setting]
    """All that fit, in the order of preference."""
    least: Setting
    """The one that needs least."""

    @property
    def different(self) -> list[Setting]:
        """For each policy of `train.memory` that can fit, the first setting that does: up to three."""
        first = {s.memory: s for s in reversed(self.fitting)}
        return [s for s in self.fitting if s is first[s.memory]]


def free_of(memory: int) -> int:
    """Bytes of a card of `memory` bytes that its allocator can have."""
    return memory - CONTEXT


def fit(config: Config, device: Device, probe_classes: int, free: int, processes: int = 1) -> Fit:
    """The settings with which a step of a resolved `config` fits `free` bytes of each of `processes` GPUs.

    `optim.accumulate` is the fewest micro-batches, `train.memory` does not count. First come those that keep
    everything, with as few micro-batches as can be and at least SMALLEST images in each; then all others by their
    computed time. What `lsep.backends` refuses is left out; raises UserError where it refuses all.
    """
    settings = _settings(config, device, probe_classes, processes)
    fitting = sorted((s for s in settings if s.needed <= free), key=lambda s: _order(config, s, processes))
    return Fit(fitting[0] if fitting else None, fitting, min(settings, key=lambda s: s.needed))


def needed(config: Config, choice: Choice, probe_classes: int, peak: int) -> int:
    """Bytes that must be free for a step whose peak is `peak`."""
    fixed, share = RESERVE[policy_of(config)]
    return peak + fixed + int(share * (peak - after_setup(config, choice, probe_classes).total()))


def policy_of(config: Config) -> Policy:
    """`train.memory`, where `auto` is to keep all."""
    return next((policy for policy in POLICIES if policy == config.train.memory), "keep")


def _order(config: Config, setting: Setting, processes: int) -> tuple[bool, float]:
    images = config.train.batch_size // (processes * setting.accumulate)
    first = setting.memory == "keep" and images >= SMALLEST
    return not first, setting.accumulate if first else setting.seconds


def setting_of(config: Config, device: Device, probe_classes: int, processes: int = 1) -> Setting:
    """What a resolved `config` needs with its own `optim.accumulate` and `train.memory`."""
    probe = config.probe.enabled and config.probe.end_step != 0
    choice = backends.decide(config, device, processes)
    peak = sum(step_memory(config, choice, probe_classes, probe, processes).values())
    time = seconds(step_time(own_part(config, processes), choice, probe_classes, _known(device), probe))
    whole = needed(config, choice, probe_classes, peak)
    return Setting(config.optim.accumulate, policy_of(config), peak, whole, time)


def _settings(config: Config, device: Device, probe_classes: int, processes: int) -> list[Setting]:
    found, refused = [], None
    for accumulate in _divisors(config, processes):
        for memory in POLICIES:
            candidate = Setting(accumulate, memory, 0, 0, 0.0).applied(config)
            try:
                found.append(setting_of(candidate, device, probe_classes, processes))
            except UserError as error:
                refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    return found


def _divisors(config: Config, processes: int) -> list[int]:
    """Numbers of micro-batches: the configuration's, doubled as long as the batch can be cut into equal parts."""
    found, own = [config.optim.accumulate], config.train.batch_size // processes
    while own % (2 * found[-1]) == 0:
        found.append(2 * found[-1])
    return found


def own_part(config: Config, processes: int) -> Config:
    """One process's part of the batch as a configuration of its own."""
    return replace(config, train=replace(config.train, batch_size=config.train.batch_size // processes))


def _known(device: Device) -> Known:
    if device.type != "cuda":
        return CARDS["h100"]
    return nearest(capability(device))
