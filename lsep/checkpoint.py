"""Checkpoints: weights, EMA and optimizer state as safetensors, the rest as JSON; whole or not there at all.

    RUN/checkpoints/0000200/{model,ema,optimizer}.safetensors, state.json

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a kill or a full disk leaves
the earlier ones as they were. All randomness is a function of seed and step: the step is the whole random state.
"""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lsep.errors import UserError
from lsep.objective import Objective
from lsep.optim import Optimizer

_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Time spent in training steps, over all sessions of the run."""
    gpu_seconds: float = 0.0
    """Time that GPUs spent in them, summed over GPUs."""
    data_offset: int = 0
    """Steps whose data was left out after loss spikes."""


def weights(objective: nn.Module) -> dict[str, Tensor]:
    """All weights under the published names: the backbone's without prefix, the probe's as `classifier.*`."""
    return {k.removeprefix("model."): v for k, v in objective.state_dict().items()}


def save(folder: Path, progress: Progress, objective: Objective, ema: Objective, optimizer: Optimizer) -> Path:
    """Write the checkpoint of `progress.step` into `folder`; raises UserError when the disk does not take it."""
    target = folder / f"{progress.step:07d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in zip(_FILES, (weights(objective), weights(ema), optimizer.tensors()), strict=True):
            _write_tensors(temporary / name, tensors)
        sizes = {name: (temporary / name).stat().st_size for name in _FILES}
        state = {**asdict(progress), "bytes": sizes, "torch": torch.__version__}
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        _flush(temporary / "state.json")
        _flush(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest(folder)
        raise UserError(
            f"{target}: the checkpoint could not be written ({error.strerror or error}); "
            + (f"the one before, {kept.name}, is intact" if kept else "there is no earlier one")
        ) from None
    return target


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # its writer wraps the operating system's errors
        raise OSError(str(error)) from None
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until the file or directory is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def steps(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / "state.json").is_file())
    return sorted(found, key=lambda p: int(p.name))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, or None."""
    found = steps(folder)
    return found[-1] if found else None


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints but the `keep_last` newest and those at multiples of `keep_every`; 0 newest means all."""
    for path in steps(folder)[:-keep_last] if keep_last else ():
        if not keep_every or int(path.name) % keep_every:
            # Renamed first: a removal cut short must not leave a checkpoint that looks whole.
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load(path: Path, objective: Objective, ema: Objective, optimizer: Optimizer) -> Progress:
    """Put a checkpoint into modules and optimizer of the same configuration; raises UserError when it does not fit."""
    progress = _read_state(path)
    load_weights(path / "model.safetensors", objective)
    load_weights(path / "ema.safetensors", ema)
    try:
        optimizer.load(read_tensors(path / "optimizer.safetensors"))
    except UserError as error:
        raise UserError(f"{path / 'optimizer.safetensors'}: {error}") from None
    return progress


def _read_state(path: Path) -> Progress:
    file = path / "state.json"
    try:
        state = json.loads(file.read_text())
        sizes = {str(k): int(v) for k, v in state["bytes"].items()}
        progress = Progress(int(state["step"]), float(state["seconds"]), float(state.get("gpu_seconds", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a checkpoint of this program ({type(error).__name__}: {error})") from None
    for name, size in sizes.items():
        with contextlib.suppress(FileNotFoundError):
            found = (path / name).stat().st_size
            if found == size:
                continue
            raise UserError(f"{path / name}: truncated or changed, {found} bytes found and {size} expected")
        raise UserError(f"{path / name}: missing, {size} bytes expected")
    return progress


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; raises UserError when it is none or is truncated."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def load_weights(path: Path, objective: Objective) -> None:
    """Weights as `weights` names them; every missing, unknown or misshapen tensor is an error."""
    own, found = weights(objective), read_tensors(path)
    for kind, names in (("missing", own.keys() - found.keys()), ("unknown", found.keys() - own.keys())):
        if names:
            raise UserError(f"{path}: {len(names)} {kind} tensors for this model, the first {min(names)!r}")
    for name, tensor in own.items():
        if found[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
