"""`--train.init` where the new run is not like the one it starts from, and a probe with nothing to tell apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny

from lsep import checkpoint, cli
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.run import Run
from lsep.step import State, setup
from lsep.train import train

TABLE = "y_embedder.embedding_table.weight"


def store(path: Path, classes: int = 5, **changes: Any) -> Path:
    x = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)
    given = {"kind": "samples", "scale": 0.5} | changes
    write_store(path, x=x, y=np.arange(40) % classes, num_classes=classes, **given)
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("first")
    small = {"train__steps": 2, "sample__num": 2, "sample__steps": 1, "optim__lr": 0.05, "optim__ema_decay": 0.1}
    data = store(folder / "store", class_names=["a", "b", "c", "d", "e"])
    return train(tiny(data__path=str(data), **small), folder / "run")


def begun(first: Run, data: Path, **changes: Any) -> State:
    return setup(tiny(data__path=str(data), train__init=str(first.path), **changes))


@pytest.mark.parametrize("classes", [3, 8])
def test_another_number_of_classes(classes: int, first: Run, tmp_path: Path) -> None:
    """The table is that of a new model but for the row of no label; all else is the other's; and it is said."""
    data = store(tmp_path / "data", classes)
    state = begun(first, data)
    kept = checkpoint.read_tensors(checkpoint.find(first.checkpoints, None), "ema")
    new = checkpoint.weights(setup(tiny(data__path=str(data))).objective)
    for objective in (state.objective, state.ema):
        found = checkpoint.weights(objective)
        assert found[TABLE].shape == (classes + 1, 32)
        assert torch.equal(found[TABLE][-1], kept[TABLE][-1]) and not torch.equal(found[TABLE][-1], new[TABLE][-1])
        assert torch.equal(found[TABLE][:-1], new[TABLE][:-1])
        assert torch.equal(found["blocks.0.attn.qkv.weight"], kept["blocks.0.attn.qkv.weight"])
        assert torch.equal(found["classifier.1.weight"], new["classifier.1.weight"])
    said = f"the label table is new: 5 classes there, {classes} here; its row of no label is kept ({TABLE})"
    assert f"warning: --train.init {first.path}: {said}" in state.notes
    run = train(replace(state.config, train=replace(state.config.train, steps=1)), tmp_path / "run")
    assert checkpoint.progress_of(checkpoint.find(run.checkpoints, None)).step == 1


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ({"scale": 0.25}, {}, "scale is 0.5 there and 0.25 here"),
        ({"shift": 0.1}, {}, "shift is 0.0 there and 0.1 here"),
        ({}, {"interpolant__path": "cosine"}, "path is 'linear' there and 'cosine' here"),
        ({}, {"interpolant__prediction": "eps"}, "prediction is 'v' there and 'eps' here"),
        ({}, {"model__conditional": False}, "conditional is True there and False here"),
        ({"class_names": ["a", "b", "x", "d", "e"]}, {}, "label 2 is 'c' there and 'x' here"),
        ({"class_names": ["a", "b", "c", "d", "e"]}, {}, None),
    ],
)
def test_what_differs_is_said(
    data: dict[str, Any], changes: dict[str, Any], said: str | None, first: Run, tmp_path: Path
) -> None:
    state = begun(first, store(tmp_path / "data", **data), **changes)
    of_init = [note for note in state.notes if note.startswith("warning: --train.init")]
    assert len(of_init) == (said is not None) and (said is None or said in of_init[0])


def test_it_is_said_where_a_run_begins(first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(data__path=str(store(tmp_path / "data", scale=0.25)), train__init=str(first.path), train__steps=1)
    train(replace(config, sample=replace(config.sample, num=2, steps=1)), tmp_path / "run")
    assert "lsep: warning: --train.init" in "".join(capsys.readouterr())


def test_a_probe_of_one_class_is_refused(tmp_path: Path) -> None:
    """Its loss is 0; a run of an earlier version that has one goes on."""
    data = store(tmp_path / "data", 1)
    with pytest.raises(
        UserError, match="data has one class, of which a probe's loss is always 0, .* --probe.no-enabled"
    ):
        train(tiny(data__path=str(data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    setup(tiny(data__path=str(data), probe__enabled=False))
    assert setup(tiny(data__path=str(data)), begins=False).objective.classifier is not None
    write_store(
        tmp_path / "own", kind="samples", x=np.zeros((20, 3, 8, 8), np.float32), y=np.zeros(20, int), num_classes=1,
        probe_y=np.arange(20) % 4, probe_classes=4, scale=1.0,
    )  # fmt: skip
    setup(tiny(data__path=str(tmp_path / "own")))  # the probe has labels of its own


@pytest.mark.parametrize("name", ["--step", "--checkpoint"])
def test_a_checkpoint_has_one_name_everywhere(
    name: str, first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that takes one takes it under both names."""
    for command in (
        ["sample"], ["probe"], ["export", "--out", str(tmp_path / "e")], ["checkpoint", "verify"],
        ["checkpoint", "consolidate"],
    ):  # fmt: skip
        for flag in ([name, "7"], [f"{name}=7"]):
            words = command if command[0] == "checkpoint" else command[:1]
            assert cli.main([*words, str(first.path), *command[len(words) :], *flag]) == 2
            assert "no checkpoint of step 7, found: 2" in capsys.readouterr().err
