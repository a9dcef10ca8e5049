"""A run of weights that no training here has made: its configuration, and one checkpoint that can be used as any."""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from lsep.checkpoint import Checkpoints, Progress
from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.run import Run
from lsep.weights.read import Tensors


class Untrained:
    """The optimizer of such weights: no step was taken, and that is all its state."""

    def __init__(self, objective: Objective) -> None:
        self.before_step: Callable[[], object] = lambda: None
        self.names = [name.removeprefix("model.") for name, _ in objective.named_parameters()]

    def tensors(self) -> Tensors:
        return {f"step.{name}": torch.zeros(()) for name in self.names}


def require_new(out: Path) -> None:
    """Raise UserError where a run cannot be made in the folder `out`, because something is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already, expected a folder to be made")


def make_run(
    out: Path, config: Config, manifest: Manifest, objective: Objective, preset: str, step: int = 0,
    more: Callable[[Run], object] = lambda run: None,
) -> None:  # fmt: skip
    """Write the run `out` with the weights of `objective` at `step`, as those in training and as their average.

    more: writes what else there is. Where anything fails, nothing is left behind.
    """
    made, run = not out.exists(), Run(out)
    try:
        run.open(config, manifest, preset)
        with closing(Checkpoints(run.checkpoints)) as checkpoints:
            checkpoints.save(Progress(step, 0.0), objective, objective, Untrained(objective))
            checkpoints.finish()
        more(run)
    except BaseException:
        shutil.rmtree(out if made else run.checkpoints, ignore_errors=True)
        if not made:
            run.config_file.unlink(missing_ok=True)
        raise
