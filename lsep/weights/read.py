"""Reading files of weights without running anything that is in them.

A pickle is read by torch's restricted unpickler, which takes tensors, plain containers and `argparse.Namespace` (what
DiT, SiT, REPA and LSEP keep their flags in) and refuses the rest; safetensors hold nothing but tensors. Weights in half
precision become float32 here, before anything is computed with them.
"""

import argparse
import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lsep.errors import UserError, shown, told
from lsep.weights import directories
from lsep.weights.names import Tensors, choose_entry, is_average, listed, plain


@dataclass(frozen=True)
class Raw:
    """What a file holds, under its own names without wrappers and prefixes."""

    path: Path
    tensors: Tensors
    which: str
    """Entry or prefix of the weights, such as "ema" or "model"; "" where the file has only one."""
    rest: dict[str, Any] = field(default_factory=dict)
    """The other entries of a torch file, the metadata of a safetensors file, or the config of a diffusers directory."""
    diffusers: bool = False
    notes: list[str] = field(default_factory=list)
    """Sentences on how it was read."""
    rounding: float = 0.0
    """Largest error of numbers up to 1 in a type of less than float32; 0 where all are of float32."""


def read(path: Path, ema: bool = True) -> Raw:
    """The weights in `path`: a .safetensors file, a file of torch.save, or a directory of diffusers or of our export.

    ema: of a file with both, take the averaged ones. Raises UserError where it cannot be read.
    """
    if path.is_dir():
        own = directories.own_file(path, ema)
        return _read_diffusers(path) if own is None else read(own, ema)
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected weights (.pt, .safetensors or a diffusers directory)")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        raw = Raw(path, tensors, "", metadata)
    else:
        raw = _read_torch(path, ema)
    tensors, prefix, said = plain(raw.tensors, ema, path)
    which = prefix or raw.which
    if ema and which and not is_average(which):
        said = [f"no averaged weights are in the file: these are its {which!r}", *said]
    return _widened(replace(raw, tensors=tensors, which=which, notes=said))


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
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {name[1]}" if name else f"it is damaged or of another kind: {told(error)}"
        raise UserError(
            f"{path}: refused, it is damaged or holds more than tensors ({what}), expected tensors alone: where its "
            "project runs, save the dictionary of weights by itself"
        ) from None
    except Exception as error:  # a damaged pickle raises anything from IndexError to struct.error
        raise UserError(f"{path}: not a whole file of torch.save ({told(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {shown(type(found).__name__)}, expected a dictionary of tensors")
    which, tensors = choose_entry(found, ema, path)
    rest = {k: v for k, v in found.items() if k not in (which, "model", "opt", "optimizer")} if which else {}
    wrong = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong or not tensors:
        what = f"entry {shown(wrong[0])} is no tensor ({listed(tensors)} found)" if wrong else "it is empty"
        raise UserError(f"{path}: {what}, expected weights by name, or those under 'ema' or 'model'")
    return Raw(path, tensors, which, rest)


def _read_diffusers(path: Path) -> Raw:
    folder, config = directories.model_folder(path)
    files, variant = directories.model_files(folder)
    tensors: Tensors = {}
    for file in files:
        part = read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file, ema=True).tensors
        if twice := part.keys() & tensors.keys():
            raise UserError(f"{file}: {min(twice)!r} is in another shard too, expected every tensor once")
        tensors |= part
    said = [f"of the variant {variant}"] if variant else []
    return _widened(Raw(folder, tensors, "", config, diffusers=True, notes=said))


def _widened(raw: Raw) -> Raw:
    """`raw` with its half-precision numbers as float32: they are computed with, and would be rounded a second time."""
    halves = {t.dtype for t in raw.tensors.values() if t.dtype in (torch.float16, torch.bfloat16)}
    tensors = {k: v.float() if v.dtype in halves else v for k, v in raw.tensors.items()}
    rounding = max((torch.finfo(dtype).eps / 2 for dtype in halves), default=0.0)
    said = [f"read from {' and '.join(sorted(str(d).removeprefix('torch.') for d in halves))}"] if halves else []
    return replace(raw, tensors=tensors, rounding=rounding, notes=[*raw.notes, *said])


def count_blocks(tensors: Tensors, name: str, where: str) -> int:
    """How many blocks called `name` there are; raises UserError where one in between is missing, or all are.

    A model of as many is built from it, so a number in a name alone must not decide.
    """
    found = {m[1] for key in tensors if (m := re.match(rf"{name}\.([0-9]+)\.", key))}
    missing = next((i for i in range(len(found)) if str(i) not in found), None)
    if not found or missing is not None:
        raise UserError(
            f"{where}: no tensors of {name}.{missing or 0}, expected blocks from 0 on without a gap; found "
            f"{listed(tensors)}"
        )
    return len(found)
