"""Section `kills` of `bench.chaos`: `kill -9` of processes of a training, and whether nothing of it is lost.

Two processes train on the CPU under torchrun, which starts both again when one dies: what costs time is their start. A
fifth of the kills come while they start, two fifths at a random step, two fifths while a checkpoint is being written.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from bench.section import ROOT, Section
from bench.trial import Trial, flags, small
from lsep import checkpoint, shards
from lsep.config import Config
from lsep.run import Run

PROCESSES = 2
EVERY = 2
"""Steps between two checkpoints."""
SPAN = 30
"""Most steps between two kills."""
PATIENCE = 300.0
"""Seconds in which a training must go on after a kill."""
MOMENTS = ("at the start", "at a random step", "in a write", "at a random step", "in a write")


class Training:
    """A training under torchrun."""

    def __init__(self, config: Config, run: Path, restarts: int) -> None:
        self.run, self.log = run, run.with_suffix(".log")
        self.folder = run / "checkpoints"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        command += ["--max-restarts", str(restarts), "-m", "lsep", "train", "quickstart", *flags(config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*command, "--run-dir", str(run)], env=environment, stdout=log, stderr=log, cwd=ROOT
            )

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for children in Path(f"/proc/{self.launcher.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for pid in children.read_text().split():
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found.update({int(e[5:]): int(pid) for e in environment if e.startswith(b"RANK=")})
        return found

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.launcher.poll() is not None:
                raise RuntimeError(f"torchrun ended, waiting for {what}: {self.log.read_text()[-400:]}")
            if time.monotonic() > end:
                raise RuntimeError(f"{PATIENCE:.0f} s have passed, waiting for {what}: {self.log.read_text()[-400:]}")
            time.sleep(0.002)

    def step(self) -> int:
        """That of the newest checkpoint, 0 before the first."""
        newest = checkpoint.latest(self.folder)
        return int(newest.name) if newest else 0

    def writing(self) -> bool:
        return next(self.folder.glob(".*.tmp"), None) is not None

    def unreadable(self) -> list[str]:
        """What is wrong with the checkpoints that are there, and stay: a survivor may be removing an old one."""
        suspects = [path for path in checkpoint.steps(self.folder) if shards.problems(path)]
        return [problem for path in suspects if path.exists() for problem in shards.problems(path)]

    def end(self) -> None:
        """End it with all its processes, where it has not ended by itself."""
        if self.launcher.poll() is None:
            for pid in self.workers().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.launcher.terminate()
            self.launcher.wait()


def kills(trial: Trial, section: Section) -> None:
    """Kills, each with a look at all checkpoints, until the training ends: its weights are those of an unbroken one."""
    count, draw = 3 if trial.quick else 100, Random(trial.seed)
    steps = SPAN * (count + 1)
    config = small(trial.folder, train__steps=steps, train__checkpoint_every=EVERY, sample__num=2, sample__steps=2)
    whole = Training(config, trial.folder / "whole", 0)
    try:
        section.check(whole.launcher.wait() == 0, f"the unbroken training failed: {whole.log.read_text()[-400:]}")
    finally:
        whole.end()
    start = time.perf_counter()
    broken = Training(config, trial.folder / "broken", count + 5)
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(count)]
    draw.shuffle(moments)
    done, unreadable, found = Counter[str](), 0, Counter[str]()
    try:
        for moment in moments:
            verified = len(checkpoint.steps(broken.folder))
            rank = _kill(broken, moment, draw)
            damage = broken.unreadable()
            found["checked"] += max(verified, len(checkpoint.steps(broken.folder)))
            unreadable += len(damage)
            section.check(not damage, f"kill {sum(done.values()) + 1}, of rank {rank} {moment}: {damage[:1]}")
            done[moment] += 1
        broken.wait(lambda: broken.step() == steps, "the last step")
        section.check(broken.launcher.wait() == 0, f"torchrun ended with {broken.launcher.returncode}")
    finally:
        broken.end()
    seconds = time.perf_counter() - start
    said = broken.log.read_text()
    continued = [int(step) for step in re.findall(rf"continuing {re.escape(str(broken.run))} at step (\d+)", said)]
    same = _same_bits(whole.folder / f"{steps:07d}", broken.folder / f"{steps:07d}")
    section.check(same, "the weights, averages or moments differ from those of the unbroken training")
    section.check(continued == sorted(continued), f"a restart went back: {continued}")
    section.check("checkpoint before is used" not in said, "a checkpoint was passed over as damaged")
    logged = [line["step"] for line in Run(broken.run).metrics()]
    section.check(logged == [*range(2, steps + 1, 2)], "steps are missing in metrics.jsonl, or there twice")
    for moment in dict.fromkeys(moments):
        section.rows.append({"kill -9": moment, "events": done[moment]})
    section.rows.append({"kill -9": "all", "events": count, "unreadable checkpoints": unreadable,
                         "same bits as unbroken": "yes" if same else "NO"})  # fmt: skip
    section.notes.append(
        f"{PROCESSES} processes, {steps} steps, a checkpoint every {EVERY}; {found['checked']} looks at a checkpoint, "
        f"all bytes; {len(continued)} continuations were told, from step {continued[:1]} to {continued[-1:]}; "
        f"{seconds / count:.1f} s a kill."
    )


def _kill(training: Training, moment: str, draw: Random) -> int:
    """Wait for the moment and kill a process; returns its rank once its successors are there."""
    training.wait(lambda: len(training.workers()) == PROCESSES, "all processes")
    begin = training.step()
    if moment == "at the start":
        time.sleep(draw.uniform(0, 8))
    elif moment == "at a random step":
        aim = begin + draw.randrange(EVERY, SPAN, EVERY)
        training.wait(lambda: training.step() >= aim, f"step {aim}")
        time.sleep(draw.uniform(0, 0.05))
    else:
        for _ in range(draw.randrange(1, 4)):  # not always the first of a session: it must come further
            training.wait(lambda: not training.writing(), "the end of a write")
            training.wait(training.writing, "a write")
        time.sleep(draw.choice((0, 0, 0.002, 0.005)))
    rank, there = draw.randrange(PROCESSES), training.workers()
    os.kill(there[rank], signal.SIGKILL)
    training.wait(lambda: not set(training.workers().values()) & set(there.values()), "the restart")
    return rank


def _same_bits(one: Path, other: Path) -> bool:
    for part in shards.PARTS:
        a, b = (checkpoint.read_tensors(path, part) for path in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True
