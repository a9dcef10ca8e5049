"""Features of a given encoder for the same images: a function, or a file of what it gave.

`--encoder module:function` or `path/to/file.py:function` is called with uint8 images `(N, H, W, C)` and returns
features `(N, E)`, a tensor or an array; a parameter `device`, if it has one, gets the torch.device of --device. With an
attribute `latents = True` it is called with latents instead, float32 `(N, C, H, W)` as a VAE decodes them (of moments
the means).
`--encoder-features FILE.npz` holds `arr_0` `(rows, E)`, one row for each of the data set that tests.
"""

import inspect
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsep.data.manifest import Ids, Source
from lsep.errors import UserError, shown, told
from lsep.functions import load_function

Encode = Callable[[Ids], Tensor]
"""Features `(N, E)` float32 of the rows with these ids."""


def from_function(name: str, source: Source, device: torch.device, batch_size: int) -> Encode:
    """The encoder behind `--encoder`; raises UserError where it cannot be had or takes other data than `source`'s."""
    function, m = load_function("--encoder", name), source.manifest
    latents = bool(getattr(function, "latents", False))
    if latents == (m.kind == "pixels"):
        takes, has = ("latents", "pixels") if latents else ("images", "latents")
        raise UserError(
            f"--encoder {name} takes {takes}, but {m.source} holds {has}: expected --encoder-features FILE.npz "
            "with the encoder's features of the same images"
        )
    given = {"device": device} if "device" in inspect.signature(function).parameters else {}

    def encode(ids: Ids) -> Tensor:
        parts = []
        for start in range(0, len(ids), batch_size):
            x = source.read(ids[start : start + batch_size]).x
            # One C for samples and moments, whose means come first.
            x = x[:, : m.shape[0]].astype(np.float32) if latents else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
            with torch.no_grad():
                parts.append(_checked(name, function(x, **given), len(x)).to(device))
        if len({part.shape[1] for part in parts}) > 1:
            raise UserError(f"--encoder {name}: returned features of several widths, expected one")
        return torch.cat(parts)

    return _remembered(encode)


def from_file(path: Path, source: Source, device: torch.device) -> Encode:
    """The features in `--encoder-features`, rows in the order of `source`'s ids."""
    shape = _shape(path)
    rows = source.manifest.rows
    if len(shape) != 2 or shape[0] != rows or not shape[1]:
        raise UserError(
            f"--encoder-features {path}: arr_0 has shape {shown(shape)}, expected ({rows}, E), one row for each of "
            f"{source.manifest.source}"
        )
    with np.load(path, allow_pickle=False) as archive:
        array = archive["arr_0"]
    features = _checked(str(path), array, rows)
    return lambda ids: features[torch.from_numpy(ids)].to(device)


def _remembered(encode: Encode) -> Encode:
    """All runs are tested on the same rows: each set of them is encoded once."""
    known: dict[bytes, Tensor] = {}

    def remembered(ids: Ids) -> Tensor:
        key = ids.tobytes()
        if key not in known:
            known[key] = encode(ids)
        return known[key]

    return remembered


def _checked(where: str, value: Any, rows: int) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.is_complex():
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{where}: features are of type {kind}, expected a tensor or an array of numbers")
    if value.ndim != 2 or len(value) != rows or not value.shape[1]:
        raise UserError(f"{where}: features of {rows} images have shape {tuple(value.shape)}, expected ({rows}, E)")
    value = value.detach().float()
    if not value.isfinite().all():
        raise UserError(f"{where}: features hold values that are not finite, expected finite ones")
    return value


def _shape(path: Path) -> tuple[int, ...]:
    """Shape of `arr_0` by its header, which must fit the bytes behind it: nothing is read yet."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            room = archive.getinfo("arr_0.npy").file_size - member.tell()
    except KeyError:
        raise UserError(f"--encoder-features {path}: no array arr_0, expected features (rows, E)") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"--encoder-features {path}: cannot be read as .npz ({told(error)})") from None
    if int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize != room:
        raise UserError(f"--encoder-features {path}: arr_0 of {shown(shape)} {dtype} does not fit its {room} bytes")
    return shape
