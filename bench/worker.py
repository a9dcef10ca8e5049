"""The process of `bench.gpu` that uses the GPU: it runs sections and tells its parent how far it is.

It is forked, which costs nothing, and may hang or die: its parent (`bench.supervisor`) then has all that was told, ends
it and has the rest done by a fresh one.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.section import ROOT, Context, GpuLost, Section

Run = Callable[[Context, Section], None]
LOST = 75
"""Exit code of a process that cannot use the GPU any more, or finds none."""


@dataclass(frozen=True)
class Job:
    """A section to run, maybe from where a former process left it."""

    section: dict[str, Any]
    """`asdict` of it."""
    deadline: float
    """Value of `time.monotonic()`, which all processes share, at which no further case begins."""
    case_limit: float
    """Seconds after which a case counts as hanging."""
    details: dict[str, dict[str, Any]]
    """Of the sections before."""


def sections() -> dict[str, Run]:
    """All of them by name."""
    from bench.candidates import candidates
    from bench.compiled import compiled
    from bench.kernel_checks import correctness, determinism
    from bench.kernel_times import kernels
    from bench.machine import machine
    from bench.pretraining import pretraining
    from bench.sanitizer import csrc
    from bench.step_table import step, variants
    from bench.training import training

    found: list[Run] = [
        machine, step, compiled, correctness, determinism, kernels, csrc, training, candidates, variants, pretraining,
    ]  # fmt: skip
    return {function.__name__: function for function in found}


def prepare(smoke: bool) -> torch.device | None:
    """The device; None where there is no GPU to run on. Comes before any import of the kernels."""
    if importlib.util.find_spec("lsep_kernels") is None:  # run from a tree that was not installed
        sys.path.append(str(ROOT / ".ci" / "typings"))
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not smoke:
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def work(connection: Connection, smoke: bool, seed: int) -> None:
    """Run the jobs that come over `connection`, one after the other, until there is none."""
    os.setsid()  # so that whoever ends this process ends its compilers too
    device = prepare(smoke)
    send(connection, {"device": None if device is None else device.type})
    if device is None:
        sys.exit(LOST)
    context = Context(device, smoke, seed)
    known = sections()
    while True:
        try:
            job = Job(**json.loads(connection.recv_bytes()))
        except EOFError:
            return
        section = Section(**job.section)
        context.deadline, context.case_limit, context.details = job.deadline, job.case_limit, job.details
        measured = job.details.get("machine", {})
        context.copy_rate = measured.get("copy_rate", math.nan)
        context.matrix_rate = measured.get("matrix_rate", math.nan)
        run_one(known[section.name], context, section, connection)


def run_one(function: Run, context: Context, section: Section, connection: Connection) -> None:
    """One section, with its time; where it raises an error, with that and what it had so far."""
    start, before = time.monotonic(), section.seconds
    section.running = True

    def tell(section: Section, case: str | None, until: float) -> None:
        section.seconds = before + time.monotonic() - start
        send(connection, {"section": asdict(section), "case": case, "until": until})

    context.tell = tell
    tell(section, None, math.inf)
    lost = False
    try:
        function(context, section)
        context.synchronize()
    except GpuLost as error:
        lost = True
        case = f" {section.begun[-1]}" if section.begun else ""
        section.failures.append(f"after{case} the GPU could not be used any more by its process ({error})")
    except Exception as error:
        section.fail("it ended early", error)
        lost = _lost(context)
    section.running = lost  # the rest is for a fresh process
    tell(section, None, math.inf)
    if lost:
        sys.exit(LOST)
    context.free()


def _lost(context: Context) -> bool:
    try:
        context.synchronize()
    except GpuLost:
        return True
    return False


def send(connection: Connection, message: dict[str, Any]) -> None:
    """`message` as JSON, so that half of it cannot be taken for the whole."""
    connection.send_bytes(json.dumps(message, default=str).encode())
