"""A store from an object store, or any other place that fsspec reaches, to a local folder: `stage`.

Whole files only, under a temporary name until their checksum is right, the manifest last: what lies in the folder is
either right or absent, and the same command after an interruption copies what is missing. One process at a time.
"""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from lsep.data.manifest import Manifest
from lsep.data.regular import open_regular
from lsep.data.shards import Entry, header, inside
from lsep.data.store import read_manifest
from lsep.errors import UserError

CHUNK = 8 << 20
THREADS = 8


def stage(url: str, folder: Path, progress: bool = True) -> None:
    """Copy the store at `url` (s3://, gs://, https://, a local path, ...) to `folder`, checking every file.

    Files that are there already and right are kept. Raises UserError for a path in the manifest that leaves the
    folder, a file that cannot be copied, and a checksum that does not fit.
    """
    source, folder = _Remote(url), Path(folder)
    manifest_json, manifest, entries = _manifest(source)
    target = folder / "manifest.json"
    if target.exists() and target.read_bytes() != manifest_json:
        raise UserError(f"{target}: of another store than {url}, expected a new folder or an earlier copy of it")
    items = {e.columns: Item(e.columns) for e in entries}
    items |= {e.file: Item(e.file, e.bytes if e.layout == "packed" else None, e.sha256) for e in entries}
    source.refuse_escapes(items, folder, items)  # all names are judged before the first byte is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}), expected a folder to copy to") from None
    _fetch_all(source, folder, list(items.values()), progress)
    for entry in entries:
        if entry.layout == "files":
            listed = _listed(folder, entry, manifest)
            # Resolving a million files would take minutes, and a link in a file's own place is replaced, not followed.
            source.refuse_escapes(listed, folder, {str(PurePosixPath(name).parent) for name in listed})
            _fetch_all(source, folder, list(listed.values()), progress)
    temporary = folder / ".manifest.json.part"
    try:
        temporary.write_bytes(manifest_json)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class Item:
    """A file to copy and what is known of it."""

    name: str
    bytes: int | None = None
    """Size; None: the size that the source gives."""
    sha256: str | None = None
    crc32: int | None = None
    """Of the row at `offset`."""
    offset: int = 0
    row_bytes: int = 0

    def problem(self, found: "Sums", size: int | None) -> str | None:
        """What is wrong with a file of these sums, or None."""
        if self.sha256 is not None and found.sha256 != self.sha256.lower():
            return f"sha256 {found.sha256} found and {self.sha256} expected by the manifest"
        if size is not None and found.bytes != size:
            return f"{found.bytes} bytes found and {size} expected"
        if self.crc32 is not None and found.crc32 != self.crc32:
            return f"crc32 {found.crc32:08x} of its row found and {self.crc32:08x} expected"
        return None


@dataclass(frozen=True)
class Sums:
    """What was read of a file."""

    bytes: int
    sha256: str
    crc32: int


class _Remote:
    """The folder behind a URL."""

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = url.rstrip("/") or url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:  # a protocol that needs a package, or is unknown
            raise UserError(
                f"{url}: cannot be opened ({error}), expected a folder or a URL that fsspec knows"
            ) from None
        self._root = root.rstrip("/")
        self._local = Path(root) if isinstance(self._fs, LocalFileSystem) else None

    def refuse_escapes(self, names: Iterable[str], folder: Path, resolved: Iterable[str]) -> None:
        """Raise UserError for names that are absolute or have a `..`, and `resolved` ones that links lead out, at
        either end."""
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
                raise UserError(f"{self.url}/manifest.json: path {name[:200]!r} leaves the store's folder")
            if path == PurePosixPath("manifest.json"):
                raise UserError(
                    f"{self.url}/manifest.json: lists itself as a shard, expected a file of rows or columns"
                )
        for name in resolved:
            inside(folder, name)
            if self._local is not None:
                inside(self._local, name)

    def size(self, name: str) -> int | None:
        """In bytes; None where the source does not say."""
        try:
            return self._fs.size(f"{self._root}/{name}")
        except Exception as error:  # any kind: the backends' own exceptions have no common base
            raise self._unreadable(name, error) from None

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            with self._open(name) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except Exception as error:  # see `size`
            raise self._unreadable(name, error) from None

    def _open(self, name: str) -> IO[bytes]:
        if self._local is not None:
            return open_regular(self._local / name)
        return self._fs.open(f"{self._root}/{name}", "rb", block_size=CHUNK)

    def _unreadable(self, name: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(f"{self.url}/{name}: cannot be read ({type(error).__name__}: {reason})")


def _manifest(source: _Remote) -> tuple[bytes, Manifest, list[Entry]]:
    data = b"".join(source.chunks("manifest.json"))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "manifest.json").write_bytes(data)
        try:
            return data, *read_manifest(Path(scratch))
        except UserError as error:
            raise UserError(str(error).replace(scratch, source.url)) from None


def _listed(folder: Path, entry: Entry, manifest: Manifest) -> dict[str, Item]:
    """The files of a shard of layout `files`, with each row's checksum, from the copied list and columns."""
    path, columns = folder / entry.file, folder / entry.columns
    try:
        names = path.read_text().splitlines()
    except ValueError as error:
        raise UserError(f"{path}: the list of files cannot be read ({error})") from None
    crc = header(columns).get("crc32")
    if crc is None or crc.dtype != np.uint32 or crc.shape != (entry.rows,) or len(names) != entry.rows:
        raise UserError(
            f"{path}: {len(names)} files and {crc.shape[:1] if crc else 'no'} checksums in {entry.columns}, "
            f"expected {entry.rows} of both by the manifest"
        )
    sums = np.frombuffer(columns.read_bytes()[crc.start : crc.end], np.uint32).tolist()
    return {
        name: Item(name, entry.bytes, crc32=value, offset=entry.offset, row_bytes=manifest.row_bytes)
        for name, value in zip(names, sums, strict=True)
    }


def _fetch_all(source: _Remote, folder: Path, items: list[Item], progress: bool) -> None:
    from tqdm import tqdm

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="lsep-stage")
    try:
        with tqdm(total=len(items), disable=not progress, unit="file") as bar:
            for future in as_completed([pool.submit(_fetch, source, folder, item) for item in items]):
                bar.update(1)
                future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # copies under way end or fail: none goes on after an error


def _fetch(source: _Remote, folder: Path, item: Item) -> None:
    """Copy a file unless it is there and right; nothing is left behind when it cannot be had."""
    target = folder / item.name
    size = item.bytes if item.bytes is not None else source.size(item.name)
    if _is_there(target, item, size):
        return
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a copy that was killed; never written through a link
        with temporary.open("xb") as file:
            found = _sums(source.chunks(item.name), item, file)
            if item.sha256 is not None:  # a flush for each of a million small files would take longer than the copy
                file.flush()
                os.fsync(file.fileno())
        problem = item.problem(found, size)
        if problem:
            raise UserError(f"{source.url}/{item.name}: {problem}")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def _is_there(target: Path, item: Item, size: int | None) -> bool:
    try:
        if size is None or target.stat().st_size != size:
            return False
        if item.sha256 is None and item.crc32 is None:
            return True
        with target.open("rb") as file:
            return item.problem(_sums(iter(lambda: file.read(CHUNK), b""), item), size) is None
    except OSError:
        return False


def _sums(chunks: Iterable[bytes], item: Item, sink: IO[Any] | None = None) -> Sums:
    """Size and checksums of a stream, which goes to `sink` on the way."""
    digest, crc, at = hashlib.sha256(), 0, 0
    for chunk in chunks:
        if sink is not None:
            sink.write(chunk)
        if item.sha256 is not None:
            digest.update(chunk)
        crc = zlib.crc32(chunk[max(0, item.offset - at) : max(0, item.offset + item.row_bytes - at)], crc)
        at += len(chunk)
    return Sums(at, digest.hexdigest(), crc)
