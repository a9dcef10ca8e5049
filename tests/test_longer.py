"""A run that goes on otherwise than it was begun: longer, with other threads, on a named device, under torchrun."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import tiny

from lsep import cli, launch
from lsep.checkpoint import read_tensors
from lsep.errors import UserError
from lsep.optim import rate_factor
from lsep.run import Run
from lsep.train import train


def short(store: Path, **changes: object) -> object:
    return tiny(data__path=str(store), sample__num=4, sample__steps=1, **changes)


def test_a_finished_run_with_a_cosine_is_trained_longer(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate is that of the longer cosine from there on, which is said; results and page are of the new end."""
    config = short(store, train__steps=4, optim__schedule="cosine", train__log_every=1)
    longer = short(store, train__steps=8, optim__schedule="cosine", train__log_every=1)
    run = train(config, tmp_path / "run")  # type: ignore[arg-type]
    assert run.results()["steps"] == 4
    capsys.readouterr()
    train(longer, run.path)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "--train.steps is 8 now and was 4: from here on the cosine is that of 8 steps, 0.5 of --optim.lr" in out
    lr = [m["lr"] for m in run.metrics()]
    optim = longer.optim  # type: ignore[attr-defined]
    wanted = [optim.lr * rate_factor(step, optim, 4 if step < 4 else 8) for step in range(8)]
    assert lr == pytest.approx(wanted)
    assert run.results()["steps"] == 8 and run.grid(4).exists() and run.grid(8).exists()
    assert run.config().train.steps == 8 and "step 8 of 8" in run.report_file.read_text()
    with pytest.raises(UserError, match="train.steps: 8 -> 6"):
        train(short(store, train__steps=6, optim__schedule="cosine", train__log_every=1), run.path)  # type: ignore[arg-type]


def test_other_threads_are_said(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(short(store, train__steps=2), tmp_path / "run")  # type: ignore[arg-type]
    train(short(store, train__steps=4), run.path)  # type: ignore[arg-type]
    assert "threads now" not in capsys.readouterr().out
    values = json.loads(run.config_file.read_text())
    now = torch.get_num_threads()
    assert values["sessions"][-1]["threads"] == str(now)
    values["sessions"][-1]["threads"] = str(now + 1)
    run.config_file.write_text(json.dumps(values))
    train(short(store, train__steps=6), run.path)  # type: ignore[arg-type]
    assert f"{now} threads now, {now + 1} before: sums round in another order" in capsys.readouterr().out
    assert len(Run(run.path).sessions()) == 3


def test_a_run_begun_on_auto_goes_on_on_the_device_it_is(store: Path, tmp_path: Path) -> None:
    """And ends as an unbroken one."""
    train(short(store, train__steps=4, train__device="auto"), tmp_path / "run")  # type: ignore[arg-type]
    run = train(short(store, train__steps=8, train__device="cpu"), tmp_path / "run")  # type: ignore[arg-type]
    whole = train(short(store, train__steps=8, train__device="cpu"), tmp_path / "whole")  # type: ignore[arg-type]
    one, two = (read_tensors(r.checkpoints / "0000008", "model") for r in (run, whole))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({}, "lsep"),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
         "torchrun --nproc-per-node 4 -m -- lsep"),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-1"},
         "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-1:29500 --rdzv-id lsep "
         "-m -- lsep"),
    ],
)  # fmt: skip
def test_the_hint_is_the_line_that_was_typed(
    variables: dict[str, str], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stopped(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lsep.train.train", stopped)
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "my run"
    (run / "checkpoints" / "0000004").mkdir(parents=True)
    assert cli.main(["train", "quickstart", "--run-dir", str(run)]) == 130
    line = f"{start} train quickstart --run-dir {shlex.quote(str(run))} --resume"
    assert f"go on with: {line}\n" in capsys.readouterr().err
    assert launch.command(["train"]) == f"{start} train"


def test_torchrun_takes_the_hint() -> None:
    """Its own parser reads the line as it is meant."""
    from torch.distributed.run import parse_args

    line = "torchrun --nproc-per-node 4 -m -- lsep train quickstart --num 3 --resume"
    args = parse_args(shlex.split(line)[1:])
    assert (args.module, args.training_script, args.nproc_per_node) == (True, "lsep", "4")
    assert args.training_script_args == ["train", "quickstart", "--num", "3", "--resume"]
