"""Checkpoints: what is written comes back, whole or not at all; anything else is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny

from lsep import checkpoint
from lsep.checkpoint import Progress
from lsep.errors import UserError
from lsep.step import State, open_loader, setup, train_step


def trained(store: Path, steps: int = 2, **changes: object) -> State:
    state = setup(tiny(data__path=str(store), **changes))
    for step, batches in enumerate(open_loader(state, 0, steps)):
        train_step(state, step, batches)
    return state


def save(state: State, folder: Path, step: int = 2) -> Path:
    return checkpoint.save(folder, Progress(step, 1.5), state.objective, state.ema, state.optimizer)


def load(state: State, path: Path) -> Progress:
    return checkpoint.load(path, state.objective, state.ema, state.optimizer)


OPTIMIZERS = ["torch", "csrc", "reference"]


@pytest.mark.parametrize("by", OPTIMIZERS)
def test_a_damaged_optimizer_state_is_refused(store: Path, by: str) -> None:
    state = trained(store, backend__optimizer=by)
    whole = {k: v.clone() for k, v in state.optimizer.tensors().items()}
    name = "blocks.0.attn.qkv.weight"
    for change, message in (
        ({f"step.{name}": None}, f"tensor 'step.{name}' is missing"),
        ({f"exp_avg.{name}": torch.zeros(3)}, rf"exp_avg.{name} is \(3,\), expected \(96, 32\)"),
        ({"exp_avg.other": torch.zeros(3)}, "unknown tensor 'exp_avg.other'"),
        (dict.fromkeys(whole), "is missing"),
    ):
        damaged = {k: v for k, v in {**whole, **change}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            state.optimizer.load(damaged)


@pytest.mark.parametrize("by", OPTIMIZERS)
def test_a_probe_that_never_learned_has_no_state(store: Path, by: str) -> None:
    state = trained(store, backend__optimizer=by, probe__end_step=0)
    assert not [k for k in state.optimizer.tensors() if "classifier" in k]
    state.optimizer.load(state.optimizer.tensors())


@pytest.mark.parametrize("writer", OPTIMIZERS)
@pytest.mark.parametrize("reader", OPTIMIZERS)
def test_round_trip_is_bitwise(store: Path, tmp_path: Path, writer: str, reader: str) -> None:
    """Whatever implementation of the optimizer wrote it, and whatever reads it."""
    old, new = (trained(store, steps, backend__optimizer=by) for steps, by in ((2, writer), (0, reader)))
    assert load(new, save(old, tmp_path / "c")) == Progress(2, 1.5)
    for a, b in ((old.objective, new.objective), (old.ema, new.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    written, read = old.optimizer.tensors(), new.optimizer.tensors()
    assert written.keys() == read.keys() and len(written) == 3 * len(list(old.objective.parameters()))
    assert all(torch.equal(written[k], read[k]) for k in written)


@pytest.mark.parametrize("by", OPTIMIZERS)
def test_going_on_is_bitwise(store: Path, tmp_path: Path, by: str) -> None:
    whole, first, second = (trained(store, steps, backend__optimizer=by) for steps in (4, 2, 0))
    load(second, save(first, tmp_path))
    for step, batches in enumerate(open_loader(second, 2, 4), 2):
        train_step(second, step, batches)
    for a, b in ((whole.objective, second.objective), (whole.ema, second.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_checkpoint_holds_no_pickle_and_published_names(store: Path, tmp_path: Path) -> None:
    path = save(trained(store), tmp_path)
    assert sorted(p.name for p in path.iterdir()) == [
        "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    names = checkpoint.read_tensors(path / "model.safetensors").keys()
    assert {"blocks.0.attn.qkv.weight", "classifier.1.weight", "pos_embed"} <= names


def test_unfinished_writes_are_not_seen(store: Path, tmp_path: Path) -> None:
    state = trained(store)
    save(state, tmp_path, 4)
    (tmp_path / ".0000006.tmp").mkdir()
    (tmp_path / "0000008").mkdir()  # no state.json: never complete
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.name == "0000004"
    save(state, tmp_path, 6)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["0000004", "0000006"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (0, 0, [2, 4, 6, 8, 10_000_000]),
        (2, 0, [8, 10_000_000]),  # one digit more: as text, the last would come first
        (1, 4, [4, 8, 10_000_000]),
        (9, 0, [2, 4, 6, 8, 10_000_000]),
    ],
)
def test_prune(tmp_path: Path, keep_last: int, keep_every: int, left: list[int]) -> None:
    for step in (2, 4, 6, 8, 10_000_000):
        (tmp_path / f"{step:07d}").mkdir()
        (tmp_path / f"{step:07d}" / "state.json").write_text("{}")
    checkpoint.prune(tmp_path, keep_last, keep_every)
    assert [int(p.name) for p in checkpoint.steps(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate ema", "ema.safetensors: truncated or changed, 100 bytes found and"),
        ("remove optimizer", "optimizer.safetensors: missing"),
        ("no json", "state.json: not a checkpoint of this program"),
        ("no field", "state.json: not a checkpoint of this program (KeyError"),
    ],
)
def test_damage_is_named(store: Path, tmp_path: Path, damage: str, message: str) -> None:
    state = trained(store)
    path = save(state, tmp_path)
    if damage == "truncate ema":
        os.truncate(path / "ema.safetensors", 100)
    elif damage == "remove optimizer":
        (path / "optimizer.safetensors").unlink()
    else:
        (path / "state.json").write_text("{" if damage == "no json" else json.dumps({"bytes": {}}))
    with pytest.raises(UserError) as caught:
        load(state, path)
    assert message in str(caught.value)


def test_foreign_weights_are_refused(store: Path, tmp_path: Path) -> None:
    state = trained(store)
    file = save(state, tmp_path) / "model.safetensors"
    for changes, message in (
        ({"model__qk_norm": True}, "12 missing tensors for this model, the first 'blocks.0.attn.k_norm.bias'"),
        ({"model__depth": 2}, "10 unknown tensors for this model, the first 'blocks.2.adaLN_modulation.1.bias'"),
        ({"model__hidden_size": 64}, r"pos_embed is \(1, 16, 32\), expected \(1, 16, 64\)"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(file, setup(tiny(data__path=str(store), **changes)).objective)
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 a torch pickle")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        checkpoint.load_weights(tmp_path / "x.safetensors", state.objective)


def test_unwritable_folder_is_one_sentence(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"0000002: the checkpoint could not be written \(.+\); there is no earlier one"
    ):
        save(trained(store), tmp_path / "file")
