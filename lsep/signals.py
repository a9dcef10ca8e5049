"""Asking a training to stop: Ctrl-C by its user, SIGTERM or SIGUSR1 by whoever needs the machine.

All three let the step end and a checkpoint be written. A second Ctrl-C stops at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """A training has stopped for a signal other than Ctrl-C, with a checkpoint; the same command goes on."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")


@contextmanager
def heard() -> Iterator[Callable[[], int]]:
    """While inside, a function that gives the signal that asked to stop, or 0."""
    asked: list[int] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)

    def first() -> int:
        return asked[0] if asked else 0

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield first
        return
    before = {s: signal.signal(s, ask) for s in SIGNALS}
    try:
        yield first
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
