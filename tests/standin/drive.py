"""Runs commands in one process, on the stand-in: `python drive.py CASES.json OUT.json`.

CASES.json: {name: [command, arguments ...]}, the command `lsep` or a module that has `main(arguments)`. Each begins with
a mark in the stand-in's log; OUT.json gets {name: exit code, or the traceback}. A command named `terminate:N` sends
SIGTERM to this process as soon as the run it trains has logged step N. What one case compiles does not count for the
next: torch.compile gives up on code that it compiled for many shapes.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path


def terminate(run: Path, step: int) -> None:
    """SIGTERM once `run` has logged `step`."""

    def watch() -> None:
        while True:
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            if len(lines) >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


def call(command: list[str]) -> int | str:
    name, *arguments = command
    if name.startswith("terminate:"):
        terminate(Path(arguments[arguments.index("--run-dir") + 1]), int(name.partition(":")[2]))
        name = "lsep"
    try:
        module = importlib.import_module("lsep.cli" if name == "lsep" else name)
        return int(module.main(arguments) or 0)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else str(left.code)
    except BaseException:
        return traceback.format_exc()


def main(cases: str, out: str) -> None:
    import torch

    codes = {}
    for name, command in json.loads(Path(cases).read_text()).items():
        ctypes.CDLL(None).standin_mark(name.encode())
        print(f"== {name}", file=sys.stderr, flush=True)
        codes[name] = call(command)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    Path(out).write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
