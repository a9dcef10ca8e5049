"""Section `csrc`: the optimizer's CUDA code under compute-sanitizer's memcheck.

python -m bench.sanitizer        the program that is checked: a few steps over tensors of odd sizes
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.programs import unbuilt
from bench.section import ROOT, Context, Section

LIMIT = 90
"""Seconds."""


def csrc(context: Context, section: Section) -> None:
    """Memcheck finds no error in the optimizer's kernels."""
    tool = find()
    problem = unbuilt(context.device)
    if problem:
        section.failures.append(problem)
        return
    if tool is None or not context.cuda:
        without = f"memcheck needs a GPU, and the device is {context.device.type}"
        section.skipped.append("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin" if context.cuda else without)
        return
    # Without PyTorch's memory cache every tensor is an allocation of its own, whose ends memcheck knows.
    setting = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-m", "bench.sanitizer"]
    limit = context.seconds_left(LIMIT)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=ROOT, env=os.environ | setting
        )
    except subprocess.TimeoutExpired:
        section.skipped.append(f"memcheck was not done after {limit:.0f} s")
        return
    output = done.stdout + done.stderr
    errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
    section.details["output"] = output[-4000:]
    if errors is None or "Device not supported" in output:
        last = (output.strip().splitlines() or ["no output"])[-1][:200]
        section.skipped.append(f"compute-sanitizer does not work here (exit code {done.returncode}): {last}")
        return
    good = int(errors[1]) == 0 and "steps done" in done.stdout
    what = f"memcheck reports {errors[1]} errors, exit code {done.returncode}"
    section.rows.append({"program": "AdamwEma, odd sizes", "errors": int(errors[1]), "ok": section.check(good, what)})


def find() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def steps(device: torch.device) -> None:
    """A few steps of every variant."""
    from bench.optimizer import ODD_SHAPES, VARIANTS, Problem, gradients

    for variant in VARIANTS:
        problem = Problem(True, variant, ODD_SHAPES, device, seed=0)
        for step in range(3):
            problem.step(gradients(variant, problem.params, step, seed=0))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("steps done")


if __name__ == "__main__":
    steps(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
