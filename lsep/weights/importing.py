"""`lsep import`: somebody's weights as a run of ours, to be sampled, evaluated, exported, and started from."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lsep.checks import check
from lsep.config import Config
from lsep.data.latents import raw
from lsep.data.manifest import Kind, Manifest
from lsep.errors import UserError
from lsep.files import replacing
from lsep.model import sincos_positions
from lsep.objective import Objective
from lsep.run import Run
from lsep.weights.foreign import Foreign, Form, configuration, fit, recognise, translate
from lsep.weights.making import make_run, require_new
from lsep.weights.read import read

_SCALE = 0.18215
"""Of Stable Diffusion's VAE, whose latents the published models see."""


@dataclass(frozen=True)
class Given:
    """What files of weights do not say."""

    form: Form | None = None
    ema: bool = True
    num_heads: int | None = None
    kind: Kind | None = None
    """None: what the file says, or else moments."""
    scale: float | None = None
    """None: what the file says, or else `_SCALE`; pixels have none."""
    keep_projectors: bool = False


def import_weights(path: Path, out: Path, given: Given) -> list[str]:
    """Write the run `out` with the weights in `path` at step 0; returns sentences on what was done.

    Raises UserError, and writes nothing, where the file is no whole set of weights of a SiT or `out` is there already.
    """
    require_new(out)
    raw = read(path, given.ema)
    found = translate(raw, recognise(raw, given.form))
    config = configuration(found, str(path), given.num_heads)
    check(config)
    manifest = _manifest(config, found, path, given)
    objective = _objective(config, manifest, found, str(path))

    def keep_projectors(run: Run) -> None:
        if given.keep_projectors and found.projectors:
            with replacing(run.projectors_file) as file:
                save_file({k: v.contiguous() for k, v in found.projectors.items()}, file)

    make_run(out, config, manifest, objective, "imported", more=keep_projectors)
    m = config.model
    said = f"{found.form}{f', its {raw.which} weights' if raw.which else ''}: {m.depth} blocks of width {m.hidden_size}"
    said += f", patch {m.patch_size}, {m.in_channels} x {m.input_size} x {m.input_size}, {m.num_classes} classes"
    assumed = f"latents are taken for those of Stable Diffusion's VAE, times {_SCALE}; --scale, --kind say otherwise"
    unknown = found.manifest is None and given.scale is None and manifest.kind != "pixels"
    return [said, *found.notes, *([assumed] if unknown else []), *_left(found, given)]


def _objective(config: Config, manifest: Manifest, found: Foreign, where: str) -> Objective:
    """The weights in a module, to be saved; it cannot run: what no checkpoint holds stays on the meta device."""
    with torch.device("meta"):
        objective = Objective(config, manifest)
    wanted = {k.removeprefix("model."): v for k, v in objective.state_dict().items()}
    fit(found, wanted, where)
    own = sincos_positions(config.grid, config.model.hidden_size)[None]
    if (found.tensors["pos_embed"].float() - own).abs().max() > max(1e-5, found.rounding):
        raise UserError(f"{where}: pos_embed holds other positions than SiT's frozen sines and cosines")
    found.tensors["pos_embed"] = own
    tensors = {f"model.{k}": v.float().contiguous() for k, v in found.tensors.items()}
    tensors |= {k: v.float().contiguous() for k, v in found.classifier.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name.removeprefix('model.')} holds values that are not finite")
    objective.load_state_dict(tensors, assign=True)
    return objective


def _manifest(config: Config, found: Foreign, path: Path, given: Given) -> Manifest:
    """What the data was: as the file says, or else latents of that shape; `given` counts more."""
    manifest = found.manifest or _likely(config, found, path)
    if given.kind not in (None, manifest.kind):
        pixels = given.kind == "pixels"
        kind, scale, dtype = given.kind, 1.0 if pixels else _SCALE, "uint8" if pixels else "float32"
        way = None if pixels else raw(manifest.shape[0])
        manifest = replace(manifest, kind=kind, scale=scale, shift=0.0, dtype=dtype, latents=way)
    if given.scale is None:
        return manifest
    if manifest.kind == "pixels":
        raise UserError(f"--scale is {given.scale:g}, but pixels have none: expected it for moments or samples")
    return replace(manifest, scale=given.scale)


def _likely(config: Config, found: Foreign, path: Path) -> Manifest:
    m = config.model
    assert m.in_channels is not None and m.input_size is not None and m.num_classes is not None
    probe = found.classifier.get("classifier.1.weight")
    return Manifest(
        source=f"weights imported from {path.name}", kind="moments",
        shape=(m.in_channels, m.input_size, m.input_size), rows=1, num_classes=m.num_classes,
        probe_classes=m.num_classes if probe is None else len(probe), scale=_SCALE,
    )  # fmt: skip


def _left(found: Foreign, given: Given) -> list[str]:
    said = []
    if found.classifier:
        said.append("the probe's classifier is kept")
    if found.projectors:
        names = ", ".join(sorted(found.projectors))
        said.append(
            f"REPA's projectors are {'in projectors.safetensors' if given.keep_projectors else 'left out'}: {names}"
        )
    return said
