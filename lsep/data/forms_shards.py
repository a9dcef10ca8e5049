"""LightningDiT's latents: safetensors shards of `latents`, `latents_flip` and `labels` beside `latents_stats.pt`.

A row is one posterior sample; the model sees `(z - mean) / std * multiplier` by channel, or `z * scale` where the set
was made without statistics (with an SD VAE, 0.18215).
"""

from pathlib import Path

import numpy as np

from lsep.data.forms_npy import DTYPES, count_classes
from lsep.data.latents import SD_SCALE, Latents, raw
from lsep.data.manifest import Ids
from lsep.data.shards import BF16, Column, header, widened
from lsep.data.writer import Block, Header
from lsep.errors import UserError

STATS = "latents_stats.pt"


class LightningDiT:
    """Block source over the shards, which normalises by channel when `latents_stats.pt` is there.

    `scale` is then the multiplier (1 if None); without the statistics it is the scale and must be given.
    """

    def __init__(self, folder: Path, scale: float | None = None, num_classes: int | None = None) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(
                f"{folder}: no *.safetensors inside, expected LightningDiT's latents_rank*_shard*.safetensors"
            )
        self.columns = [header(file) for file in self.files]
        latents = [_latents(f, c, self.columns[0]) for f, c in zip(self.files, self.columns, strict=True)]
        self.counts = [column.shape[0] for column in latents]
        self.labels = np.concatenate(
            [labels_of(f, c, n) for f, c, n in zip(self.files, self.columns, self.counts, strict=True)]
        )
        self.rows = sum(self.counts)
        self._starts = np.cumsum([0, *self.counts])
        classes = count_classes(self.labels, num_classes, self._name)
        channels, height, width = latents[0].shape[1:]
        self.widened = latents[0].dtype == BF16
        """Whether rows are bfloat16 in the files: they become float32."""
        self.mean, self.std = _stats(folder / STATS, channels)
        if self.mean is None and scale is None:
            raise UserError(
                f"{folder}: no {STATS} found, expected it or --scale (0.18215 for latents of an SD VAE, not normalised)"
            )
        self.header = Header(
            "samples", (channels, height, width), "float32" if self.widened else latents[0].dtype.name, classes,
            scale=1.0 if scale is None else scale, flips="latents_flip" in self.columns[0],
            latents=self._latents(channels, scale),
        )  # fmt: skip

    def _name(self, row: int) -> str:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.files[shard]}: row {row - int(self._starts[shard])}"

    def _latents(self, channels: int, scale: float | None) -> Latents:
        if self.mean is None or self.std is None:
            return raw(channels, SD_SCALE if scale == SD_SCALE else None)
        return Latents(tuple(self.mean.tolist()), tuple(self.std.tolist()))

    def scale_shift(self) -> tuple[float, float] | None:
        """Scale and shift that stand for the statistics when all channels share them, else None."""
        if self.mean is None or self.std is None:
            return self.header.scale, 0.0
        if np.ptp(self.mean) or np.ptp(self.std):
            return None
        return self.header.scale / float(self.std[0]), float(self.mean[0])

    def read(self, start: int, stop: int) -> Block:
        """Rows start to stop - 1, normalised, with their mirrored variant."""
        flip = self._variant("latents_flip", start, stop) if self.header.flips else None
        return Block(self._variant("latents", start, stop), self.labels[start:stop], flip=flip)

    def _variant(self, name: str, start: int, stop: int) -> np.ndarray:
        parts = []
        for file, columns, first, count in zip(self.files, self.columns, self._starts, self.counts, strict=False):
            low, high = max(start - int(first), 0), min(stop - int(first), count)
            if low < high:
                parts.append(read_rows(file, columns[name], low, high))
        x = widened(np.concatenate(parts))
        if self.mean is None or self.std is None:
            return x
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return ((x.astype(np.float32) - mean) / std).astype(x.dtype)


def _latents(file: Path, columns: dict[str, Column], first: dict[str, Column]) -> Column:
    """A shard's latents after a check of its tensors, against each other and against the first shard's."""
    missing = sorted({"latents", "labels", *(first.keys() & {"latents_flip"})} - columns.keys())
    if missing:
        raise UserError(f"{file}: no {missing[0]!r} tensor, found {', '.join(columns) or 'nothing'}")
    if "latents_flip" in columns and "latents_flip" not in first:
        raise UserError(f"{file}: holds 'latents_flip', expected none, as in the first shard")
    latents, labels = columns["latents"], columns["labels"]
    if latents.dtype not in (*DTYPES, BF16) or len(latents.shape) != 4 or 0 in latents.shape:
        raise UserError(
            f"{file}: latents is {latents.dtype} {latents.shape}, expected float32, float16 or bfloat16 (N, C, H, W)"
        )
    if (latents.dtype, latents.shape[1:]) != (first["latents"].dtype, first["latents"].shape[1:]):
        raise UserError(
            f"{file}: latents is {latents.dtype} {latents.shape}, expected {first['latents'].dtype} "
            f"(N, {', '.join(map(str, first['latents'].shape[1:]))}) as in the first shard"
        )
    if labels.dtype.kind not in "iu" or labels.shape != latents.shape[:1]:
        raise UserError(f"{file}: labels is {labels.dtype} {labels.shape}, expected int64 ({latents.shape[0]},)")
    flip = columns.get("latents_flip", latents)
    if (flip.dtype, flip.shape) != (latents.dtype, latents.shape):
        raise UserError(f"{file}: latents_flip is {flip.dtype} {flip.shape}, expected {latents.dtype} {latents.shape}")
    return latents


def labels_of(file: Path, columns: dict[str, Column], rows: int) -> Ids:
    """Labels `(rows,)` of a shard, of any type of integers."""
    labels = read_rows(file, columns["labels"], 0, rows)
    if labels.dtype == np.uint64 and len(labels) and labels.max() >= 2**63:
        raise UserError(f"{file}: label {labels.max()} found, expected a class's number")
    return labels.astype(np.int64)


def read_rows(file: Path, column: Column, low: int, high: int) -> np.ndarray:
    """Rows low to high - 1 of a tensor; read, not mapped: a file cut meanwhile is an error, not a crash."""
    values = int(np.prod(column.shape[1:], dtype=np.int64))
    try:
        x = np.fromfile(
            file, column.dtype, (high - low) * values, offset=column.start + low * values * column.dtype.itemsize
        )
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if len(x) != (high - low) * values:
        raise UserError(f"{file}: truncated, {len(x)} values found and {(high - low) * values} expected")
    return x.reshape(high - low, *column.shape[1:])


def _stats(path: Path, channels: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mean and std `(C,)` float32 of `latents_stats.pt`, or None twice without the file."""
    if not path.exists():
        return None, None
    import torch

    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (stats[name].float().reshape(-1).numpy() for name in ("mean", "std"))
    except Exception as error:  # a damaged pickle raises anything from IndexError to RuntimeError
        line = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path}: expected mean and std, each (1, C, 1, 1) ({type(error).__name__}: {line})") from None
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"{path}: mean and std of {len(mean)} and {len(std)} channels found, expected {channels}")
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(f"{path}: a mean or std that is not finite or a std of 0 found, expected statistics of latents")
    return mean, std
