"""The engine under the loaders: threads that read the rows of coming micro-batches into a ring of buffers.

A damaged row ends the run with its file, row and id, or (`skip`) is replaced by the next in the epoch's order and
counted.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from lsep.data import order
from lsep.data.manifest import CorruptRow, Flips, Ids, Rows, Source
from lsep.data.paired import Images
from lsep.errors import UserError

_MOST_IN_A_ROW = 1000


class Buffer(NamedTuple):
    """Where a micro-batch's rows go; features only where the sequence has some."""

    x: np.ndarray
    features: np.ndarray | None = None


@dataclass(frozen=True)
class HostBatch:
    """One micro-batch in host memory; its rows are in a buffer of the ring."""

    number: int
    """Its own in the sequence."""
    rows: Buffer
    columns: Ids
    """Labels, probe labels and sample ids `(3, rows)`."""
    skipped: int
    """Damaged rows that others took the place of."""
    files: list[bytes]
    """Of the images that come with the rows; none where the sequence has no images."""
    flips: Flips | None


@dataclass(frozen=True)
class Sequence:
    """The micro-batches of steps `first` to `last - 1`, in order."""

    source: Source
    seed: int
    batch_size: int
    accumulate: int
    first: int
    last: int
    skip: bool = False
    """Replace damaged rows instead of raising."""
    rank: int = 0
    """Which of `size` processes reads; each has `accumulate` shards of the global batch."""
    size: int = 1
    features: Source | None = None
    """A second set, of which each row is read with that of `source` of the same id."""
    images: Images | None = None
    """Files of images, likewise."""

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.batch_size // (self.accumulate * self.size)

    def ids(self, i: int) -> tuple[Ids, int]:
        """Ids of micro-batch `i`, and its epoch."""
        step, part = divmod(i, self.accumulate)
        shard, shards = self.rank * self.accumulate + part, self.size * self.accumulate
        rows, step = self.source.manifest.rows, step + self.first
        epoch = step // order.steps_per_epoch(rows, self.batch_size)
        return order.batch_ids(step, rows, self.batch_size, self.seed, shard, shards), epoch

    def flips(self, ids: Ids, epoch: int) -> Flips | None:
        """Which ids are mirrored in this epoch, or None where the set has no mirror images."""
        manifest = self.source.manifest
        return order.mirrored(manifest.rows, self.seed, epoch)[ids] if manifest.flips else None

    def buffer(self, allocate: Callable[[tuple[int, ...], str], np.ndarray]) -> Buffer:
        """Memory for a micro-batch, from `allocate(shape, dtype)`."""
        sets = [s.manifest for s in (self.source, self.features) if s is not None]
        return Buffer(*(allocate((self.rows, *m.row_shape), m.dtype) for m in sets))

    def read(self, i: int, out: Buffer) -> HostBatch:
        """Micro-batch `i` into `out`."""
        ids, epoch = self.ids(i)
        skipped = 0
        try:
            rows, files = self._rows(ids, epoch, out)
        except CorruptRow:
            if not self.skip:
                raise
            skipped = self.replace(ids, epoch, self._readable)
            rows, files = self._rows(ids, epoch, out)
        columns = np.stack([rows.y, rows.probe_y, ids])
        return HostBatch(i, out, columns, skipped, files, self.flips(ids, epoch))

    def _rows(self, ids: Ids, epoch: int, out: Buffer | None = None) -> tuple[Rows, list[bytes]]:
        """Rows into `out`, if given, and the files that come with them."""
        flips = self.flips(ids, epoch)
        rows = self.source.read(ids, flips, out.x if out else None)
        if self.features is not None:
            self.features.read(ids, flips, out.features if out else None)
        return rows, self.images.read(ids) if self.images is not None else []

    def _readable(self, sample: int, epoch: int) -> bool:
        try:
            self._rows(np.array([sample]), epoch)
        except CorruptRow:
            return False
        return True

    def replace(self, ids: Ids, epoch: int, readable: Callable[[int, int], bool]) -> int:
        """Where `readable(sample, epoch)` is False put the next in order; returns how many were replaced."""
        total, skipped = self.source.manifest.rows, 0
        for place in range(len(ids)):
            if readable(int(ids[place]), epoch):
                continue
            # A source that is gone altogether must not be searched to its end.
            others = islice(order.following(int(ids[place]), total, self.seed, epoch), _MOST_IN_A_ROW)
            found = next((sample for sample in others if readable(sample, epoch)), None)
            if found is None:
                raise UserError(
                    f"{self.source.manifest.source}: sample {int(ids[place])} and the "
                    f"{min(total - 1, _MOST_IN_A_ROW)} after it in order are damaged"
                )
            ids[place] = found
            skipped += 1
        return skipped


def ring(
    sequence: Sequence,
    threads: int,
    depth: int,
    allocate: Callable[[], Buffer],
    wait: Callable[[int], None] = lambda slot: None,
    held: int = 1,
) -> Iterator[tuple[int, HostBatch, Callable[[], None]]]:
    """The micro-batches in order with their ring slot, read up to `depth` ahead by `threads` threads.

    `allocate` makes a buffer, see `Sequence.buffer`; `wait(slot)` returns once a slot's last batch has left its buffer.
    With each batch comes `refill`, to be called once, when the batch is on its way: it sends a thread to read into the
    oldest slot. The `held` newest batches are valid until the next one is asked for.
    """
    slots = min(depth, len(sequence)) + held
    buffers = [allocate() for _ in range(slots)]

    def fill(i: int) -> HostBatch:
        wait(i % slots)
        return sequence.read(i, buffers[i % slots])

    pool = ThreadPoolExecutor(threads, thread_name_prefix="lsep-reader")
    try:
        start = range(min(slots - held, len(sequence)))
        ahead: deque[Future[HostBatch]] = deque(pool.submit(fill, i) for i in start)
        for i in range(len(sequence)):

            def refill(i: int = i + slots - held) -> None:
                # The caller has asked for batch i, so the slot of batch i - held is free. Not done before it has the
                # batch: a thread that reads takes the interpreter's lock again and again, which costs the caller 3 ms.
                if i < len(sequence):
                    ahead.append(pool.submit(fill, i))

            yield i % slots, ahead.popleft().result(), refill
    finally:
        # Not joined: a slow read must not hold up an error's message.
        pool.shutdown(wait=False, cancel_futures=True)
