"""What the stand-in for a GPU (standin/standin.c) wrote down: launches, memory, waits, graphs and violations."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A kernel, product, copy, collective or graph that was given to a stream."""

    index: int
    """Line of the log, from 0: what happened before what."""
    pid: int
    thread: int
    device: int
    kind: str
    """kernel (of a library), triton, gemm, cudnn, solver, copy, memset, nccl, graph or host."""
    name: str
    grid: Shape
    block: Shape
    shared: int
    """Bytes of dynamic shared memory."""
    stream: int
    graph: int
    """Number of the capture it was recorded into; 0 when it ran at once."""
    ms: float
    """Assumed, not measured."""
    bytes: float
    flops: float
    label: str
    """The operator or kernel that the observer named, or -."""


@dataclass(frozen=True)
class Event:
    """Anything else: the host waited, memory was taken or given back, a capture began, something was wrong."""

    index: int
    pid: int
    thread: int
    device: int
    kind: str
    fields: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.fields)


@dataclass(frozen=True)
class Row:
    """Launches of one name, added up."""

    kind: str
    name: str
    count: int
    ms: float
    bytes: float
    flops: float


@dataclass
class Log:
    """A log in the order of its lines; several processes may have written it."""

    launches: list[Launch] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Log":
        log, places = cls(), dict[tuple[int, int], int]()  # place of a process's launch by its number
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for index, line in enumerate(lines):
            pid, thread, device, kind, *fields = line.split("\t")
            where = (index, int(pid), int(thread), int(device))
            if kind == "launch":
                places[int(pid), int(fields[0])] = len(log.launches)
                log.launches.append(_launch(where, fields[1:]))
            elif kind == "work":
                place = places[int(pid), int(fields[0])]
                ms, moved, flops = map(float, fields[1:])
                old = log.launches[place]
                log.launches[place] = replace(old, ms=old.ms + ms, bytes=moved, flops=flops)
            else:
                log.events.append(Event(*where, kind, tuple(fields)))
        return log

    def of(self, kind: str) -> list[Event]:
        """Events of a kind: sync, malloc, free, oom, graph, profiler, mark or violation."""
        return [e for e in self.events if e.kind == kind]

    @property
    def violations(self) -> list[str]:
        return [e.text for e in self.of("violation")]

    @property
    def syncs(self) -> list[Event]:
        """Times that the host waited for the device."""
        return self.of("sync")

    @property
    def pids(self) -> list[int]:
        """Processes, in the order of their first launch."""
        return list(dict.fromkeys(x.pid for x in self.launches))

    def part(self, mark: str) -> "Log":
        """What a process did from its mark of this name (`standin_mark`) to its next one, or to the end."""
        marks = self.of("mark")
        begin = next(e for e in marks if e.text == mark)
        end = next((e.index for e in marks if e.pid == begin.pid and e.index > begin.index), math.inf)

        def inside(x: Launch | Event) -> bool:
            return x.pid == begin.pid and begin.index < x.index < end

        return Log(list(filter(inside, self.launches)), list(filter(inside, self.events)))

    def peak(self, pid: int | None = None) -> int:
        """Most bytes that a process had allocated on one device at a time."""
        return max((int(e.fields[1]) for e in self.of("malloc") if pid in (None, e.pid)), default=0)

    def captures(self, pid: int | None = None) -> list[tuple[int, int, int]]:
        """(process, number, nodes) of each graph captured to its end."""
        return [
            (e.pid, int(e.fields[1]), int(e.fields[2]))
            for e in self.of("graph")
            if e.fields[0] == "end" and pid in (None, e.pid)
        ]

    def captured(self, which: int = -1, pid: int | None = None) -> list[Launch]:
        """The launches of the last captured graph, or of the `which`-th; none when there is no such graph."""
        try:
            pid, number, _ = self.captures(pid)[which]
        except IndexError:
            return []
        return [x for x in self.launches if x.pid == pid and x.graph == number]

    def replays(self, pid: int | None = None) -> list[Launch]:
        """The launches of whole graphs."""
        return [x for x in self.launches if x.kind == "graph" and pid in (None, x.pid)]

    def eager(self) -> list[Launch]:
        """The launches that were not recorded into a graph."""
        return [x for x in self.launches if not x.graph]

    def waits_between_replays(self, pid: int | None = None) -> list[Event]:
        """Waits of the thread that launches graphs, from its first launch of one to its last."""
        return self.waits_between(self.replays(pid))

    def waits_between(self, launches: Iterable[Launch]) -> list[Event]:
        """Waits from the first of these launches to the last, of the threads that made them."""
        own: dict[tuple[int, int], list[int]] = defaultdict(list)
        for x in launches:
            own[x.pid, x.thread].append(x.index)
        return [e for e in self.syncs if (at := own.get((e.pid, e.thread))) and at[0] < e.index < at[-1]]

    def budget(self, launches: Iterable[Launch] | None = None) -> list[Row]:
        """Launches (all, when none are given) added up by name, the longest first."""
        groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
        for x in self.launches if launches is None else launches:
            groups[x.kind, x.name].append(x)
        rows = [
            Row(*key, len(g), *(sum(getattr(x, f) for x in g) for f in ("ms", "bytes", "flops")))
            for key, g in groups.items()
        ]
        return sorted(rows, key=lambda row: -row.ms)

    def table(self, launches: Iterable[Launch] | None = None, rows: int = 30) -> Iterator[str]:
        """The budget as lines of text."""
        yield f"{'launches':>8} {'ms':>9} {'GB':>9} {'TFLOP':>9}  kind    name"
        for row in self.budget(launches)[:rows]:
            figures = f"{row.count:8d} {row.ms:9.3f} {row.bytes / 1e9:9.3f} {row.flops / 1e12:9.3f}"
            yield f"{figures}  {row.kind:7} {row.name[:120]}"


def _shape(text: str) -> Shape:
    x, y, z = map(int, text.split(","))
    return x, y, z


def _launch(where: tuple[int, int, int, int], fields: list[str]) -> Launch:
    kind, name, grid, block, shared, stream, graph, ms, moved, flops, label = fields
    return Launch(
        *where, kind, name, _shape(grid), _shape(block), int(shared), int(stream), int(graph), float(ms), float(moved),
        float(flops), label,
    )  # fmt: skip
