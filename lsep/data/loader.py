"""From ids to batches on the device. One interface, three ways, bit-identical batches:

    torch     the ring of `reader`, pinned buffers and asynchronous copies by torch
    dali      the same ring handed to NVIDIA DALI's external source
    resident  the whole set in the device's memory, rows gathered there

A loader has no state of its own: the batch of a step is a function of (seed, step), see `order`. What comes with the
rows (`paired`) goes the same way: features as rows of a second set, images through DALI's decoder to an encoder.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep.config import DataConfig
from lsep.data.digits import open_digits
from lsep.data.manifest import CorruptRow, Flips, Ids, Rows, Source
from lsep.data.paired import Images
from lsep.data.reader import Buffer, HostBatch, Sequence, ring
from lsep.data.store import Store
from lsep.errors import UserError, one_line, shown

INSTALL = "pip install nvidia-dali-cuda130"
_SMALL = 64 << 20  # bytes; a larger set is not copied into the host's memory unasked


class Batch(NamedTuple):
    """A micro-batch on the device: x `(B, *row_shape)`, labels y and probe_y and sample ids `(B,)` int64, and where
    tokens are aligned an encoder's, `(B, T, E)`.

    Valid until the next step's batches are asked for: its memory is used again then.
    """

    x: Tensor
    y: Tensor
    probe_y: Tensor
    id: Tensor
    tokens: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [t for t in self if t is not None]

    def clone(self) -> "Batch":
        return Batch(*(t.clone() for t in self.tensors()))


Encode = Callable[[Tensor], Tensor]
"""From images `(B, C, H, W)` uint8 to tokens `(B, T, E)`, both on the device."""


def open_source(config: DataConfig, flag: str = "--data.path ") -> Store:
    """The data set at `--data.path`: a store's folder, or `digits`. `flag` stands before the path in messages."""
    if config.path is None:
        raise UserError("--data.path is missing, expected the folder of a store (with manifest.json) or 'digits'")
    if not one_line(config.path):
        raise UserError(f"{flag}is {shown(config.path)}, expected a path in one line")
    if config.path == "digits":
        return open_digits()
    if not (Path(config.path) / "manifest.json").exists():
        raise UserError(f"{flag}{config.path}: no manifest.json there, expected a store or 'digits'")
    store = Store(config.path, check_rows=config.crc)
    if store.manifest.kind == "features":
        raise UserError(f"{flag}{config.path}: a store of features, expected images or latents")
    return store


class Loader:
    """Iterates over steps, each a list of micro-batches; `skipped` counts the damaged rows replaced so far."""

    def __init__(
        self,
        sequence: Sequence,
        config: DataConfig,
        device: torch.device,
        encode: Encode | None = None,
        image_size: int = 0,
        step_bytes: int = 0,
    ) -> None:
        """encode: what makes tokens of the batch's images, its own pixels or those of `sequence.images`, which are
        brought to squares of image_size. step_bytes: what torch's allocator holds on a GPU while a step runs, 0 where
        that is not known."""
        self.sequence, self.config, self.device = sequence, config, device
        self.encode, self.image_size = encode, image_size
        images = sequence.images is not None
        self.kind = choose(config, sequence.source, device, sequence.features, images, step_bytes)
        self.skipped = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = {"torch": self._torch, "dali": self._dali, "resident": self._resident}[self.kind]()
        for _ in range(self.sequence.first, self.sequence.last):
            yield [next(batches) for _ in range(self.sequence.accumulate)]

    def _torch(self) -> Iterator[Batch]:
        cuda = self.device.type == "cuda"
        buffers: list[list[Tensor]] = []
        copied: dict[int, torch.cuda.Event] = {}

        def allocate() -> Buffer:
            pinned: list[Tensor] = []

            def one(shape: tuple[int, ...], dtype: str) -> np.ndarray:
                pinned.append(torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=cuda))
                return pinned[-1].numpy()

            buffers.append(pinned)
            return self.sequence.buffer(one)

        def wait(slot: int) -> None:
            if slot in copied:
                copied[slot].synchronize()

        threads, depth = self.config.threads, self.config.prefetch
        finish = self._finisher()
        for slot, host, refill in ring(self.sequence, threads, depth, allocate, wait, self.sequence.accumulate):
            rows = [self._to_device(t) for t in buffers[slot]]
            if self.stream is not None:
                copied[slot] = self.stream.record_event()
            batch = finish(rows, host)
            refill()
            yield batch

    def _dali(self) -> Iterator[Batch]:
        from lsep.data.dali import batches

        finish = self._finisher()
        for rows, host in batches(self.sequence, self.config.threads, self.config.prefetch, self.device):
            yield finish(rows, host)

    def _finisher(self) -> Callable[[list[Tensor], HostBatch], Batch]:
        """From rows on the device, of one set or two, and the rest on the host to a batch."""
        images = self.sequence.images
        decode = None if images is None else self._decoder(images)

        def finish(rows: list[Tensor], host: HostBatch) -> Batch:
            pictures = rows[0]
            if decode is not None:
                rows, host, pictures = decode(rows, host)
            self.skipped += host.skipped
            return self._batch(rows, self._columns(host.columns), pictures)

        return finish

    def _decoder(self, images: Images) -> Callable[[list[Tensor], HostBatch], tuple[list[Tensor], HostBatch, Tensor]]:
        """Adds the images that belong to a batch, which is another one where an image cannot be decoded (`skip`)."""
        from lsep.data.dali import Decoder, Undecodable

        sequence = self.sequence
        decoder = Decoder(sequence.rows, self.image_size, self.config.threads, self.device)

        def decode(rows: list[Tensor], host: HostBatch) -> tuple[list[Tensor], HostBatch, Tensor]:
            def sample(place: int) -> int:
                return int(host.columns[2][place])

            while True:
                try:
                    return rows, host, decoder(host.files, host.flips, lambda place: images.path(sample(place)))
                except Undecodable as error:
                    images.give_up(sample(error.place), str(error))
                # Read again, which raises or passes it over like any damaged row: so rarely that it may take its time.
                buffer = sequence.buffer(np.empty)
                host = sequence.read(host.number, buffer)
                rows = [torch.from_numpy(part).to(self.device) for part in buffer if part is not None]

        return decode

    def _batch(self, rows: list[Tensor], columns: tuple[Tensor, ...], images: Tensor) -> Batch:
        batch = Batch(rows[0], *columns)
        if self.encode is not None:
            return batch._replace(tokens=self.encode(images))
        return batch if len(rows) == 1 else batch._replace(tokens=rows[1].flatten(2).transpose(1, 2))

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
        rows, features = self.sequence.source.manifest.rows, self.sequence.features
        x, y, probe_y, bad = load_all(self.sequence.source, self.sequence.skip, self.device)
        sets = [x]
        if features is not None:
            more, _, _, damaged = load_all(features, self.sequence.skip, self.device)
            sets, bad = [x, more], bad | damaged

        def readable(sample: int, epoch: int) -> bool:
            flips = self.sequence.flips(np.array([sample]), epoch)
            return not bad[sample if flips is None else sample + rows * int(flips[0])]

        for i in range(len(self.sequence)):
            ids, epoch = self.sequence.ids(i)
            if bad.any():
                self.skipped += self.sequence.replace(ids, epoch, readable)
            flips = self.sequence.flips(ids, epoch)
            place, there = self._columns(np.stack([ids if flips is None else ids + flips * rows, ids]))
            found = [s[place] for s in sets]
            yield self._batch(found, (y[there], probe_y[there], there), found[0])


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


def choose(
    config: DataConfig,
    source: Source,
    device: torch.device,
    features: Source | None = None,
    images: bool = False,
    step_bytes: int = 0,
) -> str:
    """The loader behind `--data.loader`; auto: resident where all sets fit, else DALI on a GPU, else torch.

    On a GPU they must leave a step its `step_bytes`, see `Loader`.
    """
    if config.loader == "dali" and not has_dali():
        raise UserError(f"--data.loader dali needs NVIDIA DALI, which is not installed: {INSTALL}")
    if images and config.loader == "resident":
        raise UserError("--data.loader resident keeps no images for --align.images, expected auto, torch or dali")
    if config.loader != "auto":
        return config.loader
    cuda = device.type == "cuda"
    sets = [s.manifest for s in (source, features) if s is not None]
    needed = sum(m.rows * (1 + m.flips) * m.row_bytes for m in sets)
    if cuda:
        free = torch.cuda.mem_get_info(device)[0]
        # Where nobody knows what the step needs a quarter, else what it leaves, but for samples and what else may come.
        room = (free - max(0, step_bytes - torch.cuda.memory_reserved(device))) // 2 if step_bytes else free // 4
    else:
        room = min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, _SMALL)
    if not images and needed <= room:
        return "resident"
    return "dali" if cuda and has_dali() else "torch"
