"""Where the figures of a run go: metrics.jsonl, TensorBoard, Weights & Biases when asked for, and the terminal."""

import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsep import files
from lsep.errors import DISK, UserError, shown
from lsep.run import Run
from lsep.voice import heard


class Logger:
    """Writes figures to every place, with a progress bar, or plain lines where the output is no terminal."""

    def __init__(self, run: Run, first: int, steps: int, wandb_project: str | None, settings: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.run = run
        self.wandb = _start_wandb(run, wandb_project, settings) if wandb_project else None
        self.steps = steps
        self.terminal = sys.stderr.isatty() and heard("info")
        # Its own rate would count samples and checkpoints in; that of training is in the figures behind.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(
            total=steps, initial=first, disable=not self.terminal, unit="step", dynamic_ncols=True, bar_format=layout
        )
        self.tensorboard = self._open_tensorboard(first)
        self._describe(settings)

    def _open_tensorboard(self, first: int) -> Any:
        """TensorBoard's writer, or None where it takes no folder of this name."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.path / "tensorboard"
        try:
            str(folder).encode()
        except UnicodeEncodeError:  # bytes that are no UTF-8, or a locale without these letters
            self.say(f"{folder}: TensorBoard takes no such name, and gets nothing; training goes on", "warning")
            return None
        # Events of steps that a killed session lost are hidden by purge_step.
        return SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def _describe(self, settings: dict[str, Any]) -> None:
        """The configuration once per session, where TensorBoard shows text and where it shows hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        if self.tensorboard is None:
            return
        values = {f"{s}.{k}": v for s, part in settings.items() if isinstance(part, dict) for k, v in part.items()}
        rows = [f"| {name} | `{value!r}` |" for name, value in values.items()]
        known = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
        with self.outliving("TensorBoard's events"):
            self.tensorboard.add_text("configuration", "\n".join(["| field | value |", "|---|---|", *rows]))
            writer = self.tensorboard._get_file_writer()  # add_hparams would write a run of its own beside this one
            for summary in hparams(known, {"loss": 0.0}):
                writer.add_summary(summary)

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture that this run has written, for TensorBoard."""
        import numpy as np
        from PIL import Image

        if self.tensorboard is None:
            return
        with self.outliving("TensorBoard's events"), Image.open(path) as image:
            self.tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def advance(self) -> None:
        self.bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics; step, loss, probe accuracy and images/s also go to the terminal."""
        with self.outliving("metrics.jsonl"):
            self.run.append_metrics(values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self._add_scalars(values["step"], numbers, values.get("probe_accuracy_by_time") or [])
        if self.wandb is not None:
            self.wandb.log({**numbers, "step": values["step"]})
        accuracy = values["probe_accuracy"]
        shown = {
            "loss": "not finite" if values["loss"] is None else f"{values['loss']:.4f}",
            **({} if accuracy is None else {"probe": f"{accuracy:.1%}"}),
            **({"FD": f"{values['frechet_distance']:.4g}"} if "frechet_distance" in values else {}),
            "img/s": f"{values['images_per_second']:.0f}",
        }
        left = (self.steps - values["step"]) * values["seconds"] / values["step"]
        if self.terminal:
            self.bar.set_postfix({**shown, "left": _minutes(left)}, refresh=True)
            return
        if not heard("info"):
            return
        figures = "  ".join(f"{k} {v}" for k, v in shown.items())
        print(f"step {values['step']}/{self.steps}  {figures}  {_minutes(left)} left", flush=True)

    def _add_scalars(self, step: int, numbers: dict[str, float], by_time: list[float | None]) -> None:
        if self.tensorboard is None:
            return
        edge = 1 / max(len(by_time), 1)
        bins = {f"{i * edge:.1f}-{(i + 1) * edge:.1f}": share for i, share in enumerate(by_time) if share is not None}
        numbers = numbers | {f"probe_accuracy_by_time/{name}": share for name, share in bins.items()}
        with self.outliving("TensorBoard's events"):
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)

    def say(self, text: str, level: str = "info") -> None:
        """A line on the terminal that does not tear the progress bar."""
        if not heard(level):
            return
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    @contextmanager
    def outliving(self, what: str) -> Iterator[None]:
        """A disk that does not take `what`, which training can do without, is said and no more."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK:
                raise
            self.say(f"{what} could not be written ({error.strerror}); training goes on", "warning")

    def close(self) -> None:
        self.bar.close()
        if self.tensorboard is not None:
            with self.outliving("TensorBoard's events"):
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


_WANDB_ID = re.compile("[A-Za-z0-9_-]{1,128}", re.ASCII)


class Quiet:
    """The logger of every process but the first: says nothing."""

    def advance(self) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        pass

    def say(self, text: str, level: str = "info") -> None:
        pass

    def picture(self, name: str, path: Path, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def require_wandb() -> Any:
    """The module wandb; raises UserError when it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--train.wandb needs the package wandb, which is not installed: pip install wandb") from None
    return wandb


def _start_wandb(run: Run, project: str, settings: dict[str, Any]) -> Any:
    # The id is the run's own, not its name's: another run of the same name must not continue this one's curves.
    try:
        name = files.read_plain(run.wandb_file).decode("ascii", "replace").strip()
    except FileNotFoundError:
        name = uuid.uuid4().hex
        files.write_atomic(run.wandb_file, name)
    if not _WANDB_ID.fullmatch(name):
        raise UserError(f"{run.wandb_file}: is {shown(name)}, expected the id of a W&B run: remove it for a new one")
    recorder = require_wandb().init(
        project=project, dir=str(run.path), name=run.path.name, id=name, resume="allow", config=settings
    )
    # W&B drops values at a step of its own that is not above the last: those after a rollback, and of a session that
    # went on from an earlier checkpoint. Against a metric of ours it keeps all.
    recorder.define_metric("step")
    recorder.define_metric("*", step_metric="step")
    return recorder
