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
from lsep.presets import PRESETS
from lsep.run import Run

GROWTH = 20.0
"""MB that the process may grow by after its first minute."""
DRIFT = 0.05
"""By how much the images/s at the end may differ from those at the beginning."""


def soak(trial: Trial, section: Section) -> None:
    """`lsep train quickstart` without an end: its memory, images/s at the beginning and the end.

    Peaks are compared with peaks (VmHWM) and medians with medians: what is resident at a moment swings with sample
    grids, checkpoints and what the system takes back, by more than is looked for.
    """
    seconds, run = 60 * trial.minutes, Run(trial.folder / "run")
    part, warm = seconds / 6, seconds / 30  # of half an hour: five minutes, and one
    command = [sys.executable, "-m", "lsep", "train", "quickstart", "--train.steps", "100000000"]
    command += ["--train.device", "cpu", "--train.log-every", "10", "--run-dir", str(run.path)]
    memory: list[tuple[float, float, float]] = []
    with (trial.folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
    try:
        while process.poll() is None and len(run.metrics()) < 2:
            time.sleep(0.1)
        start = time.monotonic()
        while process.poll() is None and (now := time.monotonic() - start) < seconds:
            memory.append((now, *_memory(process.pid)))
            time.sleep(min(1.0, seconds / 100))
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        if process.poll() is None:
            process.kill()
    section.check(code == 0, f"the training ended with {code}: {(trial.folder / 'log').read_text()[-400:]}")
    before = max(peak for at, _, peak in memory if at <= warm)
    peak = max(peak for *_, peak in memory)
    end = memory[-1][0]
    usual = statistics.median(mb for at, mb, _ in memory if warm <= at <= warm + part)
    finally_ = statistics.median(mb for at, mb, _ in memory if at >= end - part)
    lines = [(line["seconds"], line["step"]) for line in run.metrics()]
    # Two lines at least, where steps are slow and the time is short.
    first = _rate([line for i, line in enumerate(lines) if i < 2 or line[0] <= part])
    last = _rate([line for i, line in enumerate(lines) if i >= len(lines) - 2 or line[0] >= lines[-1][0] - part])
    section.rows.append(
        {"minutes": trial.minutes, "steps": lines[-1][1], "peak MB, first minute": before, "whole run": peak,
         "median MB at first": usual, "finally": finally_, "images/s at first": first, "at the end": last,
         "drift": f"{last / first - 1:+.1%}"}
    )  # fmt: skip
    section.details["memory"] = memory[:: max(1, len(memory) // 200)]
    section.notes.append(f"Images/s of the first and the last {part / 60:g} minutes, without checkpoints and samples.")
    if not trial.quick:
        for what, growth in (("its peak", peak - before), ("its usual memory", finally_ - usual)):
            section.check(growth < GROWTH, f"{what} grew by {growth:.1f} MB, target under {GROWTH:.0f}")
        section.check(abs(last / first - 1) < DRIFT, f"images/s went from {first:.0f} to {last:.0f}, target 5 %")


def _memory(pid: int) -> tuple[float, float]:
    """MB of memory that the process has in RAM, and the most it ever had."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        found = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "VmHWM:")}
        return found["VmRSS:"], found["VmHWM:"]
    except (OSError, KeyError):  # it has just ended
        return 0.0, 0.0


def _rate(lines: list[tuple[float, int]]) -> float:
    """Images a second between the first and the last of (seconds, step)."""
    (begin, first), (end, last) = lines[0], lines[-1]
    return PRESETS["quickstart"].train.batch_size * (last - first) / (end - begin)
