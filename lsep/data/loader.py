"""From ids to batches on the device. One interface, three ways, bit-identical batches:

    torch     the ring of `reader`, pinned buffers and asynchronous copies by torch
    dali      the same ring handed to NVIDIA DALI's external source
    resident  the whole set in the device's memory, rows gathered there

A loader has no state of its own: the batch of a step is a function of (seed, step), see `order`.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep.config import DataConfig
from lsep.data.digits import open_digits
from lsep.data.manifest import CorruptRow, Flips, Ids, Rows, Source
from lsep.data.reader import HostBatch, Sequence, ring
from lsep.data.store import Store
from lsep.errors import UserError, one_line, shown

_SMALL = 64 << 20  # bytes; a larger set is not copied into the host's memory unasked


class Batch(NamedTuple):
    """A micro-batch on the device: x `(B, *row_shape)`, labels y and probe_y and sample ids `(B,)` int64.

    Valid until the next step's batches are asked for: its memory is used again then.
    """

    x: Tensor
    y: Tensor
    probe_y: Tensor
    id: Tensor


def open_source(config: DataConfig) -> Source:
    """The data set at `--data.path`: a store's folder, or `digits`."""
    if config.path is None:
        raise UserError("--data.path is missing, expected the folder of a store (with manifest.json) or 'digits'")
    if not one_line(config.path):
        raise UserError(f"--data.path is {shown(config.path)}, expected a path in one line")
    if config.path == "digits":
        return open_digits()
    return Store(config.path, check_rows=config.crc)


class Loader:
    """Iterates over steps, each a list of micro-batches; `skipped` counts the damaged rows replaced so far."""

    def __init__(self, sequence: Sequence, config: DataConfig, device: torch.device) -> None:
        self.sequence, self.config, self.device = sequence, config, device
        self.kind = choose(config, sequence.source, device)
        self.skipped = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = {"torch": self._torch, "dali": self._dali, "resident": self._resident}[self.kind]()
        for _ in range(self.sequence.first, self.sequence.last):
            yield [next(batches) for _ in range(self.sequence.accumulate)]

    def _torch(self) -> Iterator[Batch]:
        manifest, cuda = self.sequence.source.manifest, self.device.type == "cuda"
        buffers: list[Tensor] = []
        copied: dict[int, torch.cuda.Event] = {}

        def allocate() -> np.ndarray:
            shape = (self.sequence.rows, *manifest.row_shape)
            buffers.append(torch.empty(shape, dtype=getattr(torch, manifest.dtype), pin_memory=cuda))
            return buffers[-1].numpy()

        def wait(slot: int) -> None:
            if slot in copied:
                copied[slot].synchronize()

        threads, depth = self.config.threads, self.config.prefetch
        for slot, host, refill in ring(self.sequence, threads, depth, allocate, wait, self.sequence.accumulate):
            x = self._to_device(buffers[slot])
            if self.stream is not None:
                copied[slot] = self.stream.record_event()
            batch = self._labelled(x, host)
            refill()
            yield batch

    def _dali(self) -> Iterator[Batch]:
        from lsep.data.dali import batches

        for x, host in batches(self.sequence, self.config.threads, self.config.prefetch, self.device):
            yield self._labelled(x, host)

    def _labelled(self, x: Tensor, host: HostBatch) -> Batch:
        self.skipped += host.skipped
        return Batch(x, *self._columns(host.columns))

    def _columns(self, columns: Ids) -> tuple[Tensor, ...]:
        """Rows of `columns` on the device, in one copy."""
        together = torch.from_numpy(columns)
        return self._to_device(together.pin_memory() if self.stream is not None else together).unbind(0)

    def _to_device(self, pinned: Tensor) -> Tensor:
        """A copy. Neither the host waits for it nor it for the step before, which the device still runs."""
        if self.stream is None:
            return pinned.to(self.device)
        with torch.cuda.stream(self.stream):
            copy = pinned.to(self.device, non_blocking=True)
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self.stream)
        copy.record_stream(step)  # its memory goes to no other copy before the step has read it
        return copy

    def _resident(self) -> Iterator[Batch]:
        rows = self.sequence.source.manifest.rows
        x, y, probe_y, bad = load_all(self.sequence.source, self.sequence.skip, self.device)

        def readable(sample: int, epoch: int) -> bool:
            flips = self.sequence.flips(np.array([sample]), epoch)
            return not bad[sample if flips is None else sample + rows * int(flips[0])]

        for i in range(len(self.sequence)):
            ids, epoch = self.sequence.ids(i)
            if bad.any():
                self.skipped += self.sequence.replace(ids, epoch, readable)
            flips = self.sequence.flips(ids, epoch)
            place, there = self._columns(np.stack([ids if flips is None else ids + flips * rows, ids]))
            yield Batch(x[place], y[there], probe_y[there], there)


def load_all(source: Source, skip: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """All rows on the device, mirrored ones behind them, and both label columns `(rows,)`.

    The last array marks damaged rows, which `skip` leaves out instead of raising CorruptRow; like x it has one entry a
    row and variant.
    """
    m = source.manifest
    total = m.rows * (1 + m.flips)
    x = torch.empty((total, *m.row_shape), dtype=getattr(torch, m.dtype), device=device)
    labels, bad = np.zeros((2, m.rows), np.int64), np.zeros(total, bool)

    def put(ids: Ids, flips: Flips | None, place: Ids) -> None:
        try:
            rows: Rows = source.read(ids, flips)
        except CorruptRow:
            if not skip:
                raise
            if len(ids) == 1:
                bad[place] = True
                return
            for i in range(len(ids)):
                put(ids[i : i + 1], None if flips is None else flips[i : i + 1], place[i : i + 1])
            return
        x[int(place[0]) : int(place[-1]) + 1] = torch.from_numpy(rows.x).to(device)
        labels[:, ids] = rows.y, rows.probe_y

    for variant in range(1 + m.flips):
        for start in range(0, m.rows, 4096):
            ids = np.arange(start, min(start + 4096, m.rows))
            put(ids, np.full(len(ids), variant == 1) if m.flips else None, ids + variant * m.rows)
    y, probe_y = torch.from_numpy(labels).to(device).unbind(0)
    return x, y, probe_y, bad


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def choose(config: DataConfig, source: Source, device: torch.device) -> str:
    """The loader behind `--data.loader`; auto: resident where the set fits, else DALI on a GPU, else torch."""
    if config.loader == "dali" and not has_dali():
        raise UserError("--data.loader dali needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130")
    if config.loader != "auto":
        return config.loader
    manifest, cuda = source.manifest, device.type == "cuda"
    needed = manifest.rows * (1 + manifest.flips) * manifest.row_bytes
    free = torch.cuda.mem_get_info(device)[0] if cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # On a GPU a quarter: the model has not shown yet what it needs.
    if needed <= (free // 4 if cuda else min(free // 2, _SMALL)):
        return "resident"
    return "dali" if cuda and has_dali() else "torch"
