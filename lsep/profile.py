"""`lsep profile`: a window of training steps under Nsight Systems, Nsight Compute or torch's own profiler.

Nothing is trained for keeps: the steps are those of a run from its start, and their weights are dropped.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from lsep import trace
from lsep.checks import check
from lsep.config import Config, flat, override
from lsep.cost.floors import Rates, Work, measure, step_work
from lsep.data.loader import Batch
from lsep.errors import UserError
from lsep.files import replacing
from lsep.ranges import recording, span
from lsep.run import Run, write_atomic
from lsep.step import State, open_loader, pick_device, setup, train_step

TOOLS = {
    "nsys": "Nsight Systems, https://developer.nvidia.com/nsight-systems",
    "ncu": "Nsight Compute, https://developer.nvidia.com/nsight-compute",
}
TOP = 5
"""Kernels or operators shown of a room."""


def command_line(tool: str, argv: list[str], out: Path) -> list[str]:
    """The command that runs `lsep profile *argv` under `tool`, recording its window only, into `out`."""
    argv = _without(argv, "--run", values=1)
    report = str(out / tool)
    if tool == "nsys":
        head = [
            "nsys", "profile", "--trace=cuda,nvtx,cublas,cudnn", "--cuda-graph-trace=node", "--sample=none",
            "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true",
            f"--output={report}",
        ]  # fmt: skip
    else:
        # Every kernel of the window is replayed for every group of counters: one step is enough.
        argv = [*_without(argv, "--steps", values=1), "--steps", "1"]
        head = [
            "ncu", "--profile-from-start", "off", "--nvtx", "--set", "basic", "--force-overwrite", "--export", report,
        ]  # fmt: skip
    return [*head, sys.executable, "-m", "lsep", "profile", *_without(argv, "--no-trace"), "--no-trace"]


def _without(argv: list[str], flag: str, values: int = 0) -> list[str]:
    """`argv` without `flag` and what it takes, in both spellings."""
    kept, skip = [], 0
    for argument in argv:
        if skip:
            skip -= 1
        elif argument == flag:
            skip = values
        elif not argument.startswith(flag + "="):
            kept.append(argument)
    return kept


def run_tool(tool: str, config: Config, argv: list[str], out: Path) -> None:
    """Run this profile under `tool`; raises UserError where that is impossible, or fails."""
    if shutil.which(tool) is None:
        raise UserError(f"--run {tool}: {tool} is not on the PATH, it comes with {TOOLS[tool]} or the CUDA toolkit")
    if pick_device(config.train.device).type != "cuda":
        raise UserError(f"--run {tool} needs a GPU, and the device is the CPU; without --run torch's profiler is used")
    check(config)
    _check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    command = command_line(tool, argv, out)
    print(shlex.join(command), flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"--run {tool}: it ended with exit code {code}")


def profile(config: Config, out: Path, steps: int, warmup: int, argv: list[str], traced: bool = True) -> None:
    """Run `warmup` steps and profile the next `steps`; `argv` is what came after `lsep profile`.

    traced: torch's profiler writes `out`/trace.json and profile.md, and the table and the commands for Nsight are
    printed. Otherwise only the window is marked, for the tool around this process.
    """
    for name, value, least in (("--steps", steps, 1), ("--warmup", warmup, 0)):
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")
    device = pick_device(config.train.device)
    if not traced and device.type != "cuda":
        raise UserError("--no-trace marks a window for nsys or ncu, which needs a GPU, and the device is the CPU")
    _check_out(out)
    # There are no ranges in compiled blocks and in the replay of a graph: both only where they are asked for.
    auto = [name for name in ("train.compile", "train.graphs") if flat(config)[name] == "auto"]
    config = override(config, dict.fromkeys(auto, "off"))
    state = setup(config)
    for note in state.notes:
        print(f"lsep: {note}", file=sys.stderr)
    if not traced:
        seconds = _steps(state, steps, warmup, _cuda_window())
        print(f"a window of {steps} steps after {warmup}: {1000 * seconds / steps:.4g} ms a step under the tool")
        return
    rates = measure(device, torch.bfloat16 if state.bf16 else torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    _steps(state, steps, warmup, _torch_window(device, out / "trace.json"))
    found = trace.read(out / "trace.json")
    text = table(found, steps, _work(state), rates)
    write_atomic(out / "profile.md", text)
    print(text)
    print(f"{out / 'trace.json'}: open in https://ui.perfetto.dev; the table is in {out / 'profile.md'}")
    print("\nThe same window on a GPU under Nsight Systems and Nsight Compute (or --run nsys, --run ncu):")
    for tool in TOOLS:
        print(shlex.join(command_line(tool, argv, out)))


def _check_out(out: Path) -> None:
    if Run(out).config_file.exists():
        raise UserError(f"--out {out} is a run directory, a profile is not written there: choose another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a directory")


def _steps(state: State, steps: int, warmup: int, window: AbstractContextManager[None]) -> float:
    """Warm up, then run `steps` steps inside `window`; the seconds of these."""
    loader: Iterator[list[Batch]] = iter(open_loader(state, 0, warmup + steps))
    # Backward runs on this thread, not on one of autograd's own: so its kernels lie inside the ranges of this thread.
    with recording(state.device), torch.autograd.set_multithreading_enabled(False):
        for step in range(warmup):
            train_step(state, step, next(loader))
        _wait(state.device)
        with window:
            start = time.perf_counter()
            with span(trace.WINDOW):
                for step in range(warmup, warmup + steps):
                    with span("step", step):
                        with span("data"):
                            batches = next(loader)
                        train_step(state, step, batches)
                _wait(state.device)
            return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _cuda_window() -> Iterator[None]:
    """What `--capture-range=cudaProfilerApi` and `--profile-from-start off` wait for."""
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


@contextmanager
def _torch_window(device: torch.device, file: Path) -> Iterator[None]:
    """Torch's profiler, its Chrome trace in `file`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    with replacing(file) as partial:
        profiler.export_chrome_trace(str(partial))


def _work(state: State) -> dict[str, Work]:
    manifest, probe = state.source.manifest, state.config.probe
    row = torch.empty(0, dtype=getattr(torch, manifest.dtype)).element_size()
    for side in manifest.row_shape:
        row *= side
    params = sum(p.numel() for p in state.objective.parameters())
    return step_work(state.config, manifest, params, row, probe.enabled and probe.end_step != 0)


def table(found: trace.Profile, steps: int, work: dict[str, Work], rates: Rates) -> str:
    """The profile as Markdown: rooms, in each the longest kernels or operators, with the room's floor."""
    rows = [("room, kernel or operator", "ms a step", "share", "calls a step", "floor, ms"), ("---", *["---:"] * 4)]

    def row(name: str, items: list[trace.Item], floor: str = "") -> None:
        us, calls = sum(i.us for i in items), sum(i.calls for i in items)
        rows.append((name, f"{us / steps / 1000:.3f}", f"{us / found.us:.1%}", f"{calls / steps:.1f}", floor))

    least = {room: w.seconds(rates) for room, w in work.items()}
    whole = sum(least.values())
    if found.room("compiled"):  # its kernels are those of several rooms, which then have but a part of theirs
        outside = {"optimizer": least.pop("optimizer", 0.0)}
        least = {**outside, "compiled": sum(least.values())}
    for room in trace.ROOMS:
        items = found.room(room)
        if not items:
            continue
        row(f"**{room}**", items, f"{1000 * least[room]:.3f}" if room in least else "")
        for item in items[:TOP] if room != "idle" else []:
            row(f"`{item.name[:60].replace('|', '/')}`", [item])
        if len(items) > TOP:
            row(f"{len(items) - TOP} more", items[TOP:])
    row("**step**", found.items, f"{1000 * whole:.3f}")
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    note = (
        f"{steps} steps, under the profiler. Floor: of each operation the longer of its FLOPs at "
        f"{rates.flops / 1e12:.3g} TFLOP/s and its bytes at {rates.bytes / 1e9:.3g} GB/s, a product and a copy "
        "measured before the window."
    )
    return "\n".join([*lines, "", note, ""])
