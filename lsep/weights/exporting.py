"""`lsep export`: a run's weights as safetensors, as SiT's own, or as a diffusers directory, with a card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from lsep import __version__, averages, checkpoint, shards, unet
from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.files import new_folder, replacing, write_atomic
from lsep.run import Run
from lsep.weights import card, diffusers_dit
from lsep.weights.convention import TIME, flip_time
from lsep.weights.read import Tensors

Format = Literal["safetensors", "sit", "diffusers"]
_PATHS = {
    "linear": "x_t = (1 - t) x + t e, v = e - x",
    "cosine": "x_t = cos(pi t / 2) x + sin(pi t / 2) e, v its derivative by t",
    "vp": "x_t = alpha x + sigma e of the variance-preserving path, v its derivative by t",
}
FILES = {"safetensors": "model.safetensors", "sit": "model.pt", "diffusers": "diffusion_pytorch_model.safetensors"}


def export(
    run: Run, form: Format, out: Path, part: str = "ema", probe: bool = False, step: int | None = None
) -> list[str]:
    """Write the folder `out` with the weights of a checkpoint and README.md, their card; sentences on what was done.

    part: "ema", another of the averages, or "model", the weights being trained.

    Raises UserError, and writes nothing, where `out` is there already or the checkpoint is damaged.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already, expected a folder to be made")
    if probe and form != "safetensors":
        raise UserError(f"--with-probe is for --format safetensors: {form} has no place for a probe")
    config, folder = run.config(), checkpoint.find(run.checkpoints, step)
    if part != "model":
        averages.require(part, folder)
    for problem in shards.problems(folder, (part,)):
        raise UserError(problem)
    tensors = checkpoint.read_tensors(folder, part)
    backbone = {k: v for k, v in tensors.items() if not k.startswith(checkpoint.HEADS)}
    if probe:
        classifier = {k: v for k, v in tensors.items() if k.startswith("classifier.")}
        if not classifier:
            raise UserError(f"--with-probe: {run.path} was trained without a probe")
        backbone |= classifier
    interpolant, is_unet = config.interpolant, config.model.backbone == "unet"
    if is_unet and form == "sit":
        raise UserError(f"--format sit: {run.path} holds a U-Net, expected --format safetensors or diffusers")
    if not is_unet and form != "safetensors" and (interpolant.prediction != "v" or interpolant.path == "vp"):
        raise UserError(
            f"--format {form} is for velocities on a linear or cosine path, and {run.path} predicts "
            f"{interpolant.prediction} on {interpolant.path}: expected --format safetensors"
        )
    if form == "diffusers" and config.model.qk_norm:
        raise UserError("--format diffusers: its blocks have no QK-norm, and this model has (--model.qk-norm)")
    with new_folder(out) as temporary:
        notes = _write(temporary, form, backbone, config, run.manifest(), int(folder.name))
        write_atomic(temporary / "README.md", card.text(run, config, form, part, int(folder.name), notes))
    return [f"{part} weights of step {int(folder.name)} as {out / FILES[form]}", *notes]


def _write(folder: Path, form: Format, tensors: Tensors, config: Config, manifest: Manifest, step: int) -> list[str]:
    file, path = folder / FILES[form], _PATHS[config.interpolant.path]
    if form == "safetensors":
        metadata = {
            "format": "lsep",
            "version": __version__,
            "step": str(step),
            "config": json.dumps({k: v for k, v in asdict(config).items() if k not in ("backend", "dist")}),
            "data": json.dumps({k: v for k, v in asdict(manifest).items() if k != "source"}),
        }
        _save({k: v.contiguous() for k, v in tensors.items()}, file, metadata)
        return [f"predicts {config.interpolant.prediction}; t = 1 is noise, {path}"]
    if form == "sit":
        torch.save({"ema": sit_state(tensors, config), "lsep": {TIME: tensors[TIME], "step": step}}, file)
        return [
            f"SiT's time and velocity: t = 0 is noise, and at t stands minus our velocity of 1 - t, with {path}",
            "twice the output channels, as SiT with learn_sigma=True has; the second half, which it drops, is zero",
        ]
    if config.model.backbone == "unet":
        state = {k.removeprefix("unet."): v.contiguous() for k, v in tensors.items()}
        _save(state, file, {"format": "pt"})
        values = {"_class_name": "UNet2DModel", **unet.settings(config.model)}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        return [
            f"predicts {config.interpolant.prediction} of {path}",
            "`timestep` takes 1000 t, with t from 0 (data) to 1 (noise)",
        ]
    state, error = diffusers_dit.write(tensors)
    _save(state, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(diffusers_dit.config_of(config), indent=2) + "\n")
    (folder / diffusers_dit.OURS).write_text(json.dumps({"time": "t in [0, 1], 1 is noise", "step": step}) + "\n")
    return [
        f"the velocity v of {path}; `timestep` takes t itself, from 0 (data) to 1 (noise)",
        f"the first layer over t is refitted to diffusers' frequencies, relative error {error:.1e}",
    ]


def _save(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
    with replacing(file) as temporary:  # safetensors gives its files mode 0600, whatever the umask
        save_file(tensors, temporary, metadata)


def sit_state(tensors: Tensors, config: Config) -> Tensors:
    """Weights in SiT's convention, with its 2C output channels; rows of the head go (p, p, channel)."""
    m = config.model
    assert m.in_channels is not None
    state, patches = flip_time(tensors), m.patch_size**2
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        rows = state[name].view(patches, m.in_channels, -1)
        state[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).reshape(-1, *state[name].shape[1:])
    return state
