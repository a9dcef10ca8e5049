"""The files of a checkpoint: safetensors shards, written with their sha256 and checked before anything of them is used.

    0000200/shard-00000-{model,ema,optimizer}.safetensors, manifest.json

Every process writes the tensors, or parts of tensors, that it holds; the manifest, written last, has size and sha256 of
every file and a sha256 of its own. The header of a shard says where in the whole tensor each part belongs, in the form
that PyTorch's `HuggingFaceStorageReader` reads.
"""

import hashlib
import json
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lsep.errors import UserError, shown, told
from lsep.files import discard, flush, read_plain

PARTS = ("model", "ema", "optimizer")
"""First words of the tensors' names in every checkpoint; further averages have their own (`lsep.averages`). Each part
has files of its own, so that one can be read and checked alone."""
MANIFEST = "manifest.json"
_HEADER_LIMIT = 64 << 20
"""Bytes of a header or manifest that are read at most."""
_CHUNK = 16 << 20
"""Bytes hashed and written at once, outside the interpreter's lock."""
_FILE_NAME = re.compile(r"shard-[0-9]{5,}-(model|ema|optimizer|(ema|power)_[0-9_]+)\.safetensors", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")
_TYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAMED_TYPES = {name: dtype for dtype, name in _TYPES.items()}


class File(NamedTuple):
    """A file as the manifest lists it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    values: dict[str, Any]
    """How far the run had come, and what wrote it."""
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def parts(self) -> list[str]:
        """What the files hold."""
        return sorted({_part(name) for name in self.files})


# ---------------------------------------------------------------- writing


class Writer(StorageWriter):
    """Writes a checkpoint into a temporary folder beside `target`, and renames it when everything is on the disk."""

    def __init__(self, target: Path, rank: int, values: dict[str, Any]) -> None:
        self.target, self.rank, self.values = target, rank, values
        self.temporary = target.with_name(f".{target.name}.tmp")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of the interface; a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.temporary.parent.mkdir(parents=True, exist_ok=True)
            discard(self.temporary)
            self.temporary.mkdir()  # fails where something is left of that name: no link is followed

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This process's shards; the results are one a file, with its size and its sha256."""
        parts: dict[str, dict[str, tuple[Tensor, list[int]]]] = {}
        for item in plan.items:
            tensor, name = planner.resolve_data(item), item.index.fqn
            assert isinstance(tensor, Tensor)
            if tensor.numel():  # a process may hold nothing of a small tensor
                offsets = list(item.index.offset or [0] * tensor.dim())
                parts.setdefault(name.split(".")[0], {})[name] = tensor.detach(), offsets
        results = []
        for part, tensors in parts.items():
            name = f"shard-{self.rank:05d}-{part}.safetensors"
            size, sha256 = write_shard(self.temporary / name, tensors)
            results.append(WriteResult(MetadataIndex(name), size, sha256))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process, after all have written: the manifest, then the name."""
        files = {r.index.fqn: {"bytes": r.size_in_bytes, "sha256": r.storage_data} for rank in results for r in rank}
        (self.temporary / MANIFEST).write_text(_manifest_text({**self.values, "files": files}), encoding="utf-8")
        flush(self.temporary / MANIFEST)
        flush(self.temporary)
        if self.target.exists():  # a damaged one, of steps that have been run again
            remove(self.target)
        self.temporary.rename(self.target)
        flush(self.target.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def write_shard(path: Path, tensors: dict[str, tuple[Tensor, list[int]]]) -> File:
    """Write (tensor, its place in the whole) by name as safetensors onto the disk, hashing on the way."""
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))  # every tensor aligned to its items
    header: dict[str, Any] = {}
    header["__metadata__"] = {
        "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": tensors[name][1]} for name in order}),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }
    end = 0
    for name in order:
        tensor, start = tensors[name][0], end
        end += tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(data: memoryview) -> None:
            nonlocal size
            for start in range(0, len(data), _CHUNK):
                digest.update(data[start : start + _CHUNK])
                size += file.write(data[start : start + _CHUNK])

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            put(tensors[name][0].contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return File(size, digest.hexdigest())


def _manifest_text(values: dict[str, Any]) -> str:
    """JSON that ends with the sha256 of itself, that taken as empty."""
    text = json.dumps({**values, "sha256": ""}, indent=2) + "\n"
    return text.replace('"sha256": ""', f'"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"')


def remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, since a removal cut short must not leave one that looks damaged."""
    doomed = path.with_name(f".{path.name}.old")
    discard(doomed)
    path.rename(doomed)
    discard(doomed)


# ---------------------------------------------------------------- checking


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`; raises UserError where it is missing, damaged or not this program's."""
    file = path / MANIFEST
    try:
        if path.is_symlink():
            raise OSError("the checkpoint is a symbolic link, expected a folder")
        text = read_plain(file, _HEADER_LIMIT)
        values = json.loads(text)
        expected = values.pop("sha256")
        if not _SHA256.fullmatch(expected):
            raise ValueError(f"sha256 is {shown(expected)}")
        found = hashlib.sha256(text.replace(expected.encode(), b"", 1)).hexdigest()
        if found != expected:
            raise UserError(f"{file}: damaged, sha256 {found} found and {expected} expected")
        files = {name: File(entry["bytes"], entry["sha256"]) for name, entry in values.pop("files").items()}
        for name, entry in files.items():
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"file name {shown(name)}, expected shard-RANK-PART.safetensors")
            if type(entry.bytes) is not int or entry.bytes < 0 or not _SHA256.fullmatch(entry.sha256):
                raise ValueError(f"{name} has size {shown(entry.bytes)} and sha256 {shown(entry.sha256)}")
        if type(values["step"]) is not int or values["step"] != int(path.name):
            raise ValueError(f"step {shown(values['step'])} in the folder of step {int(path.name)}")
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a checkpoint of this program ({told(error)})") from None
    return Manifest(values, files)


def problems(path: Path, parts: tuple[str, ...] | None = None, sha256: bool = True) -> list[str]:
    """What is wrong with the checkpoint `path`, a sentence a file: manifest, sizes, headers, and contents by sha256.

    parts: those to look at; all that are there, and PARTS, when not given.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)]
    wanted = {name: file for name, file in manifest.files.items() if parts is None or _part(name) in parts}
    found = [f"{path}: no file of {part}" for part in (PARTS if parts is None else parts) if part not in manifest.parts]
    found += [f"{p}: not in the manifest" for p in sorted(path.glob("*.safetensors")) if p.name not in manifest.files]
    with ThreadPoolExecutor(8) as pool:
        checked = pool.map(lambda name: _problem(path / name, wanted[name], sha256), wanted)
        found += [problem for problem in checked if problem]
    return found


def _problem(path: Path, expected: File, sha256: bool) -> str | None:
    try:
        _require_plain(path)
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{path}: truncated or changed, {size} bytes found and {expected.bytes} expected"
        if sha256:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected.sha256:
                return f"{path}: damaged, sha256 {digest} found and {expected.sha256} expected"
        read_header(path)
    except FileNotFoundError:
        return f"{path}: missing, {expected.bytes} bytes expected"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"
    except UserError as error:
        return str(error)
    return None


def _require_plain(path: Path) -> None:
    """Raise OSError unless `path` is a file, and no link: one could lead anywhere."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError("a link or a folder, expected a file")


def _part(name: str) -> str:
    return name.rpartition("-")[2].partition(".")[0]


class Piece(NamedTuple):
    """A tensor of a shard: its type and shape, and where in the whole tensor it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def read_header(path: Path) -> dict[str, Piece]:
    """The tensors of a shard; sizes, shapes and types are checked against the file before anything is read of it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
        places = json.loads(entries.pop("__metadata__")["DCP_SHARDING_INFO"])
        end = 0
        pieces = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            shape, offsets = tuple(entry["shape"]), tuple(places[name]["saved_offsets"])
            start, stop = entry["data_offsets"]
            dtype = _NAMED_TYPES[entry["dtype"]]
            numbers = (start, stop, *shape, *offsets)
            if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(shape) != len(offsets):
                raise ValueError(f"{name} has shape {shape} at {offsets}")
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} spans bytes {start} to {stop}, which its shape {shape} or its place deny")
            end = stop
            pieces[name] = Piece(dtype, shape, offsets)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes found and {8 + length + end} declared")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({told(error)})") from None
    return pieces


def describe(path: Path, parts: tuple[str, ...] = PARTS) -> dict[str, Tensor]:
    """Every tensor of the checkpoint `path`, its pieces put together, on the meta device: type and shape alone.

    Raises UserError unless the pieces fill it: no tensor is larger than what the files hold.
    """
    found: dict[str, list[Piece]] = {}
    for file in read_manifest(path).files:
        if _part(file) in parts:
            for name, piece in read_header(path / file).items():
                found.setdefault(name, []).append(piece)
    whole = {}
    for name, pieces in found.items():
        if len({(piece.dtype, len(piece.shape)) for piece in pieces}) > 1:
            raise UserError(f"{path}: the pieces of {shown(name)} differ in type or dimensions")
        ends = [[start + n for start, n in zip(p.offsets, p.shape, strict=True)] for p in pieces]
        shape = tuple(map(max, zip(*ends, strict=True)))
        filled = sum(math.prod(piece.shape) for piece in pieces)
        if filled != math.prod(shape):
            raise UserError(f"{path}: {shown(name)} of shape {shown(shape)} has only {filled} values")
        whole[name] = torch.empty(shape, dtype=pieces[0].dtype, device="meta")
    return whole
