"""What goes wrong, made to go wrong: damaged files, full disks, kills, nonsense as input; and long trainings.

    python -m bench.chaos [--only flips full_disk] [--json FILE] [--markdown FILE] [--quick] [--minutes 30]

A section is a function in SECTIONS that fills a `Section` (`bench.section`); its failures make the exit code 1.
`--quick` is the short form that the tests run.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bench.fuzz import fuzz
from bench.kills import kills
from bench.section import Section, plain, sentence, show
from bench.soak import soak
from bench.trial import Trial, small, train_one_step
from lsep import checkpoint, shards
from lsep.checkpoint import Checkpoints, Progress
from lsep.step import open_loader, setup, train_step

# ---------------------------------------------------------------- flips


def flips(trial: Trial, section: Section) -> None:
    """Random byte flips and truncations over all files of a checkpoint: each must be found, and its file named."""
    state = setup(small(trial.folder))
    train_one_step(state, 0)
    folder = trial.folder / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(Progress(1, 1.0), state.objective, state.ema, state.optimizer)
    checkpoints.finish()
    path = folder / "0000001"
    files, draw = sorted(path.iterdir()), random.Random(trial.seed)
    wrong = section.check(not shards.problems(path), "a whole checkpoint is called damaged")
    count = 20 if trial.quick else 200
    found = {(file.name, kind): [0, 0] for file in files for kind in ("byte flipped", "truncated")}
    for i in range(count):
        file, kind = files[i % len(files)], draw.choice(["byte flipped", "truncated"])
        content = file.read_bytes()
        place = draw.randrange(len(content))
        damaged = content[:place]
        if kind == "byte flipped":
            damaged = content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]
        file.write_bytes(damaged)
        problems = shards.problems(path)
        hit = len(problems) == 1 and str(file) in problems[0]
        found[file.name, kind][0] += 1
        found[file.name, kind][1] += hit
        section.check(hit, f"{file.name}, {kind} at byte {place} of {len(content)}: {problems}")
        file.write_bytes(content)
    section.check(not shards.problems(path), "the restored checkpoint is called damaged")
    for (name, kind), (done, hits) in found.items():
        section.rows.append({"file": name, "damage": kind, "events": done, "found and named": hits})
    hits = sum(hits for _, hits in found.values())
    section.notes.append(f"{hits} of {count} found and named; the whole one passes: {wrong}.")


# ---------------------------------------------------------------- full_disk


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str]:
    """A disk of `size` bytes at `folder`: a tmpfs where this user may mount one, else a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "tmpfs"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 20, limits[1]))
    try:
        yield "RLIMIT_FSIZE (no right to mount)"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_disk(trial: Trial, section: Section) -> None:
    """Saves on a disk filled up to a random part of what they need: earlier checkpoints stay, training goes on."""
    state, draw = setup(small(trial.folder)), random.Random(trial.seed)
    train_one_step(state, 0)
    events = 3 if trial.quick else 20
    disk = trial.folder / "disk"
    with small_disk(disk, 16 << 20) as kind:
        checkpoints = Checkpoints(disk / "checkpoints", keep_last=2)
        step = saved = failed = lost = recovered = 0
        for _ in range(events):
            for filled in (False, True, False):
                step += 1
                train_one_step(state, step)
                if filled:
                    before = {p: shards.problems(p) for p in checkpoint.steps(checkpoints.folder)}
                    room = draw.randrange(0, saved or 1)
                    _fill(disk / "filler", room, kind)
                checkpoints.save(Progress(step, 0.0), state.objective, state.ema, state.optimizer)
                with contextlib.redirect_stderr(io.StringIO()):
                    checkpoints.wait()
                if filled:
                    failed += checkpoints.failure is not None
                    lost += sum(bool(shards.problems(p)) for p, damage in before.items() if not damage)
                    section.check(bool(before), "there was no earlier checkpoint to lose")
                    _empty(disk / "filler", kind)
                else:
                    recovered += checkpoints.failure is None
                    saved = shards.read_manifest(disk / "checkpoints" / f"{step:07d}").bytes
        left = sorted(p.name for p in checkpoints.folder.iterdir())
        section.check(not [name for name in left if name.startswith(".")], f"left behind: {left}")
        again = setup(small(trial.folder))
        progress = Checkpoints(checkpoints.folder).load_newest(again.objective, again.ema, again.optimizer, strict=True)
        checkpoints.close()
    section.check(failed == events, f"only {failed} of {events} saves met a full disk")
    section.check(lost == 0, f"{lost} earlier checkpoints were lost")
    section.check(recovered == 2 * events, f"only {recovered} of {2 * events} saves went through with room again")
    section.check(progress is not None and progress.step == step, f"the newest checkpoint is {progress}, not {step}")
    section.rows.append(
        {"disk": kind, "disk-full events": events, "reported": failed, "earlier checkpoints lost": lost,
         "saves with room again": f"{recovered} of {2 * events}", "steps trained": step}
    )  # fmt: skip
    section.notes.append(f"A checkpoint has {saved:,} bytes; at each event a random part of that was free, from 0 up.")


def _fill(filler: Path, room: int, kind: str) -> None:
    """Leave `room` bytes on the disk."""
    if kind != "tmpfs":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room // 8, hard))
        return
    status = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - room))


def _empty(filler: Path, kind: str) -> None:
    if kind != "tmpfs":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    filler.unlink()


# ---------------------------------------------------------------- stall


def stall(trial: Trial, section: Section) -> None:
    """How long a step waits for a save, in the call and before its update, against how long the write takes alone."""
    width = 64 if trial.quick else 640
    state = setup(small(trial.folder, model__hidden_size=width, model__depth=4, model__num_heads=4))
    train_one_step(state, 0)
    checkpoints = Checkpoints(trial.folder / "checkpoints", keep_last=1)
    waits, writes, steps = [], [], []

    def save(step: int) -> float:
        start = time.perf_counter()
        checkpoints.save(Progress(step, 0.0), state.objective, state.ema, state.optimizer)
        return time.perf_counter() - start

    for step in range(1, 3 if trial.quick else 8):
        start = time.perf_counter()
        save(2 * step)
        checkpoints.wait()
        writes.append(time.perf_counter() - start)
        (batches,) = open_loader(state, step, step + 1)
        waits.append(save(2 * step + 1))
        copied = state.optimizer.before_step

        def before_step(copied: Callable[[], object] = copied) -> None:
            start = time.perf_counter()
            copied()
            waits[-1] += time.perf_counter() - start

        state.optimizer.before_step = before_step
        start = time.perf_counter()
        train_step(state, step, batches)
        steps.append(time.perf_counter() - start)
        checkpoints.wait()
    size = shards.read_manifest(checkpoint.find(checkpoints.folder, None)).bytes
    checkpoints.close()
    wait, write = float(np.median(waits)), float(np.median(writes))
    section.rows.append(
        {"MB": size / 1e6, "step waits, ms": 1e3 * wait, "at most": 1e3 * max(waits), "write, ms": 1e3 * write,
         "share": f"{wait / write:.1%}", "step beside it, ms": 1e3 * float(np.median(steps))}
    )  # fmt: skip
    section.notes.append(
        f"Medians of {len(waits)}. On a CPU the copy in memory runs beside the step's forward and backward pass, and "
        "its update waits for it. The step shares processors and memory with copy and write, which is not waiting."
    )
    if not trial.quick:
        section.check(wait < 0.05 * write, f"the step waits {wait / write:.1%} of the write's time, target under 5 %")


SECTIONS: dict[str, Callable[[Trial, Section], None]] = {
    f.__name__: f for f in (flips, full_disk, stall, kills, fuzz, soak)
}


def run(names: list[str], quick: bool, minutes: float) -> list[Section]:
    """Run sections one after the other, each in a folder of its own; an error is a failure of its section."""
    done = []
    for name in names:
        section, start = Section(name), time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
        try:
            SECTIONS[name](Trial(folder, quick, minutes=minutes), section)
        except Exception as error:
            section.failures.append(sentence(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        section.seconds = time.perf_counter() - start
        print(show(section), flush=True)
        done.append(section)
    return done


def _others(file: Path, names: list[str]) -> list[Section]:
    """The sections of a file of results that are not run again: a long one need not be repeated for the others."""
    if not file.exists():
        return []
    return [Section(**entry) for entry in json.loads(file.read_text())["sections"] if entry["name"] not in names]


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--json", type=Path, help="write the results to this file; its other sections stay")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, with those that stay")
    parser.add_argument("--quick", action="store_true", help="the short form")
    parser.add_argument("--minutes", type=float, help="of soak; 30, or 1 with --quick, when not given")
    args = parser.parse_args(argv)
    sections = run(args.only, args.quick, args.minutes or (1 if args.quick else 30))
    command = shlex.join(["python", "-m", "bench.chaos", *(sys.argv[1:] if argv is None else argv)])
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    for section in sections:
        section.details |= {"command": command, "machine": where}
    kept = _others(args.json, args.only) if args.json else []
    all_ = sorted([*kept, *sections], key=lambda section: list(SECTIONS).index(section.name))
    if args.json:
        args.json.write_text(json.dumps({"sections": [plain(asdict(s)) for s in all_]}, indent=1) + "\n")
    if args.markdown:
        texts = [f"{show(s)}\n`{s.details['command']}`, {s.details['machine']}\n" for s in all_]
        args.markdown.write_text("\n".join(texts))
    return int(any(section.failures for section in sections))


if __name__ == "__main__":
    raise SystemExit(main())
