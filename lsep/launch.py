"""How this program was started, as a line that can be typed again: `lsep ...`, or `torchrun ... -m lsep ...`."""

import os
import shlex
import sys
from pathlib import Path


def this_command() -> str:
    """The line of this process, or of torchrun, which has started it with others."""
    if Path(sys.argv[0]).name in ("lsep", "__main__.py"):
        return command(sys.argv[1:])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])  # a program that uses the package


def command(argv: list[str]) -> str:
    """`lsep *argv` as it is started here, under torchrun with as many processes and nodes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["lsep", *argv])
    local, nodes = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    start = ["torchrun", *([] if nodes == "1" else ["--nnodes", nodes]), "--nproc-per-node", local]
    # Every node has this line.
    host = os.environ.get("MASTER_ADDR", "HOST")
    meet = [] if nodes == "1" else ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:29500", "--rdzv-id", "lsep"]
    return shlex.join([*start, *meet, "-m", "--", "lsep", *argv])  # without -- torchrun takes some flags for its own
