"""The end of a run: each of its outputs that is missing or unreadable is made again, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny

from lsep import ending, overhead, report
from lsep.config import Config
from lsep.errors import UserError
from lsep.run import Run
from lsep.train import train


@pytest.fixture
def config(store: Path) -> Config:
    return tiny(data__path=str(store), train__steps=4, sample__num=4, sample__steps=2)


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Run:
    return train(config, tmp_path / "run")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_output_is_repaired(run: Run, config: Config, damage: str) -> None:
    """As if the end had come through: the same picture, a page and results that are whole."""
    outputs = (run.grid(4), run.results_file, run.report_file)
    assert ending.missing(run, 4) == []
    picture, metrics, results = run.grid(4).read_bytes(), run.metrics_file.read_bytes(), run.results()
    for path, name in zip(outputs, (ending.SAMPLES, ending.RESULTS, ending.REPORT), strict=True):
        DAMAGE[damage](path)
        assert name in ending.missing(run, 4)
        train(config, run.path)
        assert ending.missing(run, 4) == []
    assert run.grid(4).read_bytes() == picture and run.metrics_file.read_bytes() == metrics
    assert run.results().keys() == results.keys() and run.results()["loss"] == results["loss"]


def test_a_kill_between_results_and_report(
    run: Run, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is made again, without the model; also where an earlier page of other results is there."""
    values = run.results()
    for stale in (False, True):
        if not stale:
            run.report_file.unlink()
        run.results_file.write_text(json.dumps({**values, "train_seconds": 123456 + stale}))
        monkeypatch.setattr(ending, "finish", None)
        train(config, run.path)
        out = capsys.readouterr().out
        assert "already at step 4 of 4, nothing to train" in out and "report.html, which was missing" in out
        assert f"{123456 + stale:,} s" in run.report_file.read_text()
    train(config, run.path)
    assert "which was missing" not in capsys.readouterr().out


def test_a_run_without_its_metrics_ends_all_the_same(run: Run, config: Config) -> None:
    """What they said of the last step is unknown then; the time is the checkpoint's."""
    seconds = run.results()["train_seconds"]
    run.metrics_file.unlink()
    run.results_file.unlink()
    train(config, run.path)
    results = run.results()
    assert results["loss"] is None and results["train_seconds"] == pytest.approx(seconds, abs=0.1)
    assert ending.missing(run, 4) == [] and "<svg" not in run.report_file.read_text()


def test_copies_and_folders_beside_the_pictures_are_no_pictures(run: Run, config: Config) -> None:
    shutil.copy(run.grid(4), run.samples / "step-0000004 (copy).png")
    (run.samples / "step-0000004-backup.png").mkdir()
    run.results_file.unlink()
    train(config, run.path)
    assert run.report_file.read_text().count("<img alt=") == 1


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "{", '{"step": "4"}', '{"step": -1}', '{"step": true}', '{"step": 4, "loss": "low"}',
     '{"step": 4, "loss": [1]}', '{"step": 4, "probe_accuracy_by_time": 1}', '{"step": 4, "lr": 1' + "0" * 400 + "}",
     "[" * 100_000, "\x00\x01"],
)  # fmt: skip
def test_damaged_metrics_are_said_and_left_out(
    run: Run, config: Config, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the damaged line stands, and the lines around it count."""
    before = run.metrics_file.read_text().splitlines()
    run.metrics_file.write_text("\n".join([before[0], text, *before[1:]]) + "\n")
    assert [m["step"] for m in run.metrics()] == [2, 4]
    assert f"{run.metrics_file}: line 2 is damaged and left out" in capsys.readouterr().err
    assert "step 4 of 4" in report.render(run).read_text()
    run.results_file.unlink()
    train(config, run.path)
    assert ending.missing(run, 4) == []


@pytest.mark.parametrize(
    "values",
    [[], None, 3, {"agreement": "high"}, {"agreement": 1, "agreement_samples": "<b>"}, {"lsep_overhead": 1},
     {"lsep_overhead": 1, "lsep_overhead_quartiles": [1]}, {"peak_memory_bytes": []}, {"train_seconds": None},
     {"parameters": 10**400}, {"machine": "<script>", "torch": {}}],
)  # fmt: skip
def test_results_that_make_no_sense_are_no_traceback(run: Run, config: Config, values: object) -> None:
    run.results_file.write_text(json.dumps({"steps": 4, **values} if isinstance(values, dict) else values))
    page = report.render(run).read_text()
    assert "<script>" not in page and "of <b>" not in page
    train(config, run.path)
    assert ending.missing(run, 4) == []


def test_a_directory_removed_while_it_trained(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Run.append_metrics

    def gone(run: Run, values: dict[str, object]) -> None:
        if values["step"] == 4:
            shutil.rmtree(run.path)
        append(run, values)

    monkeypatch.setattr(Run, "append_metrics", gone)
    with pytest.raises(UserError, match="run: the run's directory is gone, removed or renamed while it trained"):
        train(config, tmp_path / "run")


def test_what_was_trained_again_is_measured_again(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes take part in measuring, whatever the first one finds: results of an earlier end are not kept."""
    calls: list[int] = []
    monkeypatch.setattr(overhead, "measure", lambda *given: calls.append(1) or {})
    shutil.rmtree(run.checkpoints / "0000004")
    before = run.results()["train_seconds"]
    run.results_file.write_text(json.dumps({**run.results(), "train_seconds": before + 1e6}))
    train(tiny(data__path=config.data.path, train__steps=4, train__overhead_rounds=1, sample__num=4, sample__steps=2),
          run.path)  # fmt: skip
    assert calls == [1] and run.results()["train_seconds"] < 1e6


def test_the_report_says_what_it_is_of(run: Run) -> None:
    page = run.report_file.read_text()
    for row in ("begun", "command", "versions", "parameters", "training time", "speed"):
        assert f"<th>{row}<td>" in page, row
    assert f"{run.results()['parameters']:,}" in page


def test_runs_of_earlier_versions_have_a_report(run: Run) -> None:
    values = json.loads(run.config_file.read_text())
    del values["sessions"]
    run.config_file.write_text(json.dumps(values))
    old = {k: v for k, v in run.results().items() if k != "parameters"}
    run.results_file.write_text(json.dumps(old))
    page = report.render(Run.existing(run.path)).read_text()
    assert "<th>begun" not in page and "<th>training time" in page


def test_one_point_of_a_curve_can_be_seen() -> None:
    """A line through one point has no length: it has a mark; so has a point between gaps."""
    with_mark = report._plot("a", "step", [1], {"b": [2.0]})
    without = report._plot("a", "step", [1, 2], {"b": [2.0, 3.0]})
    between = report._plot("a", "step", [1, 2, 3, 4], {"b": [2.0, None, 3.0, None]})
    mark = 'style="fill: #1f77b4; stroke: #1f77b4"'
    assert [page.count(mark) for page in (with_mark, without, between)] == [1, 0, 2]
