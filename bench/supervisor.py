"""The process of `bench.gpu` that never touches the GPU: it has sections run by another, and ends that where it hangs.

A kernel that does not return can be interrupted by no thread of its own process, and a crash leaves nothing behind; so
the process that computes (`bench.worker`) tells this one what it has after every case.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection

from bench import schedule
from bench.section import Section
from bench.worker import LOST, Job, send, work

Save = Callable[[list[Section]], None]
_STARTING = 60.0
"""Seconds that a process gets to find the GPU."""
_DYING = 20.0
"""Seconds that a killed process gets to leave the GPU."""
_EVERY = 2.0
"""Seconds between two writings of the report while a section runs."""


class NoGpu(Exception):
    """There is none, and the sizes are those of one."""


class Stuck(Exception):
    """The process could not be ended: the GPU stays taken."""


class Worker:
    """A process that runs sections."""

    def __init__(self, smoke: bool, seed: int) -> None:
        context = multiprocessing.get_context("fork")  # free, where a fresh interpreter imports torch for seconds
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_begin, args=(self.connection, other, smoke, seed))
        self.process.start()
        other.close()
        device = "unknown"
        with suppress(EOFError, OSError):  # it has died, or hangs: its first section says so
            if self.connection.poll(_STARTING):
                device = json.loads(self.connection.recv_bytes())["device"]
        if device is None:
            raise NoGpu

    def stop(self) -> int | None:
        """End the process and all it started; its exit code. Raises Stuck where it does not end."""
        self.connection.close()
        self.process.join(0.5)
        for end in (os.killpg, os.kill):
            with suppress(OSError):
                end(self.process.pid or 0, signal.SIGKILL)
        self.process.join(_DYING)
        if self.process.exitcode is None:
            raise Stuck(f"the process {self.process.pid} could not be ended and holds the GPU")
        return self.process.exitcode

    def follow(self, job: Job, end: float, save: Callable[[Section], None]) -> tuple[Section, bool]:
        """Have `job` done until `end` at most; the section, and whether this process can do another.

        Where it cannot, the section has what was told before it hung or died, and that as a failure.
        """
        section, case, until = Section(**job.section), None, job.deadline + schedule.GRACE
        began = time.monotonic() - section.seconds
        saved, news, since = began, False, began
        with suppress(OSError):  # a dead one: found out below
            send(self.connection, asdict(job))
        while True:
            now = time.monotonic()
            if news and now > saved + _EVERY:
                save(section)
                saved, news = now, False
            try:
                if self.connection.poll(max(0.0, min(until, end, now + 1.0) - now)):
                    message = json.loads(self.connection.recv_bytes())
                    if "section" not in message:  # that it has found the GPU, late
                        continue
                    section, case, since = Section(**message["section"]), message["case"], now
                    until = message["until"] if case else job.deadline + schedule.GRACE
                    if case and math.isinf(until):
                        until = job.deadline + schedule.GRACE
                    if not section.running:
                        return section, True
                    news = True
                    continue
            except (EOFError, OSError):
                self.process.join(5)
                if self.process.exitcode != LOST:  # which says so itself
                    section.failures.append(f"{case or 'it'}: its process ended with {_named(self.process.exitcode)}")
                break
            section.seconds = time.monotonic() - began
            if now >= end:
                section.skipped.append(f"{case or 'the rest'}: cut off, the minutes are over")
                break
            if now >= until:
                section.failures.append(f"{case or 'it'}: not done after {now - since:.0f} s, so its process was ended")
                break
        return section, False


def _begin(theirs: Connection, own: Connection, smoke: bool, seed: int) -> None:
    theirs.close()  # or the end of the parent would go unnoticed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(BrokenPipeError):  # the parent is gone: nobody waits for results
        work(own, smoke, seed)


def _named(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def supervise(names: list[str], smoke: bool, seed: int, end: float, save: Save) -> list[Section]:
    """The sections `names` in order, until `time.monotonic()` is `end`; `save` gets what there is after each.

    Prints the plan and the progress to stderr. Raises NoGpu where there is none.
    """
    done: list[Section] = []
    worker: Worker | None = Worker(smoke, seed)
    patience = schedule.PATIENCE if smoke else 1.0
    _say(schedule.show_plan(names, end - time.monotonic(), patience))
    stuck = ""
    try:
        for i, name in enumerate(names):
            left = end - time.monotonic()
            seconds = schedule.planned(names[i:], left, patience).get(name)
            section = Section(name, running=True)
            if stuck:
                section.failures.append(stuck)
            elif seconds is None:
                section.skipped.append(schedule.left_out(name, f"{max(0.0, left):.0f} s"))
            else:
                _say(f"{name}: up to {seconds:.0f} s ...")
                limit = patience * schedule.SCHEDULE[name].case
                details = {s.name: s.details for s in done}
                job = Job(asdict(section), time.monotonic() + seconds, limit, details)
                worker = worker or Worker(smoke, seed)
                try:
                    section, worker = _whole(job, worker, smoke, seed, end, lambda s: save([*done, s]))
                except Stuck as error:
                    stuck, section, worker = *error.args, None
                    section.failures.append(stuck)
            section.running = False
            done.append(section)
            save(done)
            _say(f"{name}: {section.state}, {section.seconds:.0f} s")
    finally:
        if worker is not None:
            with suppress(Stuck):
                worker.stop()
    return done


def _whole(
    job: Job, worker: Worker, smoke: bool, seed: int, end: float, save: Callable[[Section], None]
) -> tuple[Section, Worker | None]:
    """A section to its end, by one process or, where a case ends that, by fresh ones that go on with the next case."""
    while True:
        before = len(job.section["begun"])
        section, well = worker.follow(job, end, save)
        if well:
            return section, worker
        try:
            worker.stop()
        except Stuck as error:
            raise Stuck(str(error), section) from None
        # One without cases would do all of it again, and one that comes to no further case never ends.
        if len(section.begun) == before or time.monotonic() >= min(job.deadline, end):
            return section, None
        save(section)
        worker = Worker(smoke, seed)
        job = replace(job, section=asdict(section))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
