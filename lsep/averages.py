"""The averages of the weights that a training keeps beside `ema`: of further decays, and of EDM2's power functions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsep import shards
from lsep.config import OptimConfig
from lsep.errors import UserError, shown
from lsep.objective import Objective
from lsep.parallel import local
from lsep.power import gamma_of, step_weight

EMA, POWER = "ema", "power"


def part_name(kind: str, value: float) -> str:
    """The name in checkpoints and on the command line: `ema_0_999`, `power_0_05`."""
    return f"{kind}_{np.format_float_positional(value, trim='-').replace('.', '_')}"


def part_value(name: str) -> float | None:
    """The decay or width in a name; None of another name."""
    kind, _, digits = name.partition("_")
    if kind not in (EMA, POWER) or not digits.replace("_", "", 1).isdecimal():
        return None
    return float(digits.replace("_", "."))


def kept(config: OptimConfig) -> dict[str, float]:
    """Names of the averages beside `ema`, with their decay or their relative width."""
    wanted = [(EMA, decay) for decay in config.ema_extra] + [(POWER, width) for width in config.ema_profiles]
    return {part_name(kind, value): value for kind, value in wanted}


def among(parts: list[str]) -> list[str]:
    """Those parts of a checkpoint that are averages."""
    return [part for part in parts if part == EMA or part_value(part) is not None]


def require(name: str, path: Path) -> None:
    """Raise UserError unless the checkpoint `path` holds the average `name`."""
    there = among(shards.read_manifest(path).parts)
    if name not in there:
        raise UserError(f"--average is {shown(name)}, and {path} has {', '.join(there)}")


class Averages:
    """The update of `modules`, which start as copies of `objective` and follow it."""

    def __init__(self, objective: Objective, modules: Mapping[str, Objective], config: OptimConfig) -> None:
        """modules: one for each of `kept`, spread over processes as `objective` is."""
        self.params = [local(p.detach()) for p in objective.parameters()]
        values = kept(config)
        self.constant: list[tuple[float, list[Tensor]]] = []
        self.power: list[tuple[float, list[Tensor]]] = []
        for name, module in modules.items():
            own = [local(p.detach()) for p in module.parameters()]
            if name.startswith(POWER):
                self.power.append((gamma_of(values[name]), own))
            else:
                self.constant.append((1 - values[name], own))

    @torch.no_grad()
    def update(self, finite: Tensor, at_step: Tensor) -> None:
        """After step `at_step` (from 0), on the device. Where it was skipped, because its gradient was not `finite`,
        averages of constant decay stay, as `ema` does; a power function is one of steps, and counts the weights there
        are, so that its profile is exact.
        """
        for share, own in self.constant:
            self._follow(own, torch.where(finite, share, 0.0))
        for gamma, own in self.power:
            self._follow(own, step_weight(at_step, gamma))

    def _follow(self, own: list[Tensor], share: Tensor) -> None:
        torch._foreach_lerp_(own, self.params, [share] * len(self.params))
