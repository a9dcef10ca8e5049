"""Figures reach the file, TensorBoard, W&B when asked for, and a terminal or plain lines."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsep.errors import UserError
from lsep.metrics import Logger
from lsep.run import Run

LINE: dict[str, Any] = {
    "step": 5, "seconds": 10.0, "loss": 0.5, "probe_accuracy": 0.25, "images_per_second": 64.0, "by_time": [None, 1.0],
}  # fmt: skip


def test_file_tensorboard_and_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(Run(tmp_path), 0, 10, None, {})
    logger.log(LINE)
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == LINE
    assert capsys.readouterr().out == "step 5/10  loss 0.5000  probe 25.0%  img/s 64  0:10 left\n"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in events.Scalars("probe_accuracy")] == [(5, 0.25)]
    assert "by_time" not in events.Tags()["scalars"]


def test_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = Logger(Run(tmp_path), 4, 10, None, {})
    logger.advance()
    logger.log(LINE)
    logger.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("5/10", "loss=0.5000", "probe=25.0%", "img/s=64"):
        assert text in captured.err


class Wandb:
    """A stand-in that keeps what the package would: of a step of its own only values above the last.

    The service itself cannot be reached from a test.
    """

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.last, self.finished = -1, 0

    def init(self, **given: Any) -> "Wandb":
        self.started.append(given)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        step = self.last + 1 if step is None else step
        if step > self.last:
            self.kept.append(values)
            self.last = step

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def test_wandb_gets_the_numbers(tmp_path: Path, wandb: Wandb) -> None:
    logger = Logger(Run(tmp_path), 0, 10, "project", {"a": 1})
    logger.log(LINE)
    logger.close()
    assert wandb.started[0]["project"] == "project" and wandb.started[0]["config"] == {"a": 1}
    assert wandb.kept == [
        {"step": 5, "seconds": 10.0, "loss": 0.5, "probe_accuracy": 0.25, "images_per_second": 64.0}
    ]  # fmt: skip
    assert wandb.finished == 1


def test_wandb_keeps_what_comes_after_a_rollback_and_after_a_resume(tmp_path: Path, wandb: Wandb) -> None:
    """The values of steps that are run again, in the same session and in the next, which goes on with the same id."""
    logger = Logger(Run(tmp_path), 0, 10, "project", {})
    for step, loss in ((5, 0.5), (7, 90.0), (6, 0.4), (8, 0.3)):
        logger.log({**LINE, "step": step, "loss": loss})
    logger.close()
    logger = Logger(Run(tmp_path), 6, 10, "project", {})
    for step, loss in ((7, 0.35), (8, 0.31)):
        logger.log({**LINE, "step": step, "loss": loss})
    logger.close()
    kept = [(values["step"], values["loss"]) for values in wandb.kept]
    assert kept == [(5, 0.5), (7, 90.0), (6, 0.4), (8, 0.3), (7, 0.35), (8, 0.31)]
    assert wandb.axes["*"] == "step" and "step" in wandb.axes
    first, second = wandb.started
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_an_id_that_is_none_is_not_sent_to_wandb(tmp_path: Path, wandb: Wandb) -> None:
    (tmp_path / "wandb-id").write_text("../../other\n")
    with pytest.raises(UserError, match="wandb-id: is .*other.*, expected the id of a W&B run: remove it"):
        Logger(Run(tmp_path), 0, 10, "project", {})
    assert not wandb.started


def test_tensorboard_gets_pictures_hyperparameters_and_the_accuracy_by_time(tmp_path: Path) -> None:
    from PIL import Image

    logger = Logger(Run(tmp_path), 0, 10, None, {"model": {"depth": 3, "input_size": None}, "optim": {"ema_extra": ()}})
    logger.log({**LINE, "probe_accuracy_by_time": [0.5, None, *[0.25] * 7, 1.0]})
    Image.fromarray(np.full((6, 4), 200, np.uint8)).save(tmp_path / "grid.png")
    logger.picture("samples", tmp_path / "grid.png", 5)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in events.Scalars("probe_accuracy_by_time/0.9-1.0")] == [(5, 1.0)]
    assert events.Scalars("probe_accuracy_by_time/0.0-0.1")[0].value == 0.5
    assert "probe_accuracy_by_time/0.1-0.2" not in events.Tags()["scalars"]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (5, 4, 6)
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model.depth | `3` |" in text and "| optim.ema_extra | `()` |" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_folder_that_tensorboard_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of bytes that are no UTF-8: training goes on without it."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), errors="backslashreplace"))  # as the command does
    run = Run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4uft")))
    run.path.mkdir()
    logger = Logger(run, 0, 10, None, {"a": {"b": 1}})
    logger.log(LINE)
    logger.close()
    assert run.metrics()[0]["loss"] == 0.5 and not (run.path / "tensorboard").exists()


def test_the_bar_has_the_rate_of_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar's own would count the time for samples and checkpoints: both figures are those of the line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = Logger(Run(tmp_path), 0, 10, None, {})
    logger.advance()
    logger.log({**LINE, "seconds": 600.0})
    logger.close()
    err = capsys.readouterr().err
    assert "step/s" not in err and "s/step" not in err
    assert "img/s=64" in err and "left=10:00" in err
