"""Reading files of weights without running anything that is in them.

A pickle is read by torch's restricted unpickler, which takes tensors, plain containers and `argparse.Namespace` (what
DiT, SiT, REPA and LSEP keep their flags in) and refuses the rest; safetensors hold nothing but tensors.
"""

import argparse
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lsep.errors import UserError, shown, told

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Raw:
    """What a file holds, under its own names."""

    path: Path
    tensors: Tensors
    which: str
    """"ema", "model", or "" where the file has only one."""
    rest: dict[str, Any] = field(default_factory=dict)
    """The other entries of a torch file, the metadata of a safetensors file, or the config of a diffusers directory."""
    diffusers: bool = False


def read(path: Path, ema: bool = True) -> Raw:
    """The weights in `path`: a .safetensors file, a file of torch.save, or a directory of diffusers.

    ema: of a file with both, take the averaged ones. Raises UserError where it cannot be read.
    """
    if path.is_dir():
        return _read_diffusers(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected weights (.pt, .safetensors or a diffusers directory)")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return Raw(path, tensors, "", metadata)
    return _read_torch(path, ema)


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a safetensors file and its metadata; sizes in its header are checked before memory is taken."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({told(error)})") from None


def _read_torch(path: Path, ema: bool) -> Raw:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(error))
        raise UserError(f"{path}: refused, it is damaged or holds more than tensors ({text.strip()[:200]})") from None
    except Exception as error:  # a damaged pickle raises anything from IndexError to struct.error
        raise UserError(f"{path}: not a whole file of torch.save ({told(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {shown(type(found).__name__)}, expected a dictionary of tensors")
    parts = [name for name in (("ema", "model") if ema else ("model", "ema")) if isinstance(found.get(name), dict)]
    tensors = found[parts[0]] if parts else found
    rest = {k: v for k, v in found.items() if k not in ("ema", "model", "opt", "optimizer")} if parts else {}
    if parts and not ema and parts[0] == "ema":
        raise UserError(f"{path}: --no-ema was given, but it holds averaged weights only")
    wrong = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong or not tensors:
        what = f"entry {shown(wrong[0])} is no tensor" if wrong else "it is empty"
        raise UserError(f"{path}: {what}, expected weights by name, or those under 'ema' or 'model'")
    return Raw(path, {k.removeprefix("module."): v for k, v in tensors.items()}, parts[0] if parts else "", rest)


def _read_diffusers(path: Path) -> Raw:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no config.json, expected a diffusers directory of a DiTTransformer2DModel") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({told(error)})") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "DiTTransformer2DModel":
        raise UserError(f"{file}: _class_name is {shown(name)}, expected 'DiTTransformer2DModel'")
    weights = path / "diffusion_pytorch_model.safetensors"
    if weights.is_file():
        tensors, _ = read_safetensors(weights)
    elif weights.with_suffix(".bin").is_file():
        tensors = _read_torch(weights.with_suffix(".bin"), ema=True).tensors
    else:
        raise UserError(f"{path}: no {weights.name}, expected the weights beside config.json")
    return Raw(path, tensors, "", config, diffusers=True)


def count_blocks(tensors: Tensors, name: str, where: str) -> int:
    """How many blocks called `name` there are; raises UserError where one in between is missing, or all are.

    A model of as many is built from it, so a number in a name alone must not decide.
    """
    found = {m[1] for key in tensors if (m := re.match(rf"{name}\.([0-9]+)\.", key))}
    missing = next((i for i in range(len(found)) if str(i) not in found), None)
    if not found or missing is not None:
        raise UserError(f"{where}: no tensors of {name}.{missing or 0}, expected blocks from 0 on without a gap")
    return len(found)
