"""Writing a store: whole shards under temporary names, flushed and renamed, and the manifest last.

    build(source, out)      any source of blocks: a user's latents, images through a VAE
    write_store(out, ...)   arrays in memory

A build that was killed goes on after its last whole shard and ends with the same bytes.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lsep.data import latents as latents_of
from lsep.data.latents import Latents
from lsep.data.manifest import Ids, Kind, Origin, parse
from lsep.data.shards import columns_crc32, read_metadata
from lsep.data.shards import header as read_header
from lsep.data.store import FORMAT, VERSION
from lsep.errors import UserError, shown, told


@dataclass(frozen=True)
class Header:
    """What all shards of a store share; the manifest without its shards."""

    kind: Kind
    shape: tuple[int, int, int]
    """C, H, W of a latent or image; a row of moments is stored as (2C, H, W), mean then std."""
    dtype: str
    """float32, float16 or, for pixels, uint8."""
    num_classes: int
    probe_classes: int | None = None
    class_names: tuple[str, ...] = ()
    scale: float = 1.0
    """The model sees (latent - shift) * scale."""
    shift: float = 0.0
    flips: bool = False
    """Blocks bring a mirrored variant of every row."""
    encoder: Origin | None = None
    """Of features."""
    latents: Latents | None = None
    """Of moments and samples: how they came from the VAE's; None stands for latents stored as it encodes them."""
    labelled: bool = True
    """False of data without labels, whose rows all have label 0."""

    def __post_init__(self) -> None:
        if self.latents is None and self.kind in ("moments", "samples"):
            object.__setattr__(self, "latents", latents_of.raw(self.shape[0]))

    @property
    def row_shape(self) -> tuple[int, int, int]:
        c, h, w = self.shape
        return (2 * c if self.kind == "moments" else c, h, w)


class Block(NamedTuple):
    """Consecutive rows: x and flip `(N, *row_shape)` of the header's type, labels `(N,)` int64, paths of the images."""

    x: np.ndarray
    y: Ids
    probe_y: Ids | None = None
    flip: np.ndarray | None = None
    paths: list[str] | None = None
    passed_over: list[str] | None = None
    """One sentence for each row of the range that is damaged and left out."""


class BlockSource(Protocol):
    """Anything a store can be built from; `read` must give the same rows however the range is cut."""

    header: Header
    rows: int

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1."""
        ...


def build(
    source: BlockSource,
    out: Path,
    shard_rows: int = 8192,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    identity: str | dict[str, Any] = "",
) -> None:
    """Write `source` as a store into `out`; processes deal the shards among them, rank 0 writes the manifest.

    `identity` names what is written: an unfinished build of another one is not continued. Rows that the source leaves
    out are missing from their shards, and PASSED says why.
    """
    from tqdm import tqdm

    if _type_mismatch(source.header):
        raise UserError(f"{out}: {source.header.kind} of type {source.header.dtype}, expected {_WANTED}")
    require_readable(source.header, source.rows, str(out))
    if source.rows < 1:
        raise UserError(f"{out}: the source has no rows, expected at least one")
    files = [f"shard-{k:05d}.safetensors" for k in range(-(-source.rows // shard_rows))]
    if (out / "manifest.json").exists():
        if rank:  # the shards were whole, and rank 0 was faster
            return
        raise UserError(f"{out}: holds a finished store already, expected an empty or a new folder")
    named = identity if isinstance(identity, dict) else {"identity": identity}
    _claim(out, {**asdict(source.header), "rows": source.rows, "shard_rows": shard_rows, **named}, rank)
    for k in tqdm(range(rank, len(files), world), disable=not progress, unit="shard"):
        if not (out / files[k]).exists():
            stop = min(source.rows, (k + 1) * shard_rows)
            _write_shard(out / files[k], source.header, source.read(k * shard_rows, stop))
    if rank == 0:
        while not all((out / f).exists() for f in files):
            time.sleep(0.1)
        _finish(out, source.header, files)


def _finish(out: Path, header: Header, files: list[str]) -> None:
    """The manifest of whole shards, and the list of what was left out."""
    entries = [entry_of(out, f, header) for f in files]
    passed = [line for f in files for line in read_metadata(out / f).get(_PASSED_KEY, "").splitlines()]
    if not any(entry["rows"] for entry in entries):
        raise UserError(f"{out}: none of {len(passed)} images could be read, expected at least one ({passed[0]})")
    if passed:
        replace_file(out / PASSED, "".join(f"{line}\n" for line in passed).encode())
        print(f"{out}: {len(passed)} images could not be read and are left out, see {out / PASSED}", file=sys.stderr)
    write_manifest(out, header, [entry for entry in entries if entry["rows"]])
    (out / _PLAN).unlink()
    for left in out.glob(".*.tmp"):  # of a build that was killed; all processes are done
        left.unlink(missing_ok=True)


PASSED = "passed-over.txt"
_PASSED_KEY = "passed_over"
_WANTED = "uint8 for pixels, float32 or float16 for latents"


def _type_mismatch(header: Header) -> bool:
    """Whether the type is none a store of this kind holds."""
    return header.dtype not in (("uint8",) if header.kind == "pixels" else ("float32", "float16"))


def require_readable(header: Header, rows: int, where: str) -> None:
    """Raise UserError where no reader would take what is about to be written."""
    parse(json.loads(json.dumps(asdict(header))), where, where, rows, header.flips)


_PLAN = "build.json"  # what an unfinished build writes, so that nothing else is continued with it


def _claim(out: Path, plan: dict[str, Any], rank: int) -> None:
    text = json.dumps(plan, indent=2) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if rank == 0 and not (out / _PLAN).exists():
            if any(not p.name.endswith(".tmp") for p in out.iterdir()):  # a kill leaves half a file under such a name
                raise UserError(f"{out}: not empty and no unfinished build, expected an empty or a new folder")
            replace_file(out / _PLAN, text.encode())
        while not (out / _PLAN).exists():
            time.sleep(0.1)
        changed = _changes((out / _PLAN).read_text(), json.loads(text))
        if changed:
            raise UserError(
                f"{out}: holds an unfinished build of something else ({changed}), expected the same, or another folder"
            )
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def _changes(text: str, plan: dict[str, Any]) -> str:
    """What differs between the plan in a folder and this one; fields that an earlier version did not write do not."""
    try:
        before = json.loads(text)
        return "; ".join(f"{k}: {shown(before[k])} -> {shown(plan.get(k))}" for k in before if before[k] != plan.get(k))
    except (ValueError, TypeError, RecursionError) as error:
        return f"{_PLAN} cannot be read, {told(error)}"


def _write_shard(path: Path, header: Header, block: Block) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    rows = len(block.x)
    variants = {header.kind: block.x} | ({f"{header.kind}_flip": block.flip} if block.flip is not None else {})
    if (block.flip is not None) != header.flips:
        raise ValueError("a block brings flips exactly when its header says so")
    tensors: dict[str, np.ndarray] = {}
    for name, x in variants.items():
        if x.shape != (rows, *header.row_shape) or x.dtype != np.dtype(header.dtype):
            raise ValueError(f"{name} is {x.dtype} {x.shape}, the header says {header.dtype} {header.row_shape}")
        x = np.ascontiguousarray(x)
        tensors[name] = x
        crc = "crc32_flip" if name.endswith("_flip") else "crc32"
        tensors[crc] = np.array([zlib.crc32(row.data) for row in x], np.uint32)
    labels = {"labels": (block.y, header.num_classes)}
    if block.probe_y is not None:
        labels["probe_labels"] = (block.probe_y, header.probe_classes or header.num_classes)
    for name, (y, classes) in labels.items():
        wrong = np.flatnonzero((y < 0) | (y >= classes))
        if len(wrong):
            row = int(wrong[0])
            raise UserError(f"{path}: {name} of row {row} is {int(y[row])}, expected from 0 to {classes - 1}")
        tensors[name] = y.astype(np.int64)
    if block.paths is not None:
        encoded = [p.encode() for p in block.paths]
        tensors["paths"] = np.frombuffer(b"".join(encoded), np.uint8)
        tensors["path_ends"] = np.cumsum([len(p) for p in encoded]).astype(np.int64)
    said = "\n".join(" ".join(line.split())[:300] for line in block.passed_over or ())
    try:
        with _replacing(path) as temporary:
            # A shard can be large: not a second time in memory.
            save_file(tensors, temporary, metadata={_PASSED_KEY: said} if said else None)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else told(error)
        raise UserError(
            f"{path}: the shard could not be written ({reason}); the shards before it are whole, "
            f"the same command goes on from there"
        ) from None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it; nothing is left behind on an error."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The temporary name, which nobody can know before, under which the file is to be written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(fd).st_mode)  # as the umask has it; safetensors makes its files readable to us only
    os.close(fd)
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def entry_of(folder: Path, file: str, header: Header) -> dict[str, Any]:
    """The manifest's entry of a whole shard, from the file itself."""
    path = folder / file
    columns = read_header(path)
    x, flip = columns[header.kind], columns.get(f"{header.kind}_flip")
    bad = np.zeros(x.shape[0], bool)
    if x.dtype != np.uint8:
        for column in (x, flip):
            if column is not None:
                values = np.memmap(path, column.dtype, "r", column.start, (x.shape[0], *x.shape[1:]))
                bad |= np.array([not np.isfinite(row).all() for row in values])
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "file": file, "rows": x.shape[0], "layout": "packed", "offset": x.start,
        "flip_offset": None if flip is None else flip.start, "bytes": path.stat().st_size,
        "sha256": digest, "columns": file, "columns_crc32": columns_crc32(path),
        "non_finite": int(bad.sum()),
    }  # fmt: skip


def write_manifest(folder: Path, header: Header, entries: list[dict[str, Any]]) -> None:
    """Write manifest.json, in one step."""
    fields = asdict(header)
    del fields["flips"]  # the shards' flip_offset says it
    for name in ("encoder", "latents"):
        if fields[name] is None:
            del fields[name]
    manifest = {"format": FORMAT, "version": VERSION, **fields, "shards": entries}
    try:
        replace_file(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{folder / 'manifest.json'}: could not be written ({error.strerror})") from None


@dataclass
class _Arrays:
    header: Header
    rows: int
    block: Block

    def read(self, start: int, stop: int) -> Block:
        x, y, probe_y, flip, paths, _ = self.block
        cut = slice(start, stop)
        return Block(
            x[cut],
            y[cut],
            None if probe_y is None else probe_y[cut],
            None if flip is None else flip[cut],
            None if paths is None else paths[cut],
        )


def write_store(
    path: str | Path,
    *,
    kind: Kind,
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    probe_y: np.ndarray | None = None,
    probe_classes: int | None = None,
    flip: np.ndarray | None = None,
    class_names: tuple[str, ...] = (),
    scale: float = 1.0,
    shift: float = 0.0,
    shard_rows: int = 8192,
    latents: Latents | None = None,
) -> None:
    """Write rows x `(N, *row_shape)` (float32, float16 or uint8) and labels `(N,)` as a store.

    `latents`: how they came from those their VAE decodes, where they are not stored as it encodes them.
    """
    if x.ndim != 4 or (kind == "moments" and x.shape[1] % 2):
        wanted = "(N, 2C, H, W), mean then std," if kind == "moments" else "(N, C, H, W)"
        raise UserError(f"{path}: x has shape {x.shape}, expected {wanted}")
    for name, column in (("y", y), ("probe_y", probe_y)):
        if column is not None and (column.ndim != 1 or column.dtype.kind not in "iu"):
            raise UserError(f"{path}: {name} is {column.dtype} {column.shape}, expected integers ({len(x)},)")
    if flip is not None and len(flip) == len(x) and (flip.shape, flip.dtype) != (x.shape, x.dtype):
        raise UserError(f"{path}: flip is {flip.dtype} {flip.shape}, expected {x.dtype} {x.shape} as x")
    for name, column in (("y", y), ("probe_y", probe_y), ("flip", flip)):
        if column is not None and len(column) != len(x):
            raise UserError(f"{path}: {name} has {len(column)} rows, expected {len(x)} as x")
    channels = x.shape[1] // 2 if kind == "moments" else x.shape[1]
    header = Header(
        kind, (channels, x.shape[2], x.shape[3]), x.dtype.name, num_classes, probe_classes, class_names, scale, shift,
        flip is not None, latents=latents,
    )  # fmt: skip
    build(_Arrays(header, len(x), Block(x, y, probe_y, flip)), Path(path), shard_rows, progress=False)
