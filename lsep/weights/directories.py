"""Directories of weights: diffusers' (a model, a whole pipeline, a variant, shards), and those of `lsep export`."""

import json
import re
from pathlib import Path
from typing import Any

from lsep.errors import UserError, shown, told
from lsep.weights.names import listed

_CLASS = "DiTTransformer2DModel"
_STEM = "diffusion_pytorch_model"
_OWN = (("ema.safetensors", "model.safetensors", "model.pt"), ("model.safetensors", "model.pt"))
"""Of `lsep export` and `lsep checkpoint consolidate`: with averaged weights, and without."""


def own_file(path: Path, ema: bool) -> Path | None:
    """The file of weights in a directory of our own; None where it is none."""
    if (path / "config.json").exists() or (path / "model_index.json").exists():
        return None
    return next((path / name for name in _OWN[not ema] if (path / name).is_file()), None)


def model_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the transformer in `path`, itself or a pipeline's `transformer`, and its config.json."""
    folder = path
    if (path / "model_index.json").is_file() and not (path / "config.json").is_file():
        entry = _json(path / "model_index.json").get("transformer")
        kind = entry[-1] if isinstance(entry, list) and entry else entry
        if kind != _CLASS:
            raise UserError(
                f"{path / 'model_index.json'}: its transformer is {shown(kind)}, expected a pipeline with a {_CLASS}"
            )
        folder = path / "transformer"
    if not (folder / "config.json").is_file():
        there = listed(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "nothing"
        raise UserError(f"{folder}: no config.json ({there} found), expected a diffusers directory of a {_CLASS}")
    config = _json(folder / "config.json")
    if config.get("_class_name") != _CLASS:
        raise UserError(f"{folder / 'config.json'}: _class_name is {shown(config.get('_class_name'))}, "
                        f"expected {_CLASS!r}")  # fmt: skip
    return folder, config


def model_files(folder: Path) -> tuple[list[Path], str]:
    """The files of weights in a diffusers folder, one or the shards of an index, and their variant ("fp16", or "").

    Plain files come before variants, safetensors before pickles. Raises UserError where there are none, or variants
    that could both be meant.
    """
    found: dict[tuple[str, bool], Path] = {}  # by variant, and whether it is a pickle
    for file in sorted(folder.glob(f"{_STEM}*")):
        parts = file.name.removeprefix(_STEM).split(".")[1:]
        kind = next((p for p in parts if p in ("safetensors", "bin")), None)
        index = parts[-1:] == ["json"] and "index" in parts
        if kind is None or re.search(r"-\d+-of-\d+\.", file.name) or (parts[-1] != kind and not index):
            continue
        variant = ".".join(p for p in parts if p not in (kind, "index", "json"))
        key = (variant, kind == "bin")
        if key not in found or not index:  # a whole file before an index
            found[key] = file
    if not found:
        there = listed(sorted(p.name for p in folder.iterdir()))
        raise UserError(f"{folder}: no {_STEM}.safetensors ({there} found), expected the weights beside config.json")
    variants = sorted({variant for variant, _ in found})
    if "" not in variants and len(variants) > 1:
        raise UserError(f"{folder}: weights of the variants {', '.join(variants)}, expected one: remove the others")
    variant = variants[0]
    file = found.get((variant, False)) or found[(variant, True)]
    return (_shards(file) if file.suffix == ".json" else [file]), variant


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f"{index}: no weight_map, expected the file of each tensor by its name")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index}: names {shown(file.name)}, which is not beside it, expected all shards there")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({told(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds {shown(values)}, expected a JSON object")
    return values
