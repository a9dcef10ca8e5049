"""Training: the loop around `lsep.step`, with its logs, checkpoints and clock.

from lsep.config import PRESETS
from lsep.train import train
train(PRESETS["quickstart"], "runs/mine")
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lsep import checkpoint, overhead
from lsep.config import Config
from lsep.data.loader import Batch
from lsep.errors import UserError
from lsep.metrics import Logger
from lsep.objective import TIME_BINS
from lsep.optim import rate_factor
from lsep.run import Run
from lsep.step import State, open_loader, setup, train_step

MAX_LOST = 10
"""A run ends when no step of so many, and of a whole log window, has a finite gradient."""


def train(
    config: Config, run_dir: str | Path, resume: bool = False, preset: str = "custom", strict: bool = False
) -> Run:
    """Train into `run_dir`, or go on with the run there; returns it with checkpoints, metrics, samples and report.

    resume: the run must have a checkpoint (otherwise one is used when it is there). strict: the newest checkpoint must
    be whole (otherwise the newest whole one is used). Raises UserError on bad input, and KeyboardInterrupt after a
    Ctrl-C, once a checkpoint is written.
    """
    run = Run(run_dir)
    if resume and checkpoint.latest(run.checkpoints) is None:
        raise UserError(f"--resume: no checkpoint in {run.checkpoints}")
    state = setup(config)
    with run.locked():
        run.check(state.config, state.source.manifest)
        checkpoints = checkpoint.Checkpoints(run.checkpoints, config.train.keep_last, config.train.keep_every)
        with closing(checkpoints):
            _train(state, run, checkpoints, preset, strict)
    return run


def _train(state: State, run: Run, checkpoints: checkpoint.Checkpoints, preset: str, strict: bool) -> None:
    from lsep import report

    config = state.config
    progress = checkpoints.load_newest(state.objective, state.ema, state.optimizer, strict)
    progress = progress or checkpoint.Progress(0, 0.0)
    if progress.step > config.train.steps:
        raise UserError(f"--train.steps is {config.train.steps}, but {run.path} is at step {progress.step} already")
    run.open(state.config, state.source.manifest, preset)
    if run.results().get("steps") == progress.step == config.train.steps:
        print(f"{run.path}: already at step {progress.step} of {config.train.steps}, nothing to train")
        return
    run.forget_after(progress.step)
    logger = Logger(run, progress.step, state.config.train.steps, config.train.wandb, asdict(state.config))
    try:
        if progress.step:
            logger.say(f"continuing {run.path} at step {progress.step}")
        with _interruptible() as interrupted:
            batches = _loop(state, run, checkpoints, logger, progress, interrupted)
        checkpoints.finish()
        if interrupted():
            raise KeyboardInterrupt

        def measured() -> dict[str, Any]:
            rounds = config.train.overhead_rounds if config.probe.enabled else 0
            return overhead.measure(state, batches, rounds) if batches and rounds else {}

        results = report.finish(state.ema.model, state.config, state.source.manifest, run, state.device, measured)
        logger.say(results)
    finally:
        logger.close()


def _loop(
    state: State,
    run: Run,
    checkpoints: checkpoint.Checkpoints,
    logger: Logger,
    progress: checkpoint.Progress,
    interrupted: Callable[[], bool],
) -> list[Batch]:
    """Train to the end, or until interrupted; a copy of the last step's batches."""
    config, step = state.config.train, progress.step
    clock = _Clock(state.device, progress)
    window = _Window(state, step, progress.seconds)
    loader = open_loader(state, step, config.steps)
    for batches in loader:
        with clock.step():
            window.add(train_step(state, step, batches))
        step += 1
        logger.advance()
        stop = step == config.steps or interrupted()
        save = stop or step % config.checkpoint_every == 0
        if save or step % config.log_every == 0:  # a checkpoint closes the window, so that resuming repeats it
            logger.log({**window.close(step, clock), "skipped_rows": loader.skipped})
        if save:
            with clock.paused():
                now = checkpoint.Progress(step, clock.seconds, clock.gpu_seconds)
                checkpoints.save(now, state.objective, state.ema, state.optimizer)
        if config.sample_every and step % config.sample_every == 0 and step < config.steps:
            with clock.paused(), logger.outliving("a sample grid"):
                _draw_grid(state, run, step)
        if stop:
            return [Batch(*(t.clone() for t in batch)) for batch in batches]
    return []


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
            "gpu_seconds": round(clock.gpu_seconds, 3) if clock.cuda else None,
            "loss": None if denoising is None or lsep is None else denoising + lsep,
            "denoising": denoising,
            "lsep": lsep,
            "grad_norm": norm,
            "skipped_steps": int(skipped),
            "lr": config.optim.lr * rate_factor(step - 1, config.optim, config.train.steps),
            "probe_accuracy": sum(hits) / sum(counts) if sum(counts) else None,
            "probe_accuracy_by_time": [h / c if c else None for h, c in zip(hits, counts, strict=True)],
            "images_per_second": count * config.train.batch_size / max(seconds - self.seconds, 1e-9),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(clock.device) if clock.cuda else None,
        }
        self.step, self.seconds, self.sums = step, seconds, None
        return line


class _Clock:
    """Seconds spent training: the time for checkpoints and sample grids is left out."""

    def __init__(self, device: torch.device, before: checkpoint.Progress) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.start = time.perf_counter() - before.seconds
        self.gpu = before.gpu_seconds
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def gpu_seconds(self) -> float:
        """From the begin to the end of each step on the GPU: waiting for data is left out. Waits for the last step."""
        for begin, end in self.events:
            end.synchronize()
            self.gpu += begin.elapsed_time(end) / 1e3
        self.events.clear()
        return self.gpu

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        if not self.cuda:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.events.append((begin, end))

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.cuda:
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
