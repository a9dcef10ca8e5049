"""Section `pretraining`: minutes of real training, through the program a user runs.

`lsep.train.train` on a store on disk with loader, checkpoints, logs, samples and report, everything as `auto` has it: a
rate is measured first, then as many steps are trained as fill the time. It must learn, lose no step, keep its speed to
the end, and go on from its last checkpoint.
"""

import importlib.util
import math
import statistics
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.section import Context, Section
from bench.training import CLASSES, write_patterns
from lsep.config import Config, override
from lsep.run import Run
from lsep.train import train

MIN_SECONDS, AROUND = 30.0, 90.0
"""The shortest training, and what is kept of the section's time for compiling, measuring the rate and resuming."""
WINDOWS = 10
"""Log windows that are compared at the begin and at the end."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the run."""

    seconds: float
    trial_steps: int
    log_every: int
    rows: int
    side: int
    changes: dict[str, Any]


FULL = Plan(
    180.0, 300, 10, 16384, 32,
    {"model.depth": 12, "model.hidden_size": 768, "model.num_heads": 12, "probe.depth": 4, "train.batch_size": 256},
)  # fmt: skip
"""SiT-B/2 at 256 px, by its latents' size."""
SMOKE = Plan(
    1.0, 4, 1, 64, 8,
    {"model.depth": 2, "model.hidden_size": 32, "model.num_heads": 2, "probe.depth": 1, "probe.window_min": 3,
     "train.batch_size": 16, "backend.kernels": "reference"},
)  # fmt: skip


def configuration(store: Path, plan: Plan, steps: int) -> Config:
    return override(Config(), {
        "optim.lr": 3e-4, "optim.probe_lr": 1e-3, "optim.warmup_steps": 20, "optim.ema_decay": 0.99,
        "data.path": str(store), "data.loader": "torch", "train.steps": steps, "train.log_every": plan.log_every,
        "train.checkpoint_every": max(1, steps // 3), "train.sample_every": 0, "sample.num": 16, "sample.steps": 10,
        **plan.changes,
    })  # fmt: skip


def steps_in(seconds: float, rate: float, log_every: int) -> int:
    """Steps that fill `seconds`: whole log windows, so that every line of the log is one and a resume adds one."""
    return log_every * max(2 * WINDOWS, round(seconds * rate / log_every))


def pretraining(context: Context, section: Section) -> None:
    """A training of three minutes, or as many as are left: learned, nothing lost, steady speed, resumable."""
    plan = SMOKE if context.smoke else FULL
    # All of `lsep train` runs, logs and plots included, and these are not on every machine that has a GPU.
    absent = [name for name in ("tensorboard", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if absent:
        section.skipped.append(f"lsep train needs {', '.join(absent)}: pip install {' '.join(absent)}")
        return
    seconds = min(plan.seconds, max(MIN_SECONDS, context.seconds_left(math.inf) - AROUND))
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w") as log, redirect_stdout(log):
        store = Path(folder) / "store"
        write_patterns(store, plan.rows, plan.side)
        trial = train(configuration(store, plan, plan.trial_steps), Path(folder) / "trial")
        lines = trial.metrics()[plan.trial_steps // plan.log_every // 2 :]
        rate = statistics.median(line["images_per_second"] for line in lines) / plan.changes["train.batch_size"]
        steps = steps_in(seconds, rate, plan.log_every)
        run = train(configuration(store, plan, steps), Path(folder) / "run")
        before = run.metrics()
        _judge(section, run, before, full=not context.smoke)
        more = train(configuration(store, plan, steps + plan.log_every), run.path, resume=True).metrics()
    going_on = more[: len(before)] == before and len(more) == len(before) + 1
    section.check(going_on, f"after a resume metrics.jsonl has {len(more)} lines, expected {len(before) + 1}")
    section.details["metrics"] = more
    section.notes.append(
        f"{steps} steps of batch {plan.changes['train.batch_size']}, {(plan.side // 2) ** 2} tokens, {plan.changes}, "
        f"on {plan.rows} latents of {CLASSES} patterns and noise, read from disk."
    )


def _judge(section: Section, run: Run, lines: list[dict[str, Any]], full: bool) -> None:
    """Figures of the run and what is expected of them; a smoke test is too short to learn or to be steady."""
    results = run.results()
    speeds = [line["images_per_second"] for line in lines]
    settled = speeds[WINDOWS:-WINDOWS] if full else speeds
    first, last = statistics.median(settled[: 2 * WINDOWS]), statistics.median(settled[-2 * WINDOWS :])
    losses = [line["denoising"] for line in lines]

    def row(figure: str, found: Any, expected: str = "", good: bool | None = None) -> None:
        ok = None if good is None or not full else section.check(good, f"{figure} is {found}, expected {expected}")
        section.rows.append({"figure": figure, "found": found, "expected": expected, "ok": ok})

    row("training seconds", lines[-1]["seconds"])
    row("GPU seconds", lines[-1]["gpu_seconds"])
    row("images/s", statistics.median(settled))
    row("speed at the end / at the begin", last / first, "at least 0.95", last >= 0.95 * first)
    row("skipped steps", sum(line["skipped_steps"] for line in lines), "0", not any(m["skipped_steps"] for m in lines))
    row("denoising loss, first window", losses[0])
    row("denoising loss, last window", losses[-1], "below 0.5 of the first", losses[-1] < 0.5 * losses[0])
    accuracy = lines[-1]["probe_accuracy"]
    row("probe accuracy", accuracy, f"above {3 / CLASSES}", (accuracy or 0.0) > 3 / CLASSES)
    row("peak memory, GiB", (lines[-1]["peak_memory_bytes"] or 0) / 2**30)
    row("LSEP overhead, measured", results.get("lsep_overhead"))
