"""Figures reach the file, TensorBoard, W&B when asked for, and a terminal or plain lines."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_wandb_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording stand-in for the package: the service itself cannot be reached from a test."""
    calls: list[Any] = []
    recorder = SimpleNamespace(log=lambda v, step: calls.append((step, v)), finish=lambda: calls.append("finished"))
    module = SimpleNamespace(init=lambda **k: calls.append(k) or recorder)
    monkeypatch.setitem(sys.modules, "wandb", module)
    logger = Logger(Run(tmp_path), 0, 10, "project", {"a": 1})
    logger.log(LINE)
    logger.close()
    assert calls[0]["project"] == "project" and calls[0]["config"] == {"a": 1}
    assert calls[1] == (5, {"seconds": 10.0, "loss": 0.5, "probe_accuracy": 0.25, "images_per_second": 64.0})
    assert calls[2] == "finished"
