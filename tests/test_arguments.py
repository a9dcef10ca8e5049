"""What is wrong on a command line is said under the names that stand there, and not in the parser's words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MANIFEST, tiny

from lsep import cli, voice
from lsep.checks import resolve
from lsep.errors import UserError
from lsep.functions import load_function
from lsep.run import Run

LSEP = [sys.executable, "-m", "lsep"]
INTERNALS = (
    "invalid literal", "base 10", "could not convert", "could be instantiated", "NoneType", "<class", "Got errors",
    "Could not find valid parse", "2^63", "'None'", "Error parsing", "Expected 1 values", "(required)", "INT ",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> str:
    Run(tmp_path / "run").open(resolve(tiny(), MANIFEST), MANIFEST, "x")
    return str(tmp_path / "run")


def said(capsys: pytest.CaptureFixture[str], args: list[str], code: int = 2) -> str:
    assert cli.main(args) == code
    err = capsys.readouterr().err
    assert err.startswith("lsep: error: ") and err.count("\n") == 1
    assert not [word for word in INTERNALS if word in err], err
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.steps", "x"], "--train.steps is 'x', expected a whole number"),
        (["--train.seed", "1.5"], "--train.seed is '1.5', expected a whole number"),
        (["--train.seed=1e3"], "--train.seed is '1e3', expected a whole number"),
        (["--train.seed", "-x"], "--train.seed"),
        (["--probe.rho", "much"], "--probe.rho is 'much', expected a number"),
        (["--model.input-size", "x"], "--model.input-size is 'x', expected a whole number"),
        (["--probe.decay-start-epoch", "soon"], "--probe.decay-start-epoch is 'soon', expected a whole number"),
        (["--optim.ema-extra", "0.9", "a"], "--optim.ema-extra is '0.9 a', expected numbers"),
        (["--train.seed", "99999999999999999999"], "--train.seed is 99999999999999999999, expected at most 9,223,372"),
        (["--train.precision", "None"], "invalid choice None for argument '--train.precision'"),
        (
            ["--train.precision", "fp16"],
            "invalid choice 'fp16' for argument '--train.precision'. Expected one of 'auto', 'fp",
        ),
        (["--data.loader"], "Missing value for argument '--data.loader', expected one"),
        (["--train.wandb", ""], "--train.wandb is empty, expected a value"),
    ],
)
def test_training(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "None" in flags:
        assert cli.main(["train", "quickstart", *flags]) == 2
        assert "Expected one of 'auto', 'fp32', 'bf16'" in capsys.readouterr().err
        return
    assert message in said(capsys, ["train", "quickstart", *flags])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--classes", "1", "x"], "--classes holds 'x', but the run's classes have no names: expected numbers"),
        (["--classes"], "--classes is empty, expected at least one"),
        (["--cfg"], "--cfg is empty, expected at least one"),
        (["--cfg", "a"], "--cfg is 'a', expected numbers"),
        (["--num", "x"], "--num is 'x', expected a whole number"),
        (["--sampler", "foo"], "for argument '--sampler'. Expected one of 'ode', 'heun', 'sde', 'dopri5'"),
        (["--num", "0"], "--num is 0, expected at least 1"),
        (["--num", "10000000000000"], "--num is 10000000000000, expected at most 100,000,000"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--guidance-low", "2"], "--guidance-low is 2.0, expected from 0 to 1"),
        (
            ["--guidance-low", "0.9", "--guidance-high", "0.1"],
            "--guidance-low is 0.9, expected at most --guidance-high 0.1",
        ),
        (["--cfg", "-1"], "--cfg is -1.0, expected at least 0"),
        (["--out", ""], "--out is empty, expected a value"),
        (["--out="], "--out is empty, expected a value"),
    ],
)
def test_sampling_names_its_own_flags(
    run: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = said(capsys, ["sample", run, *args])
    assert message in err and "--sample." not in err


def test_sampling_names_the_file_where_the_run_itself_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(tiny(), MANIFEST)
    Run(tmp_path).open(config, MANIFEST, "x")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"steps": 50', '"steps": -3'))
    assert f"{file}: --sample.steps is -3, expected at least 1" in said(capsys, ["sample", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["import", "x.pt"], "--out is missing, expected a path"),
        (
            ["import", "x.pt", "--out", "x", "--form", "foo"],
            "'--form'. Expected one of 'sit', 'repa', 'lsep', 'dit', 'diff",
        ),
        (["evaluate", "a", "--reference", "b", "--metrics"], "--metrics is empty, expected at least one value"),
        (["evaluate", "a", "--reference", "b", "--metrics", "foo"], "for argument '--metrics'. Expected one of '"),
        (["probe", "a", "--depths"], "--depths is empty, expected at least one value"),
        (["probe", "a", "--times", "x"], "--times is 'x', expected numbers"),
        (["sample", ""], "lsep sample: RUN is empty, expected a path"),
        (["checkpoint", "verify", "r", "--step", "x"], "--step is 'x', expected a whole number"),
        (["profile", "quickstart", "--run", "foo"], "for argument '--run'. Expected one of 'nsys', 'ncu'"),
        (["--log-level", "loud", "presets"], "--log-level is 'loud', expected one of info, warning, error"),
    ],
)
def test_other_commands(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, args)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.path:join", None),
        ("math:hypot", "--features math:hypot: what it takes cannot be told"),
        ("builtins:print", None),
        ("builtins:type", "what it takes cannot be told"),
        ("ends.py:f", "ends.py cannot be imported (SystemExit: 3)"),
        ("x" * 5000 + ".py:f", "cannot be imported (OSError"),
        ("..x:f", "..x cannot be imported"),
        ("fine.py:nothing", "fine.py has no function 'nothing'"),
        ("fine.py:number", "fine.py has no function 'number'"),
        ("raises.py:f", "raises.py:f: what it takes cannot be told (ZeroDivisionError"),
        ("a\0b:f", "cannot be imported"),
        (":f", "expected MODULE:FUNCTION or FILE.py:FUNCTION"),
    ],
)
def test_functions_of_users(name: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ends.py").write_text("import sys; sys.exit(3)")
    Path("fine.py").write_text("number = 3")
    Path("raises.py").write_text("def __getattr__(name): return 1 / 0")
    if message is None:
        assert callable(load_function("--features", name))
        return
    with pytest.raises(UserError) as caught:
        load_function("--features", name)
    text = str(caught.value)
    assert text.startswith("--features") and message in text and len(text) < 1000


def test_a_function_that_fails_is_told_with_its_place(tmp_path: Path) -> None:
    """And keeps what is known of it: its parameters, its attributes."""
    file = tmp_path / "own.py"
    file.write_text("def f(x, device):\n    y = x + 1\n    return y / 0\n\nf.latents = True\n")
    function = load_function("--features", f"{file}:f")
    assert getattr(function, "latents") is True  # noqa: B009
    with pytest.raises(UserError, match=r"--features .*own.py:f: the function failed \(ZeroDivisionError.*own.py:3"):
        function(1, device=None)
    with pytest.raises(UserError, match=r"the function failed \(TypeError: .*unexpected keyword"):
        function(1, weights=None)
    file.write_text("def f(x):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_function("--features", f"{file}:f")(1)


@pytest.mark.parametrize("command", [["doctor"], ["presets"], ["--help"], ["train", "quickstart", "--help"]])
def test_a_reader_that_goes_is_no_traceback(command: list[str]) -> None:
    """As `lsep doctor | head -1`: the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*LSEP, *command], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_locale_without_the_letters(tmp_path: Path) -> None:
    """Names of classes and folders that it has none for: files are in UTF-8, and the terminal gets escapes."""
    import numpy as np

    from lsep.data.writer import write_store

    x = np.zeros((20, 1, 8, 8), np.uint8)
    write_store(tmp_path / "größe", kind="pixels", x=x, y=np.arange(20) % 2, num_classes=2, class_names=("Käfer", "猫"))
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("LC_")} | plain
    run = tmp_path / "läuft"
    flags = ["--data.path", str(tmp_path / "größe"), "--train.steps", "2", "--train.batch-size", "10", "--sample.num",
             "4", "--sample.steps", "1", "--train.overhead-rounds", "0", "--probe.window-min", "2"]  # fmt: skip
    done = subprocess.run(
        [*LSEP, "train", "quickstart", "--run-dir", run, *flags], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "l\\xe4uft" in done.stdout or "l\\udcc3" in done.stdout
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Käfer, 猫" in page
    done = subprocess.run([*LSEP, "report", tmp_path / "fehlt-ü"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_file_for_a_folder_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for args in (
        ["train", "quickstart", "--run-dir", str(tmp_path / "file")],
        ["train", "quickstart", "--run-dir", str(tmp_path / "file" / "run")],
        ["report", str(tmp_path / "file")],
        ["profile", "quickstart", "--steps", "1", "--warmup", "0", "--out", str(tmp_path / "file" / "out")],
    ):
        assert str(tmp_path / "file") in said(capsys, args)


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSEP_LOG_LEVEL", "info")  # and so put back in the end
    assert voice.take_flags(["train", "x"]) == ["train", "x"] and voice.heard("info")
    assert voice.take_flags(["train", "--quiet", "x"]) == ["train", "x"]
    assert [voice.heard(level) for level in voice.LEVELS] == [False, True, True]
    assert voice.take_flags(["--log-level=error", "x"]) == ["x"]
    assert [voice.heard(level) for level in voice.LEVELS] == [False, False, True]
    monkeypatch.setenv("LSEP_LOG_LEVEL", "loud")
    with pytest.raises(UserError, match="LSEP_LOG_LEVEL is 'loud', expected one of info, warning, error"):
        voice.take_flags([])


def test_a_quiet_training_says_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {k: v for k, v in os.environ.items() if k != "LSEP_LOG_LEVEL"}
    flags = ["--data.path", str(store), "--train.steps", "2", "--train.batch-size", "10", "--sample.steps", "1",
             "--sample.num", "4", "--train.overhead-rounds", "0", "--probe.window-min", "2"]  # fmt: skip
    command = [*LSEP, "train", "quickstart", "--run-dir", str(tmp_path / "run"), *flags]
    for level, words in (("--log-level=info", "trained 2 steps"), ("--quiet", "")):
        done = subprocess.run([*command, level], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout and (words or not done.stdout + done.stderr), done.stderr
        (tmp_path / "run").rename(tmp_path / level.strip("-"))
