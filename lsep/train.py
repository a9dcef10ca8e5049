"""Training: `setup`, `train_step`, and the loop.

from lsep.config import PRESETS
from lsep.train import train
train(PRESETS["quickstart"], "runs/mine")
"""

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from lsep import backends, checkpoint
from lsep.checks import check, resolve
from lsep.config import Config
from lsep.data import order
from lsep.data.loader import Batch, Loader, open_source
from lsep.data.manifest import Source
from lsep.data.reader import Sequence
from lsep.doctor import missing_for_compile
from lsep.errors import UserError
from lsep.metrics import Logger, require_wandb
from lsep.objective import TIME_BINS, Losses, Objective
from lsep.optim import Optimizer, bf16_copies, build_optimizer, rate_factor
from lsep.plan import BranchPlan, branch_plan
from lsep.ranges import span
from lsep.run import Run

MAX_LOST = 10
"""A run ends when no step of so many, and of a whole log window, has a finite gradient."""


@dataclass
class State:
    """What a step needs."""

    config: Config
    source: Source
    device: torch.device
    objective: Objective
    ema: Objective
    optimizer: Optimizer
    forward: Callable[[Batch, BranchPlan, Tensor, Tensor], Losses]
    """The objective, or its copy in bf16; compiled or not."""
    plans: dict[bool, list[BranchPlan]]
    """With and without the probe, the plan of each micro-batch."""
    steps_per_epoch: int

    @property
    def bf16(self) -> bool:
        """Matmuls run in bf16, under autocast."""
        return self.config.train.precision == "bf16"


def pick_device(wanted: str) -> torch.device:
    """The device behind `--train.device` or `--device`."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no GPU here; expected 'cpu' or 'auto'"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def setup(config: Config) -> State:
    """Open the data, resolve and check the configuration, build modules and optimizer."""
    check(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process, expected 1")
    if config.train.wandb:
        require_wandb()
    device = pick_device(config.train.device)
    source = open_source(config.data)
    config = resolve(config, source.manifest)
    if config.train.precision == "auto":  # settled here, so that a run cannot change it on another machine
        precision: Literal["fp32", "bf16"] = "bf16" if device.type == "cuda" else "fp32"
        config = replace(config, train=replace(config.train, precision=precision))
    shards = config.optim.accumulate
    plans = {probe: [branch_plan(config, i, shards, probe) for i in range(shards)] for probe in (False, True)}
    chosen = backends.choose(config, device)
    objective = Objective(config, source.manifest, chosen.ops)
    objective.initialize(config.train.seed)
    objective.to(device)
    ema = copy.deepcopy(objective).eval().requires_grad_(False)
    copies = bf16_copies(objective) if backends.bf16_weights(config, chosen.optimizer) else None
    forward: Callable[..., Losses] = copies or objective
    if config.train.compile:
        missing = missing_for_compile(device.type)
        if missing:
            raise UserError(f"--train.compile on {device.type} needs {missing}")
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return State(
        config=config,
        source=source,
        device=device,
        objective=objective,
        ema=ema,
        optimizer=build_optimizer(objective, ema, config.optim, chosen.optimizer, copies),
        forward=forward,
        plans=plans,
        steps_per_epoch=order.steps_per_epoch(source.manifest.rows, config.train.batch_size),
    )


def open_loader(state: State, first: int, last: int) -> Loader:
    """The batches of steps `first` to `last - 1` (counted from 0)."""
    train, data = state.config.train, state.config.data
    accumulate, skip = state.config.optim.accumulate, data.on_corrupt == "skip"
    sequence = Sequence(state.source, train.seed, train.batch_size, accumulate, first, last, skip)
    return Loader(sequence, data, state.device)


def train_step(state: State, step: int, batches: list[Batch]) -> Tensor:
    """One optimizer step, without a host sync. `step` counts from 0.

    Returns (denoising, lsep, gradient norm, hits by bin of t, counts by bin of t, 0) on the device, see `Losses`; for a
    step that was skipped, because its gradient is not finite, zeros and a 1.
    """
    config = state.config
    probe = config.probe.enabled and (config.probe.end_step is None or step < config.probe.end_step)
    # Filled on the device: a tensor made from a host value would wait for the copy.
    at_step = torch.full((), step, dtype=torch.int64, device=state.device)
    at_epoch = torch.full((), step // state.steps_per_epoch, dtype=torch.int64, device=state.device)
    statistics = []
    for plan, batch in zip(state.plans[probe], batches, strict=True):
        with span("forward"), torch.autocast(state.device.type, torch.bfloat16, enabled=state.bf16):
            losses = state.forward(batch, plan, at_step, at_epoch)
        with span("backward"):
            (losses.total / len(batches)).backward()
        means = torch.stack([losses.denoising, losses.lsep]) / len(batches)
        statistics.append(torch.cat([means, losses.hits.flatten()]))
    with span("optimizer"):
        state.optimizer.set_rate(rate_factor(step, config.optim, config.train.steps))
        norm = state.optimizer.step()
    total = torch.stack(statistics).sum(0)
    finite = torch.isfinite(norm)
    total = torch.where(finite, torch.cat([total[:2], norm[None], total[2:]]), 0)
    return torch.cat([total, (~finite)[None].to(total.dtype)])


def train(config: Config, run_dir: str | Path, resume: bool = False, preset: str = "custom") -> Run:
    """Train into `run_dir`, or go on with the run there; returns it with checkpoints, metrics, samples and report.

    resume: the run must have a checkpoint (otherwise one is used when it is there). Raises UserError on bad input, and
    KeyboardInterrupt after a Ctrl-C, once a checkpoint is written.
    """
    from lsep import report

    run = Run(run_dir)
    if resume and checkpoint.latest(run.checkpoints) is None:
        raise UserError(f"--resume: no checkpoint in {run.checkpoints}")
    state = setup(config)
    run.check(state.config, state.source.manifest)
    progress = checkpoint.Progress(0, 0.0)
    found = checkpoint.latest(run.checkpoints)
    if found is not None:
        progress = checkpoint.load(found, state.objective, state.ema, state.optimizer)
    if progress.step > config.train.steps:
        raise UserError(f"--train.steps is {config.train.steps}, but {run.path} is at step {progress.step} already")
    run.open(state.config, state.source.manifest, preset)
    if run.results().get("steps") == progress.step == config.train.steps:
        print(f"{run.path}: already at step {progress.step} of {config.train.steps}, nothing to train")
        return run
    run.forget_after(progress.step)
    logger = Logger(run, progress.step, state.config.train.steps, config.train.wandb, asdict(state.config))
    try:
        if progress.step:
            logger.say(f"continuing {run.path} at step {progress.step}")
        with _interruptible() as interrupted:
            _loop(state, run, logger, progress, interrupted)
        if interrupted():
            raise KeyboardInterrupt
        results = report.finish(state.ema.model, state.config, state.source.manifest, run, state.device)
        logger.say(results)
    finally:
        logger.close()
    return run


def _loop(
    state: State, run: Run, logger: Logger, progress: checkpoint.Progress, interrupted: Callable[[], bool]
) -> None:
    config, step = state.config.train, progress.step
    clock = _Clock(state.device, progress.seconds)
    window = _Window(state, step, progress.seconds)
    loader = open_loader(state, step, config.steps)
    for batches in loader:
        window.add(train_step(state, step, batches))
        step += 1
        logger.advance()
        stop = step == config.steps or interrupted()
        save = stop or step % config.checkpoint_every == 0
        if save or step % config.log_every == 0:  # a checkpoint closes the window, so that resuming repeats it
            logger.log({**window.close(step, clock), "skipped_rows": loader.skipped})
        if save:
            with clock.paused():
                checkpoint.save(
                    run.checkpoints,
                    checkpoint.Progress(step, clock.seconds),
                    state.objective,
                    state.ema,
                    state.optimizer,
                )
                checkpoint.prune(run.checkpoints, config.keep_last, config.keep_every)
        if config.sample_every and step % config.sample_every == 0 and step < config.steps:
            with clock.paused():
                _draw_grid(state, run, step)
        if stop:
            return


def _draw_grid(state: State, run: Run, step: int) -> None:
    from lsep import sample

    labels = sample.grid_labels(state.config.sample.num, state.source.manifest.num_classes)
    x = sample.draw(state.ema.model, state.config, labels, state.config.train.seed)
    sample.save_grid(sample.to_images(x, state.source.manifest), run.samples / f"step-{step:07d}.png")


class _Window:
    """Statistics of the steps since the last log, summed on the device."""

    def __init__(self, state: State, step: int, seconds: float) -> None:
        self.state, self.step, self.seconds = state, step, seconds
        self.sums: Tensor | None = None
        self.lost = 0
        """Steps skipped one after the other, in windows in which all were."""

    def add(self, statistics: Tensor) -> None:
        self.sums = statistics if self.sums is None else self.sums + statistics

    def close(self, step: int, clock: "_Clock") -> dict[str, Any]:
        """The figures of metrics.jsonl at `step`; the one place where the host waits for the device."""
        assert self.sums is not None
        config, count = self.state.config, step - self.step
        *values, skipped = self.sums.tolist()
        done = count - int(skipped)
        self.lost = 0 if done else self.lost + count
        if self.lost >= MAX_LOST or not all(map(math.isfinite, values)):
            raise UserError(
                f"no step from {step - self.lost + 1} to {step} has a finite loss and gradient: "
                "start another --run-dir with a lower --optim.lr"
            )
        denoising, lsep, norm = (v / done if done else None for v in values[:3])
        hits, counts = values[3 : 3 + TIME_BINS], values[3 + TIME_BINS :]
        seconds = clock.seconds
        line = {
            "step": step,
            "epoch": step / self.state.steps_per_epoch,
            "images": step * config.train.batch_size,
            "seconds": round(seconds, 3),
            "loss": None if denoising is None or lsep is None else denoising + lsep,
            "denoising": denoising,
            "lsep": lsep,
            "grad_norm": norm,
            "skipped_steps": int(skipped),
            "lr": config.optim.lr * rate_factor(step - 1, config.optim, config.train.steps),
            "probe_accuracy": sum(hits) / sum(counts) if sum(counts) else None,
            "probe_accuracy_by_time": [h / c if c else None for h, c in zip(hits, counts, strict=True)],
            "images_per_second": count * config.train.batch_size / max(seconds - self.seconds, 1e-9),
        }
        self.step, self.seconds, self.sums = step, seconds, None
        return line


class _Clock:
    """Seconds spent training: the time for checkpoints and sample grids is left out."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the loop to stop after its step; a second one stops at once."""
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
