"""`lsep data ...` from end to end: a folder in REPA's form packs, checks, and trains alike through DALI and torch."""

import json
from pathlib import Path

import numpy as np
import pytest

from lsep import cli
from lsep.data.commands import COMMANDS
from lsep.data.loader import has_dali
from lsep.run import Run


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["data", *map(str, args)])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def repa(tmp_path: Path) -> Path:
    """2,000 files of 8 x 8 x 8 moments."""
    rng, labels = np.random.default_rng(0), []
    for i in range(2000):
        name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
        path = tmp_path / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate([rng.normal(size=(4, 8, 8)), rng.uniform(0.1, 1, (4, 8, 8))]).astype(np.float32))
        labels.append([name, int(rng.integers(10))])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "vae-sd"


def losses(data: Path, run: Path, loader: str) -> list[float]:
    flags = {
        "--data.path": data, "--data.loader": loader, "--model.depth": 2, "--model.hidden-size": 32,
        "--model.num-heads": 2, "--model.input-size": 8, "--probe.depth": 1, "--probe.window-min": 3,
        "--train.steps": 20, "--train.batch-size": 32, "--train.log-every": 1, "--train.device": "cpu",
        "--train.sample-every": 0, "--sample.steps": 2, "--sample.num": 4, "--run-dir": run,
    }  # fmt: skip
    assert cli.main(["train", "sit-s-2-256", *(str(a) for pair in flags.items() for a in pair)]) == 0
    return [m["loss"] for m in Run(run).metrics()]


def test_repa_form_packs_checks_and_trains(repa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert call(capsys, "pack", repa, store, "--shard-rows", "512")[0] == 0
    assert call(capsys, "check", store)[:2] == (0, f"{store}: whole\n")
    assert "2000 moments of 4 x 8 x 8, float32, 4 shards" in call(capsys, "info", store)[1]
    truth = losses(store, tmp_path / "torch", "torch")
    assert len(truth) == 20
    assert losses(store, tmp_path / "resident", "resident") == truth
    if has_dali():
        assert losses(store, tmp_path / "dali", "dali") == truth
    # In place, without a copy: the same rows in the same order.
    assert call(capsys, "index", repa)[0] == 0
    assert losses(repa, tmp_path / "index", "torch") == truth


def test_check_says_it_with_its_exit_code(repa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "pack", repa, tmp_path / "store")
    shard = tmp_path / "store" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, out, _ = call(capsys, "check", tmp_path / "store")
    assert code == 1
    assert "shard-00000.safetensors: sha256 is" in out and "problems" in out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and f"Example: lsep data {command}" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pakc"], "command 'data pakc' is unknown; did you mean 'pack'"),
        (["pack", "here"], "lsep data pack: expected SOURCE OUT first, then flags; found 'here'"),
        (["pack", "nowhere", "out"], "nowhere"),
        (["pack", "digits", "out", "--form", "tar"], "invalid choice 'tar' for argument '--form'"),
        (["check", "nowhere"], "nowhere: no manifest.json there"),
        (["info", "nowhere"], "nowhere: no manifest.json there"),
        (["encode", "nowhere", "out"], "--vae"),
        (["stage", "/nowhere", "out"], "/nowhere"),
        (["index", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *args)
    assert code == 2 and err.startswith("lsep: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())
