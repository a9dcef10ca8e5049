"""Loaders beside a torch DataLoader over per-file .npy: samples/s, waits with a 20 ms step, peak memory.

    python -m bench.loader [--rows 16384] [--rounds 5] [--json FILE] [--memory-gb 2]

Rows are moments of 8 x 32 x 32 float16 (16 KiB), batches 256, the page cache warm. Figures are medians over interleaved
rounds, ratios from the same rounds; a CPU run measures reading and hand-over, not the copy to a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from lsep.config import DataConfig
from lsep.data.index import index
from lsep.data.loader import Loader, has_dali, open_source
from lsep.data.native import library
from lsep.data.reader import Sequence
from lsep.data.writer import Block, Header, build

BATCH, SHAPE = 256, (8, 32, 32)
BASELINE = "DataLoader, per-file .npy, 2 workers"


class Random:
    """Random moments as a block source."""

    header = Header("moments", (4, 32, 32), "float16", 1000, scale=0.18215)

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def read(self, start: int, stop: int) -> Block:
        rng = np.random.default_rng(start)
        x = rng.integers(0, 2**13, (stop - start, *SHAPE), dtype=np.uint16).view(np.float16)  # small and finite
        return Block(x, rng.integers(1000, size=stop - start))


def write_files(folder: Path, rows: int) -> None:
    """REPA's form: one .npy a row and dataset.json."""
    source, labels = Random(rows), []
    for start in range(0, rows, 1024):
        block = source.read(start, min(rows, start + 1024))
        for i, (x, y) in enumerate(zip(block.x, block.y.tolist(), strict=True), start):
            name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, x)
            labels.append([name, y])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


class Files(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One .npy a row, as REPA and LSEP read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels = json.loads((folder / "dataset.json").read_text())["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        name, label = self.labels[i]
        return torch.from_numpy(np.load(self.folder / name)), label


def data_loader(folder: Path) -> Iterator[object]:
    """An endless DataLoader."""
    loader = torch.utils.data.DataLoader(Files(folder), BATCH, shuffle=True, num_workers=2, drop_last=True)
    while True:
        yield from loader


def own(path: Path, kind: str, crc: bool) -> Iterator[object]:
    """One of the project's loaders, as configured by default."""
    config = DataConfig(path=str(path), loader=kind, crc=crc)  # type: ignore[arg-type]
    return iter(Loader(Sequence(open_source(config), 0, BATCH, 1, 0, 10**6), config, torch.device("cpu")))


def providers(store: Path, files: Path) -> dict[str, Callable[[], Iterator[object]]]:
    """Name and maker of every loader measured here."""
    found: dict[str, Callable[[], Iterator[object]]] = {
        BASELINE: lambda: data_loader(files),
        "ring": lambda: own(store, "torch", False),
        "ring, crc": lambda: own(store, "torch", True),
        "ring, per-file .npy in place": lambda: own(files, "torch", False),
        "ring, per-file .npy in place, crc": lambda: own(files, "torch", True),
    }
    if has_dali():
        found["ring -> DALI"] = lambda: own(store, "dali", False)
        found["ring -> DALI, crc"] = lambda: own(store, "dali", True)
    return found


def rate(batches: Iterator[object], count: int) -> float:
    """Samples/s over `count` batches, after those that fill the queues."""
    for _ in range(8):  # more than any loader holds ready
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def waits(batches: Iterator[object], step: float = 0.020, count: int = 250) -> float:
    """99th percentile, in ms, of what a step of `step` seconds that leaves the CPU alone waits for its batch."""
    for _ in range(3):
        next(batches)
    seen = []
    for _ in range(count):
        time.sleep(step)
        start = time.perf_counter()
        next(batches)
        seen.append(time.perf_counter() - start)
    return sorted(seen)[int(0.99 * count)] * 1e3


def peak_memory(store: Path, kind: str) -> float:
    """MB by which reading the whole store raises the peak of a process that has the loader's modules imported."""
    code = (
        "import sys; from pathlib import Path; from bench.loader import own, memory, warm, BATCH; warm(sys.argv[2]);"
        "Path('/proc/self/clear_refs').write_text('5'); before = memory('VmRSS');"
        "b = own(Path(sys.argv[1]), sys.argv[2], True)\n"
        "for _ in range(int(sys.argv[3]) // BATCH): next(b)\n"
        "print(memory('VmHWM') - before)"
    )
    rows = sum(e.rows for e in open_rows(store))
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), kind, str(rows)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def open_rows(store: Path) -> list:  # type: ignore[type-arg]
    """The manifest's entries."""
    from lsep.data.store import read_manifest

    return read_manifest(store)[1]


def warm(kind: str) -> None:
    """Import what the loader needs, so that its modules count to the interpreter."""
    if kind == "dali":
        import nvidia.dali.fn  # noqa: F401


def memory(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak since clear_refs) of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def machine() -> dict[str, str]:
    """Machine and versions."""
    versions = {n: metadata.version(n) for n in ("torch", "numpy")}
    if has_dali():
        versions["dali"] = metadata.version("nvidia-dali-cuda130")
    return {
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **versions,
        "rows read in": "C" if library() else "Python",
    }


def measure(rows: int, rounds: int, memory_gb: float) -> dict[str, object]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        store, files, large = (Path(folder) / n for n in ("store", "files", "large"))
        build(Random(rows), store, 4096, progress=False)
        write_files(files, rows)
        index(files, "repa")
        makers = providers(store, files)
        rates: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(rounds):  # interleaved: what else the machine does hits all alike
            for name, make in makers.items():
                batches = make()
                rates[name].append(rate(batches, 56 if name == BASELINE else 200))
                del batches
        table = {
            name: {
                "samples_per_s": statistics.median(r),
                "spread": (max(r) - min(r)) / statistics.median(r),
                "ratio": statistics.median(a / b for a, b in zip(r, rates[BASELINE], strict=True)),
            }
            for name, r in rates.items()
        }
        for name in ("ring, crc", "ring -> DALI, crc"):
            if name in makers:
                table[name]["p99_wait_ms"] = statistics.median(waits(makers[name]()) for _ in range(3))
        memory_mb = {}
        if memory_gb:
            build(Random(int(memory_gb * 2**30) // 16384), large, 8192, progress=False)
            memory_mb = {k: peak_memory(large, k) for k in (("torch", "dali") if has_dali() else ("torch",))}
    return {"machine": machine(), "rows": rows, "rounds": rounds, "loaders": table, "peak_memory_mb": memory_mb}


def show(result: dict) -> str:  # type: ignore[type-arg]
    """The figures as a Markdown table, with the share one GPU needs."""
    lines = [
        f"Machine: {', '.join(f'{k} {v}' for k, v in result['machine'].items())}; {result['rows']} rows of 16 KiB, "
        f"batch {BATCH}, medians of {result['rounds']} interleaved rounds.",
        "",
        "| loader | samples/s | times the DataLoader | share at 600 images/s | at 3,000 | p99 wait, 20 ms step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["loaders"].items():
        speed = row["samples_per_s"]
        wait = f"{row['p99_wait_ms']:.2f} ms" if "p99_wait_ms" in row else ""
        lines.append(
            f"| {name} | {speed:,.0f} | {row['ratio']:.1f} | {600 / speed:.2%} | {3000 / speed:.2%} | {wait} |"
        )
    for kind, mb in result["peak_memory_mb"].items():
        lines += [
            "",
            f"Peak memory of `{kind}` over the large store: {mb:.0f} MB above the interpreter with its modules.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384, help="rows of the store and of the folder of files")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument(
        "--memory-gb", type=float, default=2.0, help="size of the store for the memory figure; 0 skips it"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    result = measure(args.rows, args.rounds, args.memory_gb)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(show(result))


if __name__ == "__main__":
    main()
