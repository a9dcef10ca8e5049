"""Training: the loop around `lsep.step`, with its logs, checkpoints, signals and what to do when it goes wrong.

from lsep.presets import PRESETS
from lsep.train import train
train(PRESETS["quickstart"], "runs/mine")
"""

import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lsep import checkpoint, overhead, sample, shards, voice
from lsep.averages import POWER
from lsep.checkpoint import Checkpoints, Progress, latest
from lsep.config import Config
from lsep.data.loader import Batch
from lsep.diagnose import not_finite
from lsep.dist import Agreement, world
from lsep.errors import UserError
from lsep.evaluate.monitor import Monitor
from lsep.fitting import memory_runs_out
from lsep.metrics import Logger, Quiet
from lsep.optim import rate_factor
from lsep.run import Run
from lsep.signals import Preempted, heard
from lsep.step import State, average_model, open_loader, pick_device, setup, train_step
from lsep.window import HISTORY, Clock, Spikes, Window

MAX_ROLLBACKS = 5
"""Returns to the same checkpoint after which a run ends."""


def train(
    config: Config, run_dir: str | Path, resume: bool = False, preset: str = "custom", strict: bool = False
) -> Run:
    """Train into `run_dir`, or go on with the run there; returns it with checkpoints, metrics, samples and report.

    Under torchrun all processes call this. resume: the run must have a checkpoint (otherwise one is used when it is
    there). strict: the newest checkpoint must be whole (otherwise the newest whole one is used). Raises UserError on
    bad input; once a checkpoint is written KeyboardInterrupt after a Ctrl-C and Preempted after SIGTERM or SIGUSR1.
    """
    run = Run(run_dir)
    with world(config, pick_device(config.train.device)) as here, ExitStack() as stack:
        here.at("the start")

        def look() -> None:
            run.require_plain()
            sample.require(config.sample.sampler)  # not only at the first grid
            if resume and latest(run.checkpoints) is None:
                raise UserError(f"--resume: no checkpoint in {run.checkpoints}")

        def take() -> None:
            stack.enter_context(run.locked())
            run.check(state.config, state.source.manifest, state.teacher.identity)

        here.on_main(look)
        begins, settled = here.on_main(lambda: (latest(run.checkpoints) is None, run.settled(config)))
        state = here.together(lambda: setup(settled, here, begins))
        monitor = here.together(lambda: Monitor(state)) if state.config.train.eval_every else None
        here.on_main(take)
        checkpoints = Checkpoints(run.checkpoints, config.train.keep_last, config.train.keep_every, here)
        stack.enter_context(closing(checkpoints))
        snapshots = None
        if state.config.optim.ema_snapshot_every:
            snapshots = stack.enter_context(closing(Checkpoints(run.snapshots, world=here)))
        with memory_runs_out(state.config, here, state.source.manifest.probe_classes):
            _Training(state, run, checkpoints, snapshots, monitor).run_from_newest(preset, strict)
    return run


@dataclass(frozen=True)
class _Outcome:
    """How a loop ended: at the last step, by a signal, or by a spike that asks for a rollback."""

    step: int
    batches: list[Batch]
    """A copy of the last step's."""
    signum: int = 0
    rollback: bool = False


class _Training:
    """One session of a run, on one of its processes."""

    def __init__(
        self, state: State, run: Run, checkpoints: Checkpoints, snapshots: Checkpoints | None, monitor: Monitor | None
    ) -> None:
        self.state, self.run, self.checkpoints, self.monitor = state, run, checkpoints, monitor
        self.snapshots = snapshots
        self.world, self.settings = state.world, state.config.train
        self.logger: Logger | Quiet = Quiet()
        self.spikes = Spikes(self.settings.spike_factor)

    def run_from_newest(self, preset: str, strict: bool) -> None:
        """Load, train to the end, and draw, measure and report."""
        state, steps = self.state, self.settings.steps
        progress, notes = self.load(strict), list[str]()

        def start() -> list[float | None] | None:
            if progress.step > steps:
                raise UserError(f"--train.steps is {steps}, but {self.run.path} is at step {progress.step} already")
            if progress.step == steps and self.is_whole():
                return None
            notes.extend(self.changes(progress))
            self.run.open(state.config, state.source.manifest, preset, state.teacher.identity)
            self.forget_after(progress.step)
            self.logger = Logger(self.run, progress.step, steps, self.settings.wandb, asdict(state.config))
            return [line.get("loss") for line in self.run.metrics()]

        losses = self.world.on_main(start)
        if losses is None:
            return
        for loss in losses[-2 * HISTORY :]:  # what is a spike does not depend on where a session began
            self.spikes.seen(loss)
        try:
            for note in self.state.notes:
                self.logger.say(f"lsep: {note}", "warning" if note.startswith("warning") else "info")
            if progress.step:
                self.logger.say(f"continuing {self.run.path} at step {progress.step}")
            for text in notes:
                self.logger.say(text)
            if self.monitor is not None:
                self.monitor.prepare(self.run.path)
            with heard() as asked:
                outcome = self.train(progress, asked)
            self.world.at(f"the last write of the checkpoint of step {outcome.step}")
            self.checkpoints.finish()
            if self.snapshots is not None:
                self.snapshots.finish()
            if outcome.signum == signal.SIGINT:
                raise KeyboardInterrupt
            if outcome.signum:
                raise Preempted(outcome.signum, outcome.step)
            self.finish(outcome.batches, progress)
        finally:
            self.logger.close()

    def changes(self, progress: Progress) -> list[str]:
        """What makes a run that goes on differ from an unbroken one."""
        if not progress.step or not self.run.config_file.exists():
            return []
        config, before, said = self.state.config, self.run.config(), []
        if config.optim.schedule == "cosine" and before.train.steps != self.settings.steps:
            old, new = (
                rate_factor(min(progress.step, steps), config.optim, steps)
                for steps in (before.train.steps, self.settings.steps)
            )
            said.append(
                f"--train.steps is {self.settings.steps} now and was {before.train.steps}: from here on the cosine is "
                f"that of {self.settings.steps} steps, {new:.3g} of --optim.lr at this step instead of {old:.3g}"
            )
        sessions, threads = self.run.sessions(), str(torch.get_num_threads())
        if self.state.device.type == "cpu" and sessions and sessions[-1]["threads"] not in ("?", threads):
            said.append(
                f"{threads} threads now, {sessions[-1]['threads']} before: sums round in another order, so that the "
                "numbers are those of an unbroken run but for rounding"
            )
        return said

    def is_whole(self) -> bool:
        """Whether a run that is at its last step has all that an end leaves; a page that is missing is made here."""
        from lsep import ending, report

        missing = ending.missing(self.run, self.settings.steps)
        if missing and missing != [ending.REPORT]:
            return False
        made = report.render(self.run) if missing else None
        if voice.heard("info"):
            print(f"{self.run.path}: already at step {self.settings.steps} of {self.settings.steps}, nothing to train")
            if made:
                print(f"report:  {made}, which was missing")
        return True

    def load(self, strict: bool = False) -> Progress:
        """The newest checkpoint's state, or the beginning."""
        state = self.state
        found = self.checkpoints.load_newest(state.objective, state.ema, state.optimizer, strict, state.averages)
        progress = found or Progress(0, 0.0)
        state.offset = progress.data_offset
        return progress

    def forget_after(self, step: int) -> None:
        """Drop what was written of later steps: they are lost, and will be run again, after a spike on other data."""
        self.run.forget_after(step)
        for path in checkpoint.steps(self.run.snapshots):
            if int(path.name) > step:
                shards.remove(path)

    def train(self, progress: Progress, asked: Callable[[], int]) -> _Outcome:
        """Loop until the end or a signal, going back to the last checkpoint after spikes that ask for it."""
        rollbacks: dict[int, int] = {}
        while True:
            outcome = self.loop(progress, asked)
            if not outcome.rollback:
                return outcome
            self.checkpoints.wait()
            if self.snapshots is not None:
                self.snapshots.wait()
            offset = self.state.offset
            progress = self.load()
            rollbacks[progress.step] = rollbacks.get(progress.step, 0) + 1
            if rollbacks[progress.step] > MAX_ROLLBACKS:
                raise UserError(
                    f"{self.run.path}: {MAX_ROLLBACKS} returns to step {progress.step} have not ended the loss spikes: "
                    "start another --run-dir with a lower --optim.lr"
                )
            # What came between them and the checkpoint is left out, also by what is resumed from here.
            self.state.offset = offset + outcome.step - progress.step
            self.world.on_main(partial(self.forget_after, progress.step))
            self.logger.say(
                f"back at step {progress.step}; the data of {outcome.step - progress.step} steps is left out"
            )

    def loop(self, progress: Progress, asked: Callable[[], int]) -> _Outcome:
        state, settings, world, step = self.state, self.settings, self.world, progress.step
        clock, window = Clock(world, progress), Window(state, progress)
        agreement = Agreement(world)
        loader = open_loader(state, step, settings.steps)
        world.at(f"the data of step {step + 1}")
        for batches in loader:
            world.at(f"the exchange of gradients of step {step + 1}")
            with clock.step():
                window.add(train_step(state, step, batches))
            step += 1
            self.logger.advance()
            world.at(f"whether to stop after step {step}")
            signum = agreement(asked())
            stop = step == settings.steps or signum > 0
            save = stop or step % settings.checkpoint_every == 0
            measure = self.monitor is not None and step % settings.eval_every == 0
            spike = None
            # A checkpoint closes the window, so that resuming repeats it.
            if save or measure or step % settings.log_every == 0:
                world.at(f"the averages of step {step}")
                line = window.close(step, clock)
                if window.skipped_in_a_row >= settings.max_skipped:
                    self.give_up(step, window.skipped_in_a_row, batches)
                distance = self.distance(step, clock) if measure else {}
                self.logger.log({**line, "skipped_rows": loader.skipped, **distance})
                spike = self.spikes.seen(line["loss"]) if settings.on_spike != "off" else None
                if spike is not None:
                    self.logger.say(
                        f"step {step}: the loss is {line['loss']:.4g}, {spike:.4g} in the windows before", "warning"
                    )
            if spike is not None and settings.on_spike == "rollback":
                agreement.close()
                return _Outcome(step, [], rollback=True)
            if save:
                world.at(f"the checkpoint of step {step}")
                with clock.paused():
                    gpu_seconds = line["gpu_seconds"] or progress.gpu_seconds  # a run may go on without a GPU
                    now = Progress(step, clock.seconds, gpu_seconds, state.offset)
                    self.checkpoints.save(now, state.objective, state.ema, state.optimizer, state.averages)
            if self.snapshots is not None and (
                step % state.config.optim.ema_snapshot_every == 0 or step == settings.steps
            ):
                world.at(f"the averages' copy of step {step}")
                with clock.paused():
                    profiles = {name: m for name, m in state.averages.items() if name.startswith(POWER)}
                    self.snapshots.save_averages(Progress(step, clock.seconds), profiles)
            if settings.sample_every and step % settings.sample_every == 0 and step < settings.steps:
                world.at(f"the samples of step {step}")
                with clock.paused():
                    self.draw_grid(step)
            if stop:
                agreement.close()
                return _Outcome(step, [batch.clone() for batch in batches], signum)
            world.at(f"the data of step {step + 1}")
        return _Outcome(step, [])

    def give_up(self, step: int, skipped: int, batches: list[Batch]) -> None:
        """End the run, saying what is not finite."""
        clause = not_finite(self.state, step - 1, batches)
        self.checkpoints.wait()
        kept = latest(self.run.checkpoints)
        saved = f"{kept} is intact" if kept else "there is no checkpoint yet"
        self.world.on_main(
            lambda: _fail(
                f"{skipped} steps in a row up to step {step} had no finite gradient and were skipped: {clause}; "
                f"{saved}; start another --run-dir with a lower --optim.lr, or raise --train.max-skipped"
            )
        )

    def distance(self, step: int, clock: Clock) -> dict[str, float]:
        assert self.monitor is not None
        with clock.paused():
            return {"frechet_distance": self.monitor.distance(step)}

    def draw_grid(self, step: int) -> None:
        model = average_model(self.state)
        if model is not None:
            config, manifest = self.state.config, self.state.source.manifest
            labels = sample.grid_labels(config.sample.num, manifest.num_classes)
            x = sample.draw(model, config, labels, config.train.seed)
            sample.save_grid(sample.to_images(x, manifest), self.run.grid(step))
            self.logger.picture("samples", self.run.grid(step), step)
        self.world.barrier()

    def finish(self, batches: list[Batch], progress: Progress) -> None:
        """The last samples, the cost of LSEP, results and report."""
        from lsep import ending

        state, model = self.state, average_model(self.state)
        self.world.at("the samples and the report at the end")

        def measured() -> dict[str, Any]:
            rounds = self.settings.overhead_rounds if state.config.probe.enabled else 0
            program = {"program": state.backends.named()}
            return program | (overhead.measure(state, batches, rounds) if batches and rounds else {})

        if model is None:
            measured()
        else:
            manifest, anew = state.source.manifest, bool(batches)
            self.logger.say(
                ending.finish(model, state.config, manifest, self.run, state.device, progress, measured, anew)
            )
            self.logger.picture("samples", self.run.grid(self.settings.steps), self.settings.steps)
        self.world.barrier()


def _fail(text: str) -> None:
    raise UserError(text)
