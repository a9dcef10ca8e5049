"""`lsep ema reconstruct`: an average of another length, out of the copies a training has left (EDM2, section 3.2)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lsep import checkpoint, shards
from lsep.averages import POWER, part_value
from lsep.config import Config
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.power import Array, Profile, coefficients
from lsep.run import Run
from lsep.weights.making import make_run, require_new

LOOSE = 0.05
"""Error of a profile above which it is said to be only roughly the one asked for."""


@dataclass(frozen=True)
class Base:
    """A copy of an average."""

    path: Path
    part: str
    profile: Profile


def bases(run: Run, step: int) -> list[Base]:
    """The copies up to `step`; later ones hold weights of its future."""
    found = []
    for path in checkpoint.steps(run.snapshots):
        at = int(path.name)
        if 0 < at <= step:
            for part in shards.read_manifest(path).parts:
                if part.startswith(POWER):
                    found.append(Base(path, part, Profile(at, sigma_rel=part_value(part))))
    return found


def reconstruct(run: Run, out: Path, sigma_rel: float | None, decay: float | None, step: int | None) -> list[str]:
    """Write the run `out` with the average of `run` after `step`, by default its last copy's; sentences on it.

    sigma_rel: the relative width of a power function; decay: instead, that of a constant one. Raises UserError, and
    writes nothing, where copies are missing or damaged.
    """
    require_new(out)
    there = [int(path.name) for path in checkpoint.steps(run.snapshots)]
    if not there:
        raise UserError(
            f"{run.snapshots}: no copies of averages, expected a training with --optim.ema-profiles 0.05 0.1 and "
            "--optim.ema-snapshot-every"
        )
    step = there[-1] if step is None else step
    if step not in there:
        raise UserError(f"--step is {step}, expected one of the copies': {_list(there)}")
    found = bases(run, step)
    for base in found:
        for problem in shards.problems(base.path, (base.part,)):
            raise UserError(problem)
    target = Profile(step, sigma_rel, decay)
    shares, error = coefficients(target, [base.profile for base in found])
    config, manifest = run.config(), run.manifest()
    config = replace(config, optim=replace(config.optim, ema_extra=(), ema_profiles=(), ema_snapshot_every=0))
    objective = _combined(config, run, found, shares)
    make_run(out, config, manifest, objective, run.preset(), step)
    name = f"relative width {sigma_rel:g}" if decay is None else f"decay {decay:g}"
    said = f"{name} at step {step}, of {len(found)} copies; error of the profile {error:.2%}"
    loose = f"above {LOOSE:.0%}: only roughly what was asked for; more copies, or widths nearer to it, come closer"
    return [said, *([loose] if error > LOOSE else [])]


def _combined(config: Config, run: Run, found: list[Base], shares: Array) -> Objective:
    """The sum of the copies by their shares, in float64, as a module that is there to be saved."""
    with torch.device("meta"):
        objective = Objective(config, run.manifest())
    wanted = {name: tensor.shape for name, tensor in checkpoint.weights(objective).items()}
    total: dict[str, Tensor] = {}
    for base, share in zip(found, shares, strict=True):  # one by one: together they are larger than memory
        tensors = checkpoint.read_tensors(base.path, base.part)
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
            raise UserError(f"{base.path}: {base.part} holds other tensors than the model of {run.config_file}")
        for name, tensor in tensors.items():
            own = total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64))
            own.add_(tensor.double(), alpha=float(share))
    state = {k if k.startswith(checkpoint.HEADS) else f"model.{k}": v.float() for k, v in total.items()}
    objective.load_state_dict(state, assign=True)
    return objective


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]}"
