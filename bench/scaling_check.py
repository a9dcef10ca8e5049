"""The model of `bench.scaling_model` against this machine: 1, 2 and 4 processes with DDP over gloo, a thread each.

    python -m bench.scaling_model --check

What goes into a prediction is measured apart from what it predicts: a step's seconds = overhead + images * rate come
from one process at two batch sizes; latency and bandwidth of gloo from all-reduces between two processes. Processes
share the cores: with n on c of them both take max(1, n / c) as long, and since gloo computes on the same cores as the
step, a machine without a core left over hides no communication. Each launch measures everything once and launches are
repeated in rotating order, since other programs come and go: of each size the half counts in which those used least of
the machine. Medians, and quartiles as the spread. Steps of the same processes apart, without any exchange, say whether
an error is the communication's or the cores'.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from bench.section import ROOT, Section
from bench.variants import configuration, with_data
from lsep.config import Config, from_dict, override
from lsep.cost.cluster import ring
from lsep.dist import World, world
from lsep.errors import UserError
from lsep.step import open_loader, pick_device, setup, train_step

PROCESSES = (1, 2, 4)
BUCKET = 25 * 2**20
"""Bytes of DDP's buckets, but for the first."""
SIZES = (1 << 10, 1 << 18, 1 << 22, 1 << 25)
"""Bytes of the all-reduces that are timed."""
WARM_UP, STEPS = 2, 4
"""Steps of a launch: uncounted, then counted."""

Found = dict[str, list[float]]
"""Seconds by what took them: `weak`, `strong`, `apart`, `parameters` (a count) and the all-reduces' bytes."""


def check(preset: str, rounds: int) -> Section:
    """Measure, predict, compare."""
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}, expected at least 1")
    base = configuration(preset)
    share = base.train.batch_size // max(PROCESSES)
    if share * max(PROCESSES) != base.train.batch_size:
        raise UserError(f"the preset {preset!r} has a batch of {base.train.batch_size}, expected a multiple of 4")
    start = time.monotonic()
    launches: dict[int, list[tuple[float, Found]]] = {n: [] for n in PROCESSES}
    for turn in range(rounds):
        k = turn % len(PROCESSES)
        for n in [*PROCESSES[k:], *PROCESSES[:k]]:
            before, since = _others(), time.monotonic()
            found = launch(preset, n, share)
            launches[n].append(((_others() - before) / (time.monotonic() - since), found))
    section = summary(launches, share)
    section.notes.insert(0, f"{preset}, {rounds} launches of {STEPS} steps each")
    section.seconds = time.monotonic() - start
    return section


def summary(launches: dict[int, list[tuple[float, Found]]], share: int) -> Section:
    """`compare` for the quieter half of the launches of each size, and beside it the quietest one."""
    section = compare(quietest(launches), share, os.cpu_count() or 1, quietest(launches, 1))
    used = "; ".join(
        f"{n} processes: " + ", ".join(f"{others:.2f}" for others, _ in sorted(found, key=lambda pair: pair[0]))
        for n, found in launches.items()
    )
    section.notes += [
        "of the launches of each size the half counts in which other programs used least of the machine; quietest: "
        "the one of these in which they used least, with the same predictions",
        f"cores that other programs used, launch by launch: {used}",
    ]
    section.details["launches"] = {str(n): found for n, found in launches.items()}
    return section


def quietest(launches: dict[int, list[tuple[float, Found]]], count: int | None = None) -> dict[int, Found]:
    """What `count` launches of each size, or half of them, measured: those in which other programs used least."""
    kept: dict[int, Found] = {}
    for n, found in launches.items():
        kept[n] = {}
        for _, values in sorted(found, key=lambda pair: pair[0])[: count or math.ceil(len(found) / 2)]:
            for name, seconds in values.items():
                kept[n].setdefault(name, []).extend(seconds)
    return kept


def _others() -> float:
    """CPU seconds of this machine since its start without those of this process's children; 0 where Linux is not."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *more = map(int, stat.read_text().split("\n")[0].split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def compare(found: dict[int, Found], share: int, cores: int, quiet: dict[int, Found] | None = None) -> Section:
    """Predictions beside the measured medians. found: by number of processes; share: images a process (weak).

    quiet: of another choice of launches, for columns of their own.
    """
    whole = share * max(found)
    weak, strong = (statistics.median(found[1][kind]) for kind in ("weak", "strong"))
    image = (strong - weak) / (whole - share)
    overhead = max(0.0, weak - image * share)
    latency, bandwidth = constants({s: statistics.median(found[2][str(s)]) for s in SIZES}, 2)
    size = 4 * found[1]["parameters"][0]
    calls = 2 + math.ceil(size / BUCKET)
    section = Section("Check: this machine, measured and predicted")

    def row(what: str, n: int, predicted: float, name: str) -> None:
        measured = found[n][name]
        low, median, high = statistics.quantiles(measured * (2 if len(measured) == 1 else 1), n=4, method="inclusive")
        section.rows.append(
            {
                "what": what,
                "processes": n,
                "predicted ms": predicted * 1e3,
                "measured ms": median * 1e3,
                "quartiles ms": f"{low * 1e3:.4g} to {high * 1e3:.4g}",
                "predicted / measured": predicted / median,
            }
        )
        if quiet:
            alone = statistics.median(quiet[n][name])
            section.rows[-1] |= {"quietest ms": alone * 1e3, "predicted / quietest": predicted / alone}  # fmt: skip

    for n in sorted(found):
        shared = max(1.0, n / cores)
        for kind, images in (("weak", share), ("strong", whole / n)):
            exchange = ring(size, n, bandwidth, calls * latency)
            row(f"step, {kind}: {images:g} images", n, shared * (overhead + image * images + exchange), kind)
    for n in sorted(found)[1:]:
        shared = max(1.0, n / cores)
        row(f"step apart, no exchange: {share} images", n, shared * (overhead + image * share), "apart")
        alone = statistics.median(found[n]["apart"])
        row(
            "step, weak, from the step apart",
            n,
            alone + shared * ring(size, n, bandwidth, calls * latency),
            "weak",
        )
    for n in sorted(found)[1:]:
        for s in SIZES:
            took = max(1.0, n / cores) * ring(s, n, bandwidth, latency)
            row(f"all-reduce of {s:,} bytes", n, took, str(s))
    section.notes += [
        f"one process: {overhead * 1e3:.3g} ms + {image * 1e3:.3g} ms an image, through its own two rows, which are "
        "therefore no predictions",
        f"gloo between two processes: {latency * 1e6:.3g} us a hop, {bandwidth / 1e9:.3g} GB/s, a fit to its "
        "all-reduces, not to the steps; those between four are predictions",
        f"{size / 1e6:.4g} MB of gradients in float32, in {calls} all-reduces: DDP's first bucket of 1 MiB, those of "
        f"25 MiB, the classifier; {cores} cores",
    ]
    section.details |= {"overhead": overhead, "image": image, "latency": latency, "bandwidth": bandwidth}
    return section


def constants(seconds: dict[int, float], members: int) -> tuple[float, float]:
    """Latency of a hop and bytes/s of `ring`: the smallest all-reduce is all latency, the largest mostly bandwidth."""
    small, large = min(seconds), max(seconds)
    moved = 2 * (members - 1) / members * (large - small)
    bandwidth = moved / (seconds[large] - seconds[small])
    latency = seconds[small] - 2 * (members - 1) / members * small / bandwidth
    return max(0.0, latency / (2 * (members - 1))), bandwidth


def launch(preset: str, processes: int, share: int) -> Found:
    """What `worker` finds in `processes`."""
    base = override(configuration(preset), {"train.device": "cpu"})
    with tempfile.TemporaryDirectory() as folder:
        whole = with_data(base, Path(folder))  # the same rows for all
        weak = override(whole, {"train.batch_size": share * processes})
        apart = override(whole, {"train.batch_size": share})
        file, out = Path(folder, "configs.json"), Path(folder, "found.json")
        file.write_text(json.dumps({"weak": asdict(weak), "strong": asdict(whole), "apart": asdict(apart)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        module = ["-m", "bench.scaling_check", str(file), str(out)]
        done = subprocess.run([*command, *module], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{processes} processes failed: {' '.join(done.stderr.split())[-500:]}")
        return {name: list(seconds) for name, seconds in json.loads(out.read_text()).items()}


def worker(configs: str, out: str) -> None:
    """One of the processes of a launch; the first writes what it found to `out`."""
    torch.set_num_threads(1)
    many = int(os.environ["WORLD_SIZE"]) > 1
    if many:
        dist.init_process_group("gloo")
    found: Found = {str(s): _all_reduce(s) for s in SIZES} if many else {}
    for name, values in json.loads(Path(configs).read_text()).items():
        found |= _steps(name, from_dict(values, configs))
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(found))
    if many:
        dist.destroy_process_group()


def _all_reduce(size: int) -> list[float]:
    tensor = torch.ones(size // 4)
    return _times(lambda: dist.all_reduce(tensor), 3, 8, dist.barrier)


def _steps(name: str, config: Config) -> Found:
    device = pick_device("cpu")
    with world(config, device) as here:
        state = setup(config, World(device) if name == "apart" else here)
        batches = list(islice(open_loader(state, 0, 2), 2))
        count = iter(range(WARM_UP + STEPS))

        def step() -> None:
            i = next(count)
            train_step(state, i, batches[i % 2])

        parameters = sum(p.numel() for p in state.objective.parameters())
        return {name: _times(step, WARM_UP, STEPS, here.barrier), "parameters": [parameters]}


def _times(call: Callable[[], object], warm_up: int, count: int, barrier: Callable[[], object]) -> list[float]:
    """Seconds of each of `count` calls, begun together and with the slowest process's end."""
    out = []
    for _ in range(warm_up + count):
        barrier()
        start = time.perf_counter()
        call()
        barrier()
        out.append(time.perf_counter() - start)
    return out[warm_up:]


if __name__ == "__main__":
    worker(*sys.argv[1:])
