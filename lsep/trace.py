"""Reads a Chrome trace of torch's profiler: the time of a window by room, and in each room by kernel or operator.

On a CPU the time is that of operators without what they call (their self time), on a GPU that of its kernels. The room
of either is the innermost range around it (`lsep.ranges`); in the backward pass, the room of the forward operator that
the sequence number names. Where no range says it, inside `torch.compile` and CUDA graphs, the name decides.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsep.errors import UserError

WINDOW = "window"
"""The range around all that is counted."""
ROOMS = (
    "attention",
    "MLP",
    "adaLN",
    "probe",
    "align",
    "interpolant",
    "losses",
    "optimizer",
    "data",
    "compiled",
    "other",
    "idle",
)
"""In the order of the table. compiled: what is in a graph and has no telling name; idle: of a GPU."""

_ROOM_OF_RANGE = {
    r: r for r in ("attention", "MLP", "adaLN", "probe", "align", "interpolant", "losses", "optimizer", "data")
}
_ROOM_OF_RANGE |= {"embedding": "other", "final layer": "other", "down": "other", "mid": "other", "up": "other"}
_ROOM_OF_NAME = [
    (re.compile(pattern, re.IGNORECASE), room)
    for pattern, room in (
        (r"attention|fmha|flash|sdpa", "attention"),
        # Nine tenths of the bytes of the sums over rows are adaLN's, the others the MLP's.
        (r"adaln|norm_modulate|layer_norm|row_sums", "adaLN"),
        (r"token_pool|_probe_|::probe_|_windows_kernel|lsep::windows", "probe"),
        (r"_interpolate_|::interpolate|_(uniform|normal)_kernel|lsep::(uniform|normal)", "interpolant"),
        (r"velocity_loss", "losses"),
        (r"norm_pass|update_pass|adam|multi_tensor", "optimizer"),
        (r"memcpy htod", "data"),
        (r"gelu|::mlp|::fp8_mlp", "MLP"),
        # fp8's quantisers are where the products are that they serve, the MLP's and attention's alike.
        (r"gemm|nvjet|cutlass|xmma|cublas|::(mm|addmm|bmm|baddbmm|_scaled_mm)$|quantize|::fp8_linear", "compiled"),
        (r"^triton_|cpp_fused", "compiled"),
    )
]
_BACKWARD = "autograd::engine::evaluate_function: "
_GRAPH = "## Call CompiledFxGraph"
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCH = {"cuda_runtime", "cuda_driver"}
_HOST = {"cpu_op", "user_annotation"} | _LAUNCH


@dataclass
class Item:
    """All calls of one kernel or operator in one room."""

    room: str
    name: str
    us: float = 0.0
    calls: int = 0


@dataclass
class Profile:
    """Where the time of a window went; the times of the items add up to `us`."""

    us: float
    items: list[Item]

    def room(self, name: str) -> list[Item]:
        """Its items, the longest first."""
        return sorted((i for i in self.items if i.room == name), key=lambda i: -i.us)


@dataclass
class _Event:
    name: str
    category: str
    start: float
    end: float
    args: dict[str, Any]
    thread: tuple[Any, Any]
    room: str | None = None
    inner: float = 0.0
    """Time of the events directly inside."""


def read(path: Path) -> Profile:
    """The profile of the trace in `path`; raises UserError for a file without the range `window`."""
    raw = json.loads(path.read_bytes())["traceEvents"]
    events = [
        _Event(e["name"], e["cat"], e["ts"], e["ts"] + e["dur"], e.get("args", {}), (e["pid"], e["tid"]))
        for e in raw
        if e.get("ph") == "X" and e.get("cat") in _HOST | _DEVICE
    ]
    window = next((e for e in events if e.category == "user_annotation" and e.name == WINDOW), None)
    if window is None:
        raise UserError(f"{path}: no range {WINDOW!r}, expected a trace of lsep profile")
    host = [e for e in events if e.category in _HOST and e.thread == window.thread and _within(e, window)]
    _nest(host)
    found: dict[tuple[str, str], Item] = {}
    kernels = [e for e in events if e.category in _DEVICE]
    timed = _device_times(kernels, host) if kernels else ((e, e.end - e.start - e.inner) for e in host)
    for event, us in timed:
        # The time of a range outside of operators is Python's, and the profiler's own.
        name = "(Python)" if event.category == "user_annotation" else event.name
        room = _room(event.room, name)
        item = found.setdefault((room, name), Item(room, name))
        item.us += us
        item.calls += 1
    length = window.end - window.start
    if kernels:
        found["idle", "idle"] = Item("idle", "(no kernel runs)", length - sum(i.us for i in found.values()))
    return Profile(length, list(found.values()))


def _within(event: _Event, window: _Event) -> bool:
    return event.start >= window.start and event.end <= window.end + 0.01


def _nest(host: list[_Event]) -> None:
    """Give the events of one thread their rooms and the time inside them, in place."""
    forward: dict[int, str | None] = {}
    stack: list[_Event] = []
    host.sort(key=lambda e: (e.start, -e.end, e.category != "user_annotation"))
    for event in host:
        while stack and event.start >= stack[-1].end:
            stack.pop()
        if stack:
            stack[-1].inner += min(event.end, stack[-1].end) - event.start
            event.room = stack[-1].room
        sequence = event.args.get("Sequence number")
        if event.category == "user_annotation":
            event.room = _ROOM_OF_RANGE.get(event.name, event.room)
        elif event.name.startswith(_GRAPH):
            event.room = event.room or "compiled"
        elif event.name.startswith(_BACKWARD):
            event.room = forward.get(sequence) if sequence is not None else None
        elif sequence is not None and not any(e.name.startswith(_BACKWARD) for e in stack):
            forward[sequence] = event.room  # of several the last: the operator that made the node
        stack.append(event)


def _device_times(kernels: list[_Event], host: list[_Event]) -> Iterator[tuple[_Event, float]]:
    """The kernels with their rooms and times; where n of them run at once, each is charged an n-th."""
    launches = {
        e.args["correlation"]: e
        for e in host
        if e.category in _LAUNCH and "correlation" in e.args and "GraphLaunch" not in e.name
    }
    edges = []
    for place, kernel in enumerate(kernels):
        launch = launches.get(kernel.args.get("correlation"))
        kernel.room = launch.room if launch else None
        edges += [(kernel.start, place, True), (kernel.end, place, False)]
    times, running, before = [0.0] * len(kernels), set[int](), 0.0
    for at, place, starts in sorted(edges):
        for i in running:
            times[i] += (at - before) / len(running)
        running.add(place) if starts else running.discard(place)
        before = at
    yield from zip(kernels, times, strict=True)


def _room(of_range: str | None, name: str) -> str:
    if of_range not in (None, "compiled"):
        return of_range
    return next((room for pattern, room in _ROOM_OF_NAME if pattern.search(name)), of_range or "other")
