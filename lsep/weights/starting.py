"""`train.init`: a new run from another's averaged weights, and what is to be said where the two differ."""

from typing import Any

from lsep import checkpoint
from lsep.align import take_projectors
from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.errors import shown
from lsep.objective import Objective
from lsep.run import Run


def start(run: Run, config: Config, manifest: Manifest, objective: Objective) -> list[str]:
    """Fill `objective`, of a resolved `config` for data of `manifest`, from `run`; sentences on what is new or differs.

    Raises UserError where the run's checkpoint is damaged or its backbone another.
    """
    said = checkpoint.start_from(checkpoint.find(run.checkpoints, None), objective)
    if objective.projectors is not None:
        take_projectors(objective.projectors, run.projectors_file)
    there = run.manifest()
    before, after = _meaning(run.config(), there), _meaning(config, manifest)
    differing = [f"{k} is {shown(before[k])} there and {shown(after[k])} here" for k in after if before[k] != after[k]]
    if differing:
        said.append(
            f"the model sees other numbers than the one it starts from: {'; '.join(differing)}; expected the same, "
            "unless the rows of the two data sets are scaled by as much"
        )
    names = [m.class_names for m in (there, manifest)]
    if all(names) and names[0] != names[1] and len(names[0]) == len(names[1]):
        i = next(i for i, (a, b) in enumerate(zip(*names, strict=True)) if a != b)
        said.append(f"label {i} is {shown(names[0][i])} there and {shown(names[1][i])} here")
    return [f"--train.init {run.path}: {sentence}" for sentence in said]


def _meaning(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What weights take their input and output for: other values, and the same numbers mean other things."""
    pixels = manifest.kind == "pixels"
    return {
        "kind": "pixels" if pixels else "latents",
        "scale": 1.0 if pixels else manifest.scale,
        "shift": 0.0 if pixels else manifest.shift,
        "path": config.interpolant.path,
        "prediction": config.interpolant.prediction,
        "conditional": config.model.conditional,
    }
