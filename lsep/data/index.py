"""In-place use of data as it lies: a manifest and columns beside it instead of a copy of its rows.

    index("latents/")     LightningDiT's shards, or REPA's, fast-DiT's and SpeedrunDiT's `.npy` files

Labels and checksums go to `lsep-index/`; the rows stay where they are and are read there. What a store's one scale and
shift cannot express (a normalisation by channel) is refused and has to be packed.
"""

import hashlib
import json
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lsep.data.forms import open_form, recognise
from lsep.data.forms_npy import NpyRows, each
from lsep.data.forms_shards import STATS, LightningDiT, labels_of, read_rows
from lsep.data.latents import raw
from lsep.data.manifest import Ids
from lsep.data.regular import open_regular, read_regular
from lsep.data.shards import columns_crc32, inside
from lsep.data.store import FORMAT
from lsep.data.tree import JSON_LIMIT
from lsep.data.writer import replace_file, require_readable, write_manifest
from lsep.errors import UserError

SIDECARS = "lsep-index"  # a folder of its own: LightningDiT takes every *.safetensors beside its shards for one of them
FILES_PER_ENTRY = 65_536
_CHUNK = 512  # rows between two steps of the progress bar


def index(
    folder: str | Path,
    form: str | None = None,
    scale: float | None = None,
    num_classes: int | None = None,
    progress: bool = True,
) -> Path:
    """Write manifest.json and `lsep-index/` into `folder` and return the manifest's path; arguments as in `open_form`.

    All rows are read once, for their checksums. Raises UserError for data that cannot be used in place.
    """
    folder = Path(folder)
    form = recognise(folder) if form is None else form
    if form in ("edm2", "imagefolder", "digits"):
        why = "is normalised by channel" if form == "edm2" else "holds no latents"
        raise UserError(f"{folder}: form {form!r} {why}, expected data usable in place: use 'lsep data pack' instead")
    if folder.is_file():
        raise UserError(f"{folder}: a zip archive cannot be used in place, expected a folder: use 'lsep data pack'")
    _refuse_foreign(folder / "manifest.json")
    source = open_form(folder, form, scale=scale, num_classes=num_classes)
    header = source.header
    if isinstance(source, LightningDiT):
        if source.widened:
            raise UserError(
                f"{source.files[0]}: latents are bfloat16, expected float32 or float16 to use the shards in place: use "
                f"'lsep data pack' instead"
            )
        expressed = source.scale_shift()
        if expressed is None:
            raise UserError(
                f"{folder / STATS}: mean and std differ between channels, expected one for all to use the shards in "
                f"place: use 'lsep data pack' instead"
            )
        own = raw(header.shape[0]) if source.mean is not None else header.latents  # in place they are not normalised
        header = replace(header, scale=expressed[0], shift=expressed[1], latents=own)
    assert isinstance(source, LightningDiT | NpyRows)
    from tqdm import tqdm

    try:
        (folder / SIDECARS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder / SIDECARS}: cannot be made ({error.strerror}), expected a folder to write") from None
    require_readable(header, source.rows, str(folder))
    with tqdm(total=source.rows, disable=not progress, unit="row", unit_scale=True) as bar:
        if isinstance(source, LightningDiT):
            entries = [_packed_entry(source, k, bar) for k in range(len(source.files))]
        else:
            starts = range(0, source.rows, FILES_PER_ENTRY)
            entries = [_files_entry(source, k, start, bar) for k, start in enumerate(starts)]
    write_manifest(folder, header, entries)
    return folder / "manifest.json"


def _refuse_foreign(manifest: Path) -> None:
    if not manifest.exists():
        return
    try:
        value = json.loads(read_regular(manifest, JSON_LIMIT))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{manifest}: a file of another program, expected none or the manifest of a store")


def _packed_entry(source: LightningDiT, k: int, bar: Any) -> dict[str, Any]:
    """A shard that stays as it is: where its rows start, and its columns beside it."""
    file, columns, rows = source.files[k], source.columns[k], source.counts[k]
    names = ["latents", "latents_flip"] if source.header.flips else ["latents"]
    crc = {name: np.empty(rows, np.uint32) for name in names}
    bad = np.zeros(rows, bool)
    for start in range(0, rows, _CHUNK):
        stop = min(rows, start + _CHUNK)
        for name in names:
            x = read_rows(file, columns[name], start, stop)
            crc[name][start:stop] = [zlib.crc32(row.data) for row in x]
            bad[start:stop] |= _not_finite(x)
        bar.update(stop - start)
    inside(source.folder, file.name)
    with open_regular(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    sidecar = f"{SIDECARS}/columns-{k:05d}.safetensors"
    labels = labels_of(file, columns, rows)
    _write_columns(source.folder / sidecar, labels, crc["latents"], crc.get("latents_flip"))
    return {
        "file": file.name, "rows": rows, "layout": "packed", "offset": columns["latents"].start,
        "flip_offset": columns["latents_flip"].start if source.header.flips else None, "bytes": file.stat().st_size,
        "sha256": digest, "columns": sidecar, "columns_crc32": columns_crc32(source.folder / sidecar),
        "non_finite": int(bad.sum()),
    }  # fmt: skip


def _files_entry(source: NpyRows, k: int, start: int, bar: Any) -> dict[str, Any]:
    """A list of files with one row each; they must have rows of one length at one offset."""
    folder, names = source.tree.path, source.names[start : start + FILES_PER_ENTRY]
    for parent in {name.rpartition("/")[0] for name in names}:
        inside(folder, parent or ".")
    for name in names:
        if not name.isprintable():  # the list has one name a line
            raise UserError(f"{folder}: file name {name!r} holds a control character, expected none to use it in place")
    _, data, first = source.row(0)
    crc, bad = np.empty(len(names), np.uint32), np.zeros(len(names), bool)

    def check(low: int, within: int) -> None:
        i = low + within
        x, found, header = source.row(start + i)
        where = source.tree.where(names[i])
        if (folder / names[i]).is_symlink():  # the reader follows none, as where it leads may change
            raise UserError(f"{where}: a symbolic link, expected a file to use it in place: pack it instead")
        if header.fortran:
            raise UserError(f"{where}: values in Fortran order, expected C order to use it in place: pack it instead")
        if (header.offset, len(found)) != (first.offset, len(data)):
            raise UserError(
                f"{where}: values at byte {header.offset} of {len(found)}, expected {first.offset} of {len(data)} as "
                f"in {source.names[0]} to use it in place: pack it instead"
            )
        crc[i] = zlib.crc32(memoryview(found)[header.offset :])
        bad[i] = not np.isfinite(x).all()

    for low in range(0, len(names), _CHUNK):
        count = min(_CHUNK, len(names) - low)
        each(partial(check, low), count)
        bar.update(count)
    listing, text = f"{SIDECARS}/files-{k:05d}.txt", "".join(name + "\n" for name in names).encode()
    sidecar = f"{SIDECARS}/columns-{k:05d}.safetensors"
    _write(folder / listing, text)
    _write_columns(folder / sidecar, source.labels[start : start + len(names)], crc, None)
    return {
        "file": listing, "rows": len(names), "layout": "files", "offset": first.offset, "flip_offset": None,
        "bytes": len(data), "sha256": hashlib.sha256(text).hexdigest(), "columns": sidecar,
        "columns_crc32": columns_crc32(folder / sidecar),
        "non_finite": int(bad.sum()),
    }  # fmt: skip


def _not_finite(x: np.ndarray) -> np.ndarray:
    return ~np.isfinite(x).reshape(len(x), -1).all(1)


def _write_columns(path: Path, labels: Ids, crc: np.ndarray, crc_flip: np.ndarray | None) -> None:
    from safetensors.numpy import save

    columns = {"labels": np.ascontiguousarray(labels), "crc32": crc}
    _write(path, save(columns | ({} if crc_flip is None else {"crc32_flip": crc_flip})))


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
