"""Many processes as one run: joining the group, averages, agreement, and who is to blame when one hangs.

`torchrun` starts the processes and names them in the environment; PyTorch's process groups do the rest. Every process
has its shard of the global batch, so that losses, gradients and weights are those of one process but for rounding.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lsep.config import Config, DistConfig
from lsep.errors import UserError

T = TypeVar("T")
EXIT_HUNG = 3
"""Exit code of a process that gave up on another."""
_PULSE = 1.0
"""Seconds between two signs of life."""
_GRACE = 30.0
"""Seconds beyond the collectives' own timeout after which a process gives up by itself."""
_TRY = timedelta(seconds=2)
"""How long an address is tried that may be an old one."""
_LOST = ("Timed out", "timed out", "timeout", "Connection closed", "Connection reset", "Broken pipe", "NCCL")
"""Words in the errors of gloo and NCCL when another process is late or gone."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """(replicate, shard) of `hsdp`, (shard,) of `fsdp`; None for one process and for `ddp`."""
    host: "dist.ProcessGroup | None" = None
    """A gloo group for what the hosts say to one another."""
    watch: "Watch | None" = None

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def on_main(self, call: Callable[[], T]) -> T:
        """What `call` returns on the first process, on all; a UserError there ends all, with one message."""
        if self.size == 1:
            return call()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = call()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.host)
        if box[1] is not None:
            self._end(box[1])
        return box[0]

    def together(self, call: Callable[[], T]) -> T:
        """What `call` returns here; a UserError on any process ends all, with one message."""
        if self.size == 1:
            return call()
        result, problem = None, None
        try:
            result = call()
        except UserError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, problem, group=self.host)
        if any(problems):
            rank = next(r for r, text in enumerate(problems) if text)
            self._end(problems[rank] if len(set(problems)) == 1 else f"rank {rank}: {problems[rank]}")
        return cast(T, result)

    def _end(self, text: str | None) -> None:
        """The first process says it; the others end without a word of their own."""
        if self.main:
            raise UserError(text)
        raise SystemExit(2)

    def least(self, value: int) -> int:
        """The smallest `value` of all processes."""
        if self.size == 1:
            return value
        values = [0] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return min(values)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.host)

    def at(self, place: str) -> None:
        """Tell the others where this process is, for the message about one that hangs."""
        if self.watch is not None:
            self.watch.at(place)


def launched() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def world(config: Config, device: torch.device) -> Iterator[World]:
    """Join the other processes of the run, if there are any, and leave them at the end.

    A caller that has joined them already stays joined.
    """
    size, settings = launched(), config.dist
    if size == 1:
        if settings.mode == "hsdp":
            raise UserError("--dist.mode is 'hsdp', but this is the only process: start it with torchrun")
        yield World(device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device.type == "cuda"
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} GPUs: expected at most one "
                "process a GPU (torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    replicas = _replicas(settings, size)
    timeout = timedelta(seconds=settings.timeout)
    joined = dist.is_initialized()
    if not joined:
        backend, store = "cpu:gloo,cuda:nccl" if cuda else "gloo", _fresh_store(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank(), world_size=size)
    mesh = None
    if settings.mode == "fsdp":
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    elif settings.mode == "hsdp":
        mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    watch = Watch(rank(), size, settings.timeout)
    host = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # every rank is in it
    try:
        yield World(device, rank(), size, mesh, host, watch)
    except RuntimeError as error:  # what a collective raises when its peers are late or gone
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise UserError(f"rank {rank()}: {watch.explain()} ({_first_line(error)})") from error
    watch.stop()
    if not joined:
        dist.destroy_process_group()  # not after an error: the others may never answer


def _fresh_store(timeout: timedelta) -> dist.TCPStore:
    """A store of these processes alone, kept by the first of them.

    torchrun's own outlives a restart of its processes, and in it the addresses of the dead ones, which the new ones
    would call. It only tells where the new store is; what is no store, or one joined before, is an old entry.
    """
    common, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    host, key = os.environ["MASTER_ADDR"], "lsep/store"
    if rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        common.set(key, str(store.port))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(common.get(key))
        with suppress(dist.DistError):
            store = dist.TCPStore(host, port, is_master=False, timeout=_TRY, wait_for_workers=False)
            if store.add(f"joined/{rank()}", 1) == 1:
                store.set_timeout(timeout)
                return store
        if time.monotonic() > end:
            raise UserError(f"rank {rank()}: the first process is not at {host}:{port} after {timeout.seconds} s")
        time.sleep(0.1)


def _replicas(settings: DistConfig, size: int) -> int:
    """Groups of `hsdp` that hold all weights each."""
    if settings.mode != "hsdp":
        if settings.replicate is not None:
            raise UserError(f"--dist.replicate is for --dist.mode hsdp, and the mode is {settings.mode!r}")
        return 1
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    replicas = settings.replicate or size // per_node
    if replicas < 1 or size % replicas:
        raise UserError(f"--dist.replicate is {replicas}, expected a divisor of the {size} processes")
    return replicas


class Agreement:
    """Whether any process has asked to stop: all learn it at the same step, one after it was asked, without waiting."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.flag = torch.zeros((), dtype=torch.int64)
        self.work: dist.Work | None = None

    def __call__(self, asked: int) -> int:
        """The largest number that any process has given, 0 is none; to be called once a step by every process."""
        if self.world.size == 1:
            return asked
        agreed = self.close()
        if not agreed:
            self.flag.fill_(asked)
            self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.world.host, async_op=True)
        return agreed

    def close(self) -> int:
        """Wait for the exchange under way, if there is one; its outcome."""
        if self.work is None:
            return 0
        self.work.wait()
        self.work = None
        return int(self.flag)


class Watch:
    """Says which process does not answer, when a collective ends in an error or a process stands still.

    A thread of every process writes into the store they share where it is and since when; a stopped process stops
    writing. The collectives' timeout ends the wait where PyTorch can; the thread does, a little later, where it cannot.
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.store = dist.distributed_c10d._get_default_store()
        self.place, self.since = "start", time.time()
        self.stopped = threading.Event()
        self.write()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def at(self, place: str) -> None:
        """This process is at `place` from now on."""
        self.place, self.since = place, time.time()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def write(self) -> None:
        self.store.set(f"lsep/{self.rank}", json.dumps([self.place, self.since, time.time()]))

    def _run(self) -> None:
        while not self.stopped.wait(_PULSE):
            try:
                self.write()
            except RuntimeError:  # the store is gone: the run is ending
                return
            if time.time() - self.since > self.timeout + _GRACE:
                print(f"lsep: error: rank {self.rank}: {self.explain()}", file=sys.stderr, flush=True)
                os._exit(EXIT_HUNG)

    def explain(self) -> str:
        """One sentence on the processes that do not answer, and where they were last."""
        time.sleep(3 * _PULSE)  # a process that has just died has just been heard
        now = time.time()
        silent, there = [], {}
        for rank in set(range(self.size)) - {self.rank}:
            try:
                place, since, heard = json.loads(self.store.get(f"lsep/{rank}"))
            except (RuntimeError, ValueError):
                return "the process that holds the store (rank 0) is gone"
            there[rank] = (place, since)
            if now - heard > 3 * _PULSE:
                silent.append(f"rank {rank} has not been heard of for {now - heard:.0f} s, it was last at {place}")
        mine = f"waited {now - self.since:.0f} s at {self.place}"
        if silent:
            return f"{mine}: {'; '.join(silent)}"
        others = [f"rank {rank} is at {place}" for rank, (place, _) in there.items() if place != self.place]
        return f"{mine}: all others answer, {'; '.join(others) or 'and are there too'}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
