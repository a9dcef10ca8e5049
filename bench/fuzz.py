"""Section `fuzz` of `bench.chaos`: wrong files of all forms, each ends in one sentence of ours or is read.

    python -m bench.fuzz --seed 0 --case 123    # one input again: where its error comes from

Every input is a function of seed and number. They are read in a process of their own, under a limit on its memory and
one on the time of each input, so that what hangs, crashes or eats memory has a number too.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from bench.mutate import damaged, mutated, text
from bench.section import ROOT, Section
from bench.trial import Trial, small, train_one_step
from lsep import checkpoint, ending, report, shards
from lsep.checkpoint import Checkpoints, Progress
from lsep.checks import resolve
from lsep.config import flat, override
from lsep.data.loader import open_source
from lsep.data.manifest import Manifest
from lsep.data.shards import columns_crc32, header
from lsep.data.store import Store, read_manifest
from lsep.errors import UserError
from lsep.files import discard, write_atomic
from lsep.run import Run
from lsep.sample import save_grid
from lsep.step import State, setup

SECONDS = 1.0
"""Of a processor, for one input."""
HANGS = 20
"""Seconds after which the process is ended: the machine may be busy."""
MEMORY = 500 << 20
"""Bytes, beyond those of the process before its first input."""
LONGEST = 2000
"""Characters of a sentence."""
SECRET = "what stands in a file outside"


class Inputs:
    """A good run, store and checkpoint in `folder`, and what can be made of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, small(folder)
        self.state: State = setup(self.config)
        run = Run(folder / "run")
        run.open(self.state.config, self.state.source.manifest, "quickstart")
        train_one_step(self.state, 0)  # before it the optimizer has nothing to save
        checkpoints = Checkpoints(run.checkpoints)
        checkpoints.save(Progress(1, 1.0), self.state.objective, self.state.ema, self.state.optimizer)
        checkpoints.finish()
        checkpoints.close()
        self.store, self.checkpoint = folder / "store", run.checkpoints / "0000001"
        # A shard that is whole, outside, and a link to it: a manifest that names either must be refused.
        shard = self.store / "shard-00000.safetensors"
        shutil.copy(shard, folder / "outside.safetensors")
        line = {"step": 1, "seconds": 1.0, "loss": 0.5, "probe_accuracy": 0.5, "probe_accuracy_by_time": [0.5, None]}
        run.append_metrics(line)
        write_atomic(run.results_file, json.dumps({"steps": 1, "agreement": 0.5, "lsep_overhead": 0.1}))
        save_grid(np.zeros((4, 8, 8, 1), np.uint8), run.grid(1))
        (folder / "secret").write_text(SECRET)
        (self.store / "link").symlink_to(folder / "outside.safetensors")
        self.out = ("../outside.safetensors", str(folder / "outside.safetensors"), "link", "shard-00000.safetensors")
        for name in ("run", "store"):
            shutil.copytree(folder / name, folder / "good" / name, symlinks=True)

    def restore(self) -> None:
        """Make all files good again."""
        for name in ("run", "store"):
            shutil.rmtree(self.folder / name)
            shutil.copytree(self.folder / "good" / name, self.folder / name, symlinks=True)

    def put_json(self, draw: Random, path: Path) -> None:
        value = mutated(draw, json.loads(path.read_bytes()), self.out)
        content = text(value)
        path.write_bytes(damaged(draw, content[:100_000]) if draw.random() < 0.2 else content)

    def put_header(self, draw: Random, path: Path) -> None:
        """Change the header of a safetensors file, or its bytes anywhere."""
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        if draw.random() < 0.3 and "DCP_SHARDING_INFO" in entries.get("__metadata__", {}):
            places = json.loads(entries["__metadata__"]["DCP_SHARDING_INFO"])
            changed = text(mutated(draw, places)).decode()
            entries["__metadata__"]["DCP_SHARDING_INFO"] = changed
            new = json.dumps(entries).encode()
        else:
            new = text(mutated(draw, entries))
        said = draw.choice((len(new), len(new), len(new), len(new), len(new) + 1, 0, 2**31, 2**63, 2**64 - 1))
        content = said.to_bytes(8, "little") + new + data
        path.write_bytes(damaged(draw, content) if draw.random() < 0.2 else content)

    # ------------------------------------------------------------ kinds: how each is made, and who reads it

    def config_json(self, draw: Random) -> None:
        run = Run(self.folder / "run")
        self.put_json(draw, run.config_file)
        config, manifest = attempt(run.config), attempt(run.manifest)
        attempt(run.preset)
        attempt(lambda: run.check(self.state.config, self.state.source.manifest))
        if config and manifest:
            attempt(lambda: resolve(config, manifest))

    def run_files(self, draw: Random) -> None:
        """Files of a run that are links, pipes, folders, noise, or JSON with other values: read, said and written."""
        run = Run(self.folder / "run")
        small = (run.metrics_file, run.results_file, run.lock_file, run.wandb_file, run.report_file, run.grid(1))
        path = draw.choice((*small, run.checkpoints, run.samples, run.snapshots))
        how = draw.choice(("values", "values", "bytes", "link", "pipe", "folder", "file"))
        if how in ("values", "bytes") and path in small[:2]:
            content = text(mutated(draw, json.loads(path.read_bytes())))
            path.write_bytes(content + b"\n" if how == "values" else damaged(draw, content[:100_000]))
        else:
            discard(path)
            made: dict[str, Callable[[], object]] = {
                "link": lambda: path.symlink_to(self.folder / "secret"), "pipe": lambda: os.mkfifo(path),
                "folder": path.mkdir, "file": lambda: path.write_bytes(damaged(draw, b"\x89PNG\r\n" * 99)),
            }  # fmt: skip
            path.parent.mkdir(exist_ok=True)
            made.get(how, made["file"])()
        attempt(lambda: Run.existing(run.path))
        attempt(lambda: run.check(self.state.config, self.state.source.manifest))
        for read in (run.metrics, run.results, run.grids, run.sessions):
            attempt(read)
        attempt(lambda: ending.missing(run, 1))
        attempt(lambda: run.append_metrics({"step": 2}))
        attempt(lambda: run.forget_after(1))
        page = attempt(lambda: report.facts(run))
        assert SECRET not in (page or ""), "a file from outside is in the page"
        assert (self.folder / "secret").read_text() == SECRET, "a file outside was changed"

    def overrides(self, draw: Random) -> None:
        known = flat(self.config)
        values = mutated(draw, {name: known[name] for name in draw.sample(sorted(known), 3)})
        file = self.folder / "run" / "overrides.json"
        file.write_bytes(text(values))
        with contextlib.suppress(ValueError, RecursionError):  # of this reader: the overrides come from Python
            values = json.loads(file.read_bytes())
        if isinstance(values, dict):
            config = attempt(lambda: override(self.config, values))
            if config:
                manifest = Manifest("here", "samples", (3, 8, 8), rows=1000, num_classes=5, probe_classes=5)
                attempt(lambda: resolve(config, manifest))
                attempt(lambda: open_source(config.data))

    def store_manifest(self, draw: Random) -> None:
        self.put_json(draw, self.store / "manifest.json")
        self.read_store()

    def data_header(self, draw: Random) -> None:
        shard, file = self.store / "shard-00000.safetensors", self.store / "manifest.json"
        self.put_header(draw, shard)
        attempt(lambda: header(shard))
        if draw.random() < 0.8:  # a manifest that agrees lets it come further
            value = json.loads(file.read_bytes())
            value["shards"][0]["bytes"] = shard.stat().st_size
            value["shards"][0]["columns_crc32"] = attempt(lambda: columns_crc32(shard)) or 0
            file.write_text(json.dumps(value))
        self.read_store()

    def read_store(self) -> None:
        attempt(lambda: read_manifest(self.store))
        store = attempt(lambda: Store(self.store))
        if store is None:
            return
        for shard in store.shards:
            for path in (shard.path, shard.columns_path):
                assert path.resolve().is_relative_to(self.store.resolve()), f"{path} is read, outside of the store"
        rows = min(store.manifest.rows, 40)
        attempt(lambda: store.read(np.arange(rows)))
        attempt(lambda: resolve(self.config, store.manifest))

    def checkpoint_manifest(self, draw: Random) -> None:
        file = self.checkpoint / shards.MANIFEST
        if draw.random() < 0.3:
            self.put_json(draw, file)
        else:
            value = json.loads(file.read_bytes())
            del value["sha256"]
            self.sign(mutated(draw, value))
        self.read_checkpoint()

    def checkpoint_header(self, draw: Random) -> None:
        part = draw.choice(shards.PARTS)
        file = self.checkpoint / f"shard-00000-{part}.safetensors"
        self.put_header(draw, file)
        attempt(lambda: shards.read_header(file))
        if draw.random() < 0.9:
            value = json.loads((self.checkpoint / shards.MANIFEST).read_bytes())
            del value["sha256"]
            content = file.read_bytes()
            value["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self.sign(value)
        self.read_checkpoint()

    def sign(self, value: Any) -> None:
        """Write a checkpoint's manifest with the sha256 of what it says."""
        unsigned = text({**value, "sha256": ""} if isinstance(value, dict) else value)
        digest = hashlib.sha256(unsigned).hexdigest().encode()
        (self.checkpoint / shards.MANIFEST).write_bytes(
            unsigned.replace(b'"sha256": ""}', b'"sha256": "' + digest + b'"}')
        )

    def read_checkpoint(self) -> None:
        path, state = self.checkpoint, self.state
        attempt(lambda: checkpoint.progress_of(path))
        for problem in shards.problems(path):
            sentence(problem)
            return
        attempt(lambda: checkpoint.load(path, state.objective, state.ema, state.optimizer))
        attempt(lambda: checkpoint.load_weights(path, "ema", state.objective))
        for part in shards.PARTS:
            attempt(partial(checkpoint.read_tensors, path, part))


KINDS: tuple[Callable[[Inputs, Random], None], ...] = (
    Inputs.config_json, Inputs.run_files, Inputs.overrides, Inputs.store_manifest, Inputs.data_header,
    Inputs.checkpoint_manifest, Inputs.checkpoint_header,
)  # fmt: skip


ended: Counter[str] = Counter()


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, None where it ends in a UserError."""
    try:
        result = call()
    except UserError as error:
        sentence(str(error))
        return None
    ended["read"] += 1
    return result


def sentence(said: str) -> None:
    """Count a message of ours, which must be one line that can be printed."""
    ended["refused"] += 1
    assert len(said.splitlines()) == 1 and len(said) <= LONGEST, f"no sentence, {len(said)} characters: {said[:200]!r}"


def one(inputs: Inputs, seed: int, case: int) -> None:
    """Make and read input number `case`; raises what is not our own error."""
    start = time.process_time()
    KINDS[case % len(KINDS)](inputs, Random(f"{seed}/{case}"))
    taken = time.process_time() - start
    assert taken < SECONDS, f"took {taken:.1f} s"


def work(folder: Path, seed: int, cases: range) -> None:
    """The process: a line of JSON for each input that went wrong, and one with counts at the end."""
    inputs = Inputs(folder)
    for kind in range(len(KINDS)):  # what is imported at the first use
        one(inputs, seed + 1, kind)
        inputs.restore()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    ended.clear()
    for case in cases:
        signal.setitimer(signal.ITIMER_REAL, HANGS)  # unheard, it ends the process, in C code as well
        print(json.dumps({"case": case}), flush=True)
        try:
            one(inputs, seed, case)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/lsep/" in f.filename] or [last]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            what = f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
            print(json.dumps({"case": case, "failure": what, "where": where}), flush=True)
        inputs.restore()
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"ended": ended, "peak": peak}), flush=True)


def fuzz(trial: Trial, section: Section) -> None:
    """Wrong configurations, manifests and headers: UserError or success, in little time and memory."""
    count = 120 if trial.quick else 10_000
    next_case, counts, peak = 0, Counter[str](), 0.0
    failures: dict[str, tuple[int, int, str]] = {}
    failed: Counter[int] = Counter()
    while next_case < count:
        with tempfile.TemporaryDirectory(dir=trial.folder) as folder:
            range_ = [str(n) for n in (trial.seed, next_case, count)]
            command = [sys.executable, "-m", "bench.fuzz", "--work", folder, *range_]
            # One arena: memory set aside for each thread would count as used.
            environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(done.stderr[-500:])
        if "ended" in lines[-1]:
            counts.update(lines[-1]["ended"])
            peak, next_case = max(peak, lines[-1]["peak"]), count
        else:
            next_case = lines[-1]["case"] + 1
            what = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
            lines.append({"case": lines[-1]["case"], "failure": what, "where": what[:40]})
        for line in lines:
            if "failure" in line:
                kind = line["case"] % len(KINDS)
                failed[kind] += 1
                key = f"{KINDS[kind].__name__} {line['where']}"
                times, case, what = failures.get(key, (0, line["case"], line["failure"]))
                failures[key] = times + 1, case, what
    for i, kind in enumerate(KINDS):
        inputs = len(range(i, count, len(KINDS)))
        section.rows.append({"kind": kind.__name__, "inputs": inputs, "neither read nor refused": failed[i]})
    for key, (times, case, what) in failures.items():
        kept = _keep(trial, case)
        section.failures.append(f"{key}, {times} times, first --seed {trial.seed} --case {case}, in {kept}: {what}")
    section.notes.append(
        f"Seed {trial.seed}; of the calls that read them {counts['refused']:,} ended in a sentence and "
        f"{counts['read']:,} read it. At most {SECONDS:g} s of a processor and {MEMORY >> 20} MB each; "
        f"the process had {peak:,.0f} MB at most, with torch."
    )


def _keep(trial: Trial, case: int) -> Path:
    """The input that failed, in a folder that stays."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{trial.seed}-{case}-"))
    subprocess.run(
        [sys.executable, "-m", "bench.fuzz", "--seed", str(trial.seed), "--case", str(case), "--folder", str(folder)],
        capture_output=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="the input to make and read")
    parser.add_argument("--folder", type=Path, help="where its files stay; a new folder when not given")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        folder, seed, start, stop = args.work
        work(Path(folder), int(seed), range(int(start), int(stop)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(folder, flush=True)
    one(Inputs(folder), args.seed, args.case)
    print(dict(ended))


if __name__ == "__main__":
    main()
