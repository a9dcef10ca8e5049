"""Runs commands in one process, on the stand-in: `python drive.py CASES.json OUT.json`.

CASES.json: {name: [command, arguments ...]}, the command `lsep` or a module that has `main(arguments)`. Each begins
with a mark in the stand-in's log; OUT.json (of the first process of several) gets {name: exit code, or the traceback}.
A command named `terminate:N` sends SIGTERM to this process as soon as the run it trains has logged N lines; `spike:N`
is a training whose N-th logged loss is taken for a spike. What one case compiles does not count for the next:
torch.compile gives up on code that it compiled for many shapes.
"""

import ctypes
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock


def terminate(run: Path, count: int) -> None:
    """SIGTERM once `run` has logged so many lines."""

    def watch() -> None:
        while True:
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            if len(lines) >= count:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def spike(number: int) -> Iterator[None]:
    """While inside, the loss of that number is a spike: those of the stand-in are all alike."""
    from lsep.window import Spikes

    before, seen = Spikes.seen, itertools.count(1)

    def stub(self: Spikes, loss: float | None) -> float | None:
        return 1.0 if next(seen) == number else before(self, loss)

    Spikes.seen = stub  # type: ignore[method-assign]
    try:
        yield
    finally:
        Spikes.seen = before  # type: ignore[method-assign]


def believe_encoders() -> None:
    """An encoder is refused where it gives other tokens each time; values that nobody computed cannot show it."""
    import torch

    from lsep.encoder import Encoder

    before = Encoder._try

    def believed(self: Encoder, where: str) -> int:
        with mock.patch.object(torch.Tensor, "norm", lambda _: torch.zeros(())):
            return before(self, where)

    Encoder._try = believed  # type: ignore[method-assign]


def call(command: list[str]) -> int | str:
    (name, _, number), arguments, inside = command[0].partition(":"), command[1:], ExitStack()
    if name == "terminate":
        terminate(Path(arguments[arguments.index("--run-dir") + 1]), int(number))
    elif name == "spike":
        inside.enter_context(spike(int(number)))
    if number:
        name = "lsep"
    try:
        module = importlib.import_module("lsep.cli" if name == "lsep" else name)
        return int(module.main(arguments) or 0)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else str(left.code)
    except BaseException:
        return traceback.format_exc()
    finally:
        inside.close()


def main(cases: str, out: str) -> None:
    import torch

    believe_encoders()
    codes = {}
    for name, command in json.loads(Path(cases).read_text()).items():
        ctypes.CDLL(None).standin_mark(name.encode())
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        codes[name] = call(command)
        print(f"== {name}: {codes[name]!s:.20} after {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
