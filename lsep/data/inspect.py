"""Looking at a store: every byte (`problems`), or counts, statistics and a few samples (`describe`, `picture`)."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lsep.data.latents import of_vae
from lsep.data.manifest import CorruptRow, Flips, Ids, Manifest, Source
from lsep.data.regular import open_regular
from lsep.data.shards import Shard
from lsep.data.store import Store, read_manifest
from lsep.errors import UserError

_BLOCK = 256


def problems(path: Path, progress: bool = True) -> Iterator[str]:
    """One sentence for everything wrong: files, checksums, non-finite values, labels, doubled paths."""
    from tqdm import tqdm

    manifest, entries = read_manifest(path)
    seen: dict[str, str] = {}
    broken = False
    for entry in entries:
        try:
            shard = Shard(path, entry, manifest)
        except UserError as error:
            broken = True
            yield str(error)
            continue
        found = _sha256(shard.path)
        if found != entry.sha256:
            yield f"{shard.path}: sha256 is {found}, expected {entry.sha256} by the manifest"
        try:
            names = shard.paths()
        except UserError as error:
            names = []
            yield str(error)
        for row, name in enumerate(names):
            if name in seen:
                yield f"{shard.path}: row {row} is {name!r}, which {seen[name]} holds already"
            seen[name] = f"{shard.path} row {row}"
    if broken:  # rows can be read of a store only whose shards all open
        return
    try:
        store = Store(path)
    except UserError as error:
        yield str(error)
        return
    with tqdm(total=manifest.rows, disable=not progress, unit="row") as bar:
        yield from _rows(store, bar.update)


def _rows(store: Store, advance: Callable[[int], object]) -> Iterator[str]:
    """Every damaged row and variant of a store."""
    total, variants = store.manifest.rows, (False, True) if store.manifest.flips else (False,)
    for start in range(0, total, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, total))
        for flip in variants:
            for ids in _whole_or_one_by_one(store, block, flip):
                try:
                    store.read(ids, np.full(len(ids), flip))
                except CorruptRow as error:
                    yield str(error)
        advance(len(block))


def _whole_or_one_by_one(store: Store, ids: Ids, flip: bool) -> list[Ids]:
    try:
        store.read(ids, np.full(len(ids), flip))
    except CorruptRow:
        return [ids[i : i + 1] for i in range(len(ids))]
    return []


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: str) -> Store:
    """A store of any kind, or that of the digits."""
    if path == "digits" and not Path(path).exists():
        from lsep.data.digits import open_digits

        return open_digits()
    return Store(path)


def describe(path: str, rows: int = 2048) -> str:
    """Counts of each class, and statistics of the model's input over up to `rows` rows."""
    store = _opened(path)
    m = store.manifest
    variants = ", with mirror images" if m.flips else ""
    c, h, w = m.shape
    size = sum(s.entry.bytes * (1 if s.entry.layout == "packed" else s.entry.rows) for s in store.shards) / 2**20
    whole = f"{m.rows} {m.kind} of {c} x {h} x {w}, {m.dtype}{variants}, {len(store.shards)} shards, {size:.1f} MiB"
    # At most 256 MiB as float64, however large the images.
    ids = np.linspace(0, m.rows - 1, min(rows, m.rows, 2**25 // m.row_bytes + 1)).astype(np.int64)
    if m.kind == "features":
        return "\n".join([whole, *_encoder(store, ids), *_classes(store)])
    scaled = [f"scale {m.scale:g}, shift {m.shift:g}", *_normalised(m)]
    return "\n".join([whole, *scaled, *_classes(store), *_statistics(store, ids)])


def _normalised(m: Manifest) -> list[str]:
    """What was done to the VAE's latents z before they were stored."""
    way = m.latents
    if way is None:
        return [] if m.kind == "pixels" else ["normalised on the way in: not said, by an earlier version"]
    if not way.changed:
        return []
    lines = [f"normalised on the way in: stored = (z - mean) / std * {way.factor:g} of the VAE's z"]
    if any(way.mean) or any(s != 1 for s in way.std):
        lines += [
            f"  channel {i}: mean {a:+.3f}, std {b:.3f}" for i, (a, b) in enumerate(zip(way.mean, way.std, strict=True))
        ]
    return lines


def _encoder(store: Store, ids: Ids) -> list[str]:
    """What the features are of, and the lengths of their tokens: those of a cosine must not be 0."""
    m = store.manifest
    x = store.read(ids, np.zeros(len(ids), bool) if m.flips else None).x.astype(np.float64)
    lengths = np.sqrt((x**2).sum(1))
    known = f"{m.encoder.name} at {m.encoder.size} pixels, sha256 {m.encoder.sha256[:16]}" if m.encoder else "unknown"
    return [
        f"encoder: {known}",
        f"tokens over {len(ids)} rows: lengths {lengths.min():.3g} to {lengths.max():.3g}, mean {x.mean():+.3f}, "
        f"std {x.std():.3f}",
    ]


def _classes(store: Store) -> list[str]:
    m = store.manifest
    counts = np.bincount(store.labels, minlength=m.num_classes)
    if not m.labelled:
        return ["no labels"]
    lines = [f"{m.num_classes} classes of {counts.min()} to {counts.max()} rows, {(counts == 0).sum()} without any"]
    if m.num_classes <= 20:
        names = [f" {name}" for name in m.class_names] + [""] * m.num_classes
        lines += [f"  {i}{names[i]}: {n}" for i, n in enumerate(counts.tolist())]
    if m.probe_classes != m.num_classes:
        lines.append(f"{m.probe_classes} classes of the probe's own label")
    return lines


def _statistics(store: Store, ids: Ids) -> list[str]:
    m = store.manifest
    x = store.read(ids, np.zeros(len(ids), bool) if m.flips else None).x.astype(np.float64)
    if m.kind == "pixels":
        mean, variance = x.mean((0, 2, 3)) / 127.5 - 1, x.var((0, 2, 3)) / 127.5**2
    else:
        c = m.shape[0]
        centre = x[:, :c]
        variance = centre.var((0, 2, 3)) * m.scale**2
        if m.kind == "moments":  # the model sees mean + std * noise
            variance = variance + (x[:, c:] ** 2).mean((0, 2, 3)) * m.scale**2
        mean = (centre.mean((0, 2, 3)) - m.shift) * m.scale
    std = np.sqrt(variance)
    lines = [f"the model's input over {len(ids)} rows, each channel:"]
    lines += [f"  channel {i}: mean {a:+.3f}, std {b:.3f}" for i, (a, b) in enumerate(zip(mean, std, strict=True))]
    overall = float(np.sqrt((std**2).mean()))
    if m.kind != "pixels" and not 0.5 <= overall <= 2:
        lines.append(
            f"  std {overall:.3f} over all channels, where the scale should bring about 1: is {m.scale:g} right?"
        )
    return lines


def picture(path: str, file: Path, vae: str | None = None, rows: int = 16) -> None:
    """A PNG of `rows` samples spread over the store: pixels, latents through a VAE, or a preview of their channels."""
    import torch

    from lsep.sample import save_grid, to_images

    store = _opened(path)
    m = store.manifest
    ids = np.linspace(0, m.rows - 1, min(rows, m.rows)).astype(np.int64)
    x = torch.from_numpy(_centres(store, ids).astype(np.float32))
    if m.kind == "pixels":
        images = to_images(x / 127.5 - 1, m)
    elif vae is None:
        images = to_images((x - m.shift) * m.scale, m)
    else:
        from lsep.decode import Decoder

        images = Decoder(vae, m, "nearest", torch.device("cpu"), "the store's").decode(of_vae(x, m))
    try:
        save_grid(images, file)
    except OSError as error:
        raise UserError(f"--picture {file}: cannot be written ({error.strerror or error})") from None


def _centres(store: Source, ids: Ids) -> np.ndarray:
    """Rows without their mirror images or posterior noise `(N, C, H, W)`."""
    m = store.manifest
    flips: Flips | None = np.zeros(len(ids), bool) if m.flips else None
    return store.read(ids, flips).x[:, : m.shape[0]]
