"""Section `soak` of `bench.chaos`: a long training of the quickstart, its memory and its speed."""

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.section import ROOT, Section
from bench.trial import Trial
from lsep.config import PRESETS
from lsep.run import Run

GROWTH = 20.0
"""MB that the process may grow by after its first minute."""
DRIFT = 0.05
"""By how much the images/s at the end may differ from those at the beginning."""


def soak(trial: Trial, section: Section) -> None:
    """`lsep train quickstart` without an end: resident memory once a second, images/s at the beginning and the end."""
    seconds, run = 60 * trial.minutes, Run(trial.folder / "run")
    part, warm = seconds / 6, seconds / 30  # of half an hour: five minutes, and one
    command = [sys.executable, "-m", "lsep", "train", "quickstart", "--train.steps", "100000000"]
    command += ["--train.device", "cpu", "--train.log-every", "10", "--run-dir", str(run.path)]
    memory: list[tuple[float, float]] = []
    with (trial.folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
    try:
        while process.poll() is None and not run.metrics():
            time.sleep(0.1)
        start = time.monotonic()
        while process.poll() is None and (now := time.monotonic() - start) < seconds:
            memory.append((now, _resident(process.pid)))
            time.sleep(min(1.0, seconds / 100))
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        if process.poll() is None:
            process.kill()
    section.check(code == 0, f"the training ended with {code}: {(trial.folder / 'log').read_text()[-400:]}")
    before = statistics.median(mb for at, mb in memory if at <= warm)
    peak = max(mb for at, mb in memory if at > warm)
    lines = [(line["seconds"], line["step"]) for line in run.metrics()]
    # Two lines at least, where steps are slow and the time is short.
    first = _rate([line for i, line in enumerate(lines) if i < 2 or line[0] <= part])
    last = _rate([line for i, line in enumerate(lines) if i >= len(lines) - 2 or line[0] >= lines[-1][0] - part])
    section.rows.append(
        {"minutes": trial.minutes, "steps": lines[-1][1], "MB after the first minute": before, "most MB since": peak,
         "images/s at first": first, "at the end": last, "drift": f"{last / first - 1:+.1%}"}
    )  # fmt: skip
    section.details["memory"] = memory[:: max(1, len(memory) // 200)]
    section.notes.append(f"Images/s of the first and the last {part / 60:g} minutes, without checkpoints and samples.")
    if not trial.quick:
        section.check(peak - before < GROWTH, f"it grew by {peak - before:.1f} MB, target under {GROWTH:.0f}")
        section.check(abs(last / first - 1) < DRIFT, f"images/s went from {first:.0f} to {last:.0f}, target 5 %")


def _resident(pid: int) -> float:
    """MB of memory that the process has in RAM."""
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration):  # it has just ended
        return 0.0
    return int(line.split()[1]) / 1024


def _rate(lines: list[tuple[float, int]]) -> float:
    """Images a second between the first and the last of (seconds, step)."""
    (begin, first), (end, last) = lines[0], lines[-1]
    return PRESETS["quickstart"].train.batch_size * (last - first) / (end - begin)
