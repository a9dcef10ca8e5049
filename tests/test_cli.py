"""The command as a user types it: help, exit codes, one sentence on bad input."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny

from lsep import cli
from lsep.train import train

LSEP = [sys.executable, "-m", "lsep"]


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(args))
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_is_fast_and_loads_no_torch() -> None:
    start = time.perf_counter()
    done = subprocess.run([*LSEP, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert time.perf_counter() - start < 1.5
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout
    code = "import sys, lsep.cli, lsep.config; sys.exit(bool({'torch', 'tyro', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"Example: lsep {command}" in out


def test_flags_of_the_contract_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "train", "sit-xl-2-256", "--help")
    for flag in (
        "--train.steps --train.batch-size --train.seed --train.log-every --train.checkpoint-every --probe.branch "
        "--probe.extra-fraction --probe.rho --probe.depth --probe.weight-start --probe.weight-end --data.path "
        "--sample.steps --run-dir --resume --strict"
    ).split():
        assert f"{flag} " in out, flag
    assert "Weight omega of the cross-entropy in the first time bin" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "command 'trian' is unknown; did you mean 'train'"),
        (["train"], "no preset comes first; known are"),
        (["train", "sit-xl-256"], "preset 'sit-xl-256' is unknown; did you mean 'sit-xl-2-256'"),
        (["train", "quickstart", "--probe.roh", "1"], "flag '--probe.roh' is unknown; did you mean '--probe.rho'"),
        (["train", "quickstart", "--train.step=3"], "flag '--train.step' is unknown; did you mean '--train.steps'"),
        (["train", "quickstart", "--probe.rho", "much"], "--probe.rho is 'much', expected a number"),
        (["train", "quickstart", "--probe.branch", "both"], "invalid choice 'both' for argument '--probe.branch'"),
        (["train", "quickstart", "--train.steps"], "Missing value for argument '--train.steps'"),
        (["train", "quickstart", "more"], "argument 'more' is unexpected"),
        (["train", "quickstart", "--train.batch-size", "0"], "--train.batch-size is 0, expected at least 1"),
        (["train", "quickstart", "--probe.rho", "0.01"], "--probe.rho is 0.01, expected at least"),
        (["train", "quickstart", "--probe.window-min", "9"], "--probe.window-min is 9, expected at most"),
        (["train", "sit-s-2-256"], "--data.path is missing"),
        (["train", "quickstart", "--train.wandb", "x", "--train.steps", "1"], "wandb"),
        (["sample"], "expected RUN first, then flags; found 'nothing'"),
        (["sample", "nowhere"], "nowhere: not a run directory"),
        (["report", "nowhere"], "nowhere: not a run directory"),
        (["presets", "--all"], "takes no argument '--all'"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    code, _, err = call(capsys, *args)
    assert code == 2
    assert err.startswith("lsep: error: ") and err.count("\n") == 1
    assert message in err


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "quickstart", "--probe.depth", "9"]) == 2
    assert not list(tmp_path.iterdir())


def test_sample_and_report_commands(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny(data__path=str(store), train__steps=2, sample__steps=2, sample__num=4), tmp_path / "run")
    capsys.readouterr()
    code, out, _ = call(
        capsys, "sample", str(run.path), "--classes", "1", "2", "--num", "3", "--sampler", "heun", "--cfg", "2",
        "--guidance-low", "0.1", "--guidance-high", "0.9", "--seed", "5", "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert code == 0
    assert out.split() == [str(tmp_path / "o" / "grid.png"), str(tmp_path / "o" / "samples.npz")]
    run.report_file.unlink()
    assert call(capsys, "report", str(run.path))[:2] == (0, f"{run.report_file}\n")
    assert run.report_file.exists()
    assert call(capsys, "sample", str(run.path), "--steps", "0")[2] == (
        "lsep: error: --steps is 0, expected at least 1\n"
    )


def test_presets_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "presets")
    assert "sit-xl-2-512" in out and "quickstart" in out
    _, out, _ = call(capsys, "doctor")
    assert "torch" in out and "GPU" in out


def test_the_shown_resume_command_can_be_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lsep.train.train", interrupted)
    run = tmp_path / "my run"
    code, _, err = call(capsys, "train", "quickstart", "--run-dir", str(run))
    assert (code, err) == (130, "\nstopped; there was no checkpoint to save yet\n")
    (run / "checkpoints" / "0000004").mkdir(parents=True)
    code, _, err = call(capsys, "train", "quickstart", "--run-dir", str(run))
    assert code == 130
    assert f"go on with: lsep train quickstart --run-dir '{run}' --resume" in err
