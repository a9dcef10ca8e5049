"""Checkpoints: what is written comes back, whole or not at all; anything else is named."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_worker import Held, World, load_into
from conftest import MANIFEST, tiny
from safetensors.torch import load_file

from lsep import checkpoint, cli, shards
from lsep.checkpoint import Checkpoints, Progress, read_tensors, weights
from lsep.checkpoint_commands import gather
from lsep.checks import resolve
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.run import Run
from lsep.step import State, open_loader, setup, train_step


def trained(store: Path, steps: int = 2, **changes: object) -> State:
    state = setup(tiny(data__path=str(store), **changes))
    for step, batches in enumerate(open_loader(state, 0, steps)):
        train_step(state, step, batches)
    return state


def save(state: State, folder: Path, step: int = 2, **changes: int) -> Path:
    checkpoints = Checkpoints(folder, **changes)
    checkpoints.save(Progress(step, 1.5), state.objective, state.ema, state.optimizer)
    checkpoints.finish()
    checkpoints.close()
    return folder / f"{step:07d}"


def load(state: State, path: Path) -> Progress:
    return checkpoint.load(path, state.objective, state.ema, state.optimizer)


def load_newest(state: State, folder: Path, strict: bool = False) -> Progress | None:
    return Checkpoints(folder).load_newest(state.objective, state.ema, state.optimizer, strict)


def rewrite(path: Path, **changes: object) -> None:
    """Change values of a manifest as someone would who also computes its sha256 anew."""
    values = json.loads((path / "manifest.json").read_text())
    values.pop("sha256")
    (path / "manifest.json").write_text(shards._manifest_text({**values, **changes}))


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
    names = [f"shard-00000-{part}.safetensors" for part in ("ema", "model", "optimizer")]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *names]
    assert {"blocks.0.attn.qkv.weight", "classifier.1.weight", "pos_embed"} <= read_tensors(path, "model").keys()
    assert load_file(path / names[0]).keys() == {f"ema.{k}" for k in read_tensors(path, "ema")}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["torch"]) == (2, 1, torch.__version__)
    for name in names:
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("by", OPTIMIZERS)
def test_training_on_changes_nothing_of_what_is_being_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The copy is slow, the write waits until three more steps are done; the training does not notice the save."""
    go, write = threading.Event(), shards.write_shard

    def slow(*args: Any) -> shards.File:
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(shards, "write_shard", slow)
    state, undisturbed = (trained(store, steps, backend__optimizer=by) for steps in (2, 5))
    checkpoints = Checkpoints(tmp_path)
    stage = checkpoints.stager.stage
    monkeypatch.setattr(checkpoints.stager, "stage", lambda tensors, **kw: (time.sleep(0.5), stage(tensors, **kw))[1])
    before = {k: v.clone() for k, v in checkpoint._state(state.objective, state.ema, state.optimizer.tensors()).items()}
    checkpoints.save(Progress(2, 0.0), state.objective, state.ema, state.optimizer)
    for step, batches in enumerate(open_loader(state, 2, 5), 2):
        train_step(state, step, batches)
    assert not checkpoint.steps(tmp_path)
    go.set()
    checkpoints.finish()
    after = checkpoint._state(state.objective, state.ema, state.optimizer.tensors())
    for part in shards.PARTS:
        for name, tensor in read_tensors(tmp_path / "0000002", part).items():
            assert torch.equal(tensor, before[f"{part}.{name}"])
    name = "ema.blocks.0.attn.qkv.weight"
    assert not torch.equal(after[name], before[name])
    truth = checkpoint._state(undisturbed.objective, undisturbed.ema, undisturbed.optimizer.tensors())
    assert all(torch.equal(after[k], truth[k]) for k in truth)


def test_leftovers_of_a_kill_are_swept(store: Path, tmp_path: Path) -> None:
    folder = save(trained(store, 0), tmp_path / "c", 4).parent
    for left in (".0000006.tmp", ".0000002.old"):
        (folder / left).mkdir()
        (folder / left / "shard-00000-model.safetensors").write_bytes(b"half")
    Checkpoints(folder)
    assert [p.name for p in folder.iterdir()] == ["0000004"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "step", "left"),
    [
        (0, 0, 10_000_000, [2, 4, 6, 8, 10_000_000]),
        (2, 0, 10_000_000, [8, 10_000_000]),  # one digit more: as text, the last would come first
        (1, 4, 10_000_000, [4, 8, 10_000_000]),
        (9, 0, 10_000_000, [2, 4, 6, 8, 10_000_000]),
        (1, 0, 6, [6, 8, 10_000_000]),  # later ones were passed over as damaged: they count for nothing
    ],
)
def test_prune(tmp_path: Path, keep_last: int, keep_every: int, step: int, left: list[int]) -> None:
    for number in (2, 4, 6, 8, 10_000_000):
        (tmp_path / f"{number:07d}").mkdir()
    checkpoint.prune(tmp_path, keep_last, keep_every, step)
    assert [int(p.name) for p in checkpoint.steps(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_saving_prunes(store: Path, tmp_path: Path) -> None:
    state = trained(store, 0)
    for step in (2, 4, 6):
        save(state, tmp_path / "c", step, keep_last=1, keep_every=4)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["0000004", "0000006"]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x20
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p / "shard-00000-ema.safetensors", 100),
                  "shard-00000-ema.safetensors: truncated or changed, 100 bytes found and "),
    "flipped": (lambda p: flip(p / "shard-00000-ema.safetensors", -5), "ema.safetensors: damaged, sha256 "),
    "missing": (lambda p: (p / "shard-00000-optimizer.safetensors").unlink(), "optimizer.safetensors: missing, "),
    "added": (lambda p: shutil.copy(p / "shard-00000-ema.safetensors", p / "x.safetensors"),
              "x.safetensors: not in the manifest"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing"),
    "no json": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: not a checkpoint of this program"),
    "no field": (lambda p: (p / "manifest.json").write_text("{}"), "not a checkpoint of this program (KeyError"),
    "flipped manifest": (lambda p: flip(p / "manifest.json", 20), "manifest.json: "),
    "link": (lambda p: ((p / "shard-00000-ema.safetensors").rename(p.parent / "e"),
                        (p / "shard-00000-ema.safetensors").symlink_to(p.parent / "e")),
             "shard-00000-ema.safetensors: cannot be read (a link or a folder, expected a file)"),
    "path": (lambda p: rewrite(p, files={"../../x.safetensors": {"bytes": 1, "sha256": "0"}}),
             "file name '../../x.safetensors', expected shard-RANK-PART.safetensors"),
    "step": (lambda p: rewrite(p, step=6), "step 6 in the folder of step 4"),
    "no file": (lambda p: rewrite(p, files={}), "no file of model"),
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 2 and 4 of an untrained state, which is enough to be damaged."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    write_store(
        folder / "store", kind="samples", x=rng.normal(size=(20, 3, 8, 8)).astype(np.float32),
        y=rng.integers(5, size=20), num_classes=5, probe_y=rng.integers(7, size=20), probe_classes=7, scale=1.0,
    )  # fmt: skip
    state = trained(folder / "store", 1)
    for step in (2, 4):
        save(state, folder / "checkpoints", step)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two / "checkpoints", folder)
    state = setup(tiny(data__path=str(two / "store")))
    assert load_newest(state, folder) == Progress(4, 1.5)
    apply, message = DAMAGES[damage]
    apply(folder / "0000004")
    assert load_newest(state, folder) == Progress(2, 1.5)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "; the checkpoint before is used" in error
    with pytest.raises(UserError, match=re.escape(message)):
        load_newest(state, folder, strict=True)
    apply(folder / "0000002") if damage != "step" else rewrite(folder / "0000002", step=3)
    with pytest.raises(UserError, match="all 2 checkpoints are damaged, see lsep checkpoint verify"):
        load_newest(state, folder)


def test_no_checkpoint_is_none(two: Path, tmp_path: Path) -> None:
    assert load_newest(setup(tiny(data__path=str(two / "store"))), tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "missing"), (-1, "-1"), ("1", "'1'"), (1e300, "1e+300"), (True, "True")]
)
def test_progress_is_checked(two: Path, tmp_path: Path, value: object, shown: str) -> None:
    path = shutil.copytree(two / "checkpoints" / "0000004", tmp_path / "0000004")
    rewrite(path, seconds=value)
    if value is None:
        values = json.loads((path / "manifest.json").read_text())
        del values["seconds"], values["sha256"]
        (path / "manifest.json").write_text(shards._manifest_text(values))
    with pytest.raises(UserError, match=re.escape(f"seconds is {shown}, expected a number")):
        checkpoint.progress_of(path)
    rewrite(path, seconds=2, gpu_seconds=3, more=4)
    assert checkpoint.progress_of(path) == Progress(4, 2, 3)


@pytest.mark.parametrize("sha256", ["a\nb", "x" * 10**5, 7, "A" * 64])
def test_what_is_no_sha256_is_refused(two: Path, tmp_path: Path, sha256: object) -> None:
    path = shutil.copytree(two / "checkpoints" / "0000004", tmp_path / "0000004")
    name = "shard-00000-ema.safetensors"
    rewrite(path, files={name: {"bytes": 8, "sha256": sha256}})
    (problem,) = shards.problems(path)
    assert "manifest.json: not a checkpoint of this program" in problem
    assert len(problem) < 1000 and len(problem.splitlines()) == 1


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "far": lambda h: h["a"].update(data_offsets=[0, 2**40]),
    "huge": lambda h: h["a"].update(shape=[2**40, 2**40]),
    "negative": lambda h: h["a"].update(shape=[-2, -4]),
    "fraction": lambda h: h["a"].update(shape=[2.0, 4]),
    "overlap": lambda h: h["b"].update(data_offsets=[0, 8]),
    "type": lambda h: h["a"].update(dtype="F3"),
    "place": lambda h: h["__metadata__"].update(
        DCP_SHARDING_INFO='{"a": {"saved_offsets": [-1, 0]}, "b": {"saved_offsets": [0]}}'
    ),
    "dimensions": lambda h: h["__metadata__"].update(
        DCP_SHARDING_INFO='{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0]}}'
    ),
    "no place": lambda h: h.pop("__metadata__"),
    "short": lambda h: h.pop("b"),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_is_checked_before_memory_is_taken(tmp_path: Path, change: str) -> None:
    file = tmp_path / "x.safetensors"
    shards.write_shard(file, {"a": (torch.ones(2, 4), [0, 0]), "b": (torch.ones(2), [0])})
    assert shards.read_header(file)["a"] == (torch.float32, (2, 4), (0, 0))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    HEADERS[change](header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match="x.safetensors: not a whole safetensors file"):
        shards.read_header(file)
    for junk in (b"", b"PK\x03\x04 a torch pickle", (2**62).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"):
        file.write_bytes(junk)
        with pytest.raises(UserError, match="x.safetensors: not a whole safetensors file"):
            shards.read_header(file)


def test_a_tensor_with_holes_is_refused(tmp_path: Path) -> None:
    """A far piece would make a small file declare a large tensor."""
    path = tmp_path / "0000001"
    path.mkdir()
    file = shards.write_shard(path / "shard-00000-ema.safetensors", {"ema.a": (torch.ones(2), [2**40])})
    (path / "manifest.json").write_text(
        shards._manifest_text({"step": 1, "files": {"shard-00000-ema.safetensors": file._asdict()}})
    )
    with pytest.raises(UserError, match=r"'ema.a' of shape \(1099511627778,\) has only 2 values"):
        shards.describe(path, ("ema",))


def test_foreign_weights_are_refused(store: Path, tmp_path: Path) -> None:
    path = save(trained(store), tmp_path)
    for changes, message in (
        ({"model__qk_norm": True}, "12 missing tensors for this model, the first 'blocks.0.attn.k_norm.bias'"),
        ({"model__depth": 2}, "10 unknown tensors for this model, the first 'blocks.2.adaLN_modulation.1.bias'"),
        ({"model__hidden_size": 64}, r"blocks.0.adaLN_modulation.1.bias is \(192,\), expected \(384,\)"),
    ):
        other = setup(tiny(data__path=str(store), **changes))
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(path, "ema", other.objective)
        with pytest.raises(UserError, match=message):
            load(other, path)


def test_sampling_reads_and_checks_the_ema_alone(store: Path, tmp_path: Path) -> None:
    state, other = trained(store), trained(store, 0)
    path = save(state, tmp_path)
    for part in ("model", "optimizer"):
        flip(path / f"shard-00000-{part}.safetensors", -5)
    checkpoint.load_weights(path, "ema", other.objective)
    averages = state.ema.state_dict()
    assert all(torch.equal(v, averages[k]) for k, v in other.objective.state_dict().items())
    with pytest.raises(UserError, match="model.safetensors: damaged, sha256"):
        checkpoint.load_weights(path, "model", other.objective)


def test_every_copy_to_the_host_goes_to_the_same_memory(tmp_path: Path) -> None:
    """Pinned once and used again; the stager of torch 2.11's DefaultStager cannot be used a second time."""
    checkpoints, tensor = Checkpoints(tmp_path), torch.arange(3.0)
    first, second = (checkpoints._copy({"x": tensor.add_(i)}, threading.Event())["x"] for i in range(2))
    assert torch.equal(second, torch.arange(3.0) + 1) and second.data_ptr() == first.data_ptr()
    checkpoints.close()


def test_unwritable_folder_is_one_sentence(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning while training goes on, an error at its end, and nothing once the disk takes it again."""
    state = trained(store, 0)
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file")
    checkpoints.save(Progress(2, 0.0), state.objective, state.ema, state.optimizer)
    checkpoints.save(Progress(4, 0.0), state.objective, state.ema, state.optimizer)
    (line,) = capsys.readouterr().err.splitlines()
    assert "0000002: the checkpoint could not be written (" in line and "training goes on" in line
    with pytest.raises(
        UserError, match=r"0000004: the checkpoint could not be written \(.+\); there is no earlier one"
    ):
        checkpoints.finish()
    (tmp_path / "file").unlink()
    checkpoints.save(Progress(6, 0.0), state.objective, state.ema, state.optimizer)
    checkpoints.finish()
    assert [p.name for p in (tmp_path / "file").iterdir()] == ["0000006"]


def test_consolidated_files_have_the_published_names(store: Path, tmp_path: Path) -> None:
    state = trained(store)
    path, out = save(state, tmp_path / "c"), tmp_path / "out"
    gather(path, out)
    assert sorted(p.name for p in out.iterdir()) == [f"{part}.safetensors" for part in ("ema", "model", "optimizer")]
    for part, truth in (("model", weights(state.objective)), ("optimizer", state.optimizer.tensors())):
        found = load_file(out / f"{part}.safetensors")
        assert found.keys() == truth.keys() and all(torch.equal(found[k], truth[k]) for k in truth)
    with pytest.raises(UserError, match=f"--out {out}: is there already, expected a new folder"):
        gather(path, out)
    flip(path / "shard-00000-ema.safetensors", -5)
    with pytest.raises(UserError, match="damaged, sha256"):
        gather(path, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out", "store"]


def test_commands(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run")
    run.open(resolve(tiny(), MANIFEST), MANIFEST, "x")
    shutil.copytree(two / "checkpoints", run.checkpoints)

    def call(*args: str) -> tuple[int, str]:
        try:
            code = cli.main(["checkpoint", *args])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    path = str(run.path)
    assert [line.split()[-1] for line in call("list", path)[1].splitlines()] == ["state", "whole", "whole"]
    assert call("verify", path) == (0, "".join(f"{run.checkpoints / s}: whole\n" for s in ("0000002", "0000004")))
    flip(run.checkpoints / "0000004" / "shard-00000-ema.safetensors", -5)
    os.truncate(run.checkpoints / "0000004" / "shard-00000-model.safetensors", 100)
    code, out = call("verify", path)
    assert code == 1 and out.count("\n") == 3
    assert "ema.safetensors: damaged, sha256" in out and "model.safetensors: truncated or changed" in out
    assert "model.safetensors: truncated" in call("list", path)[1]
    assert call("verify", path, "--step", "2")[0] == 0
    assert call("verify", path, "--step", "3") == (
        2, f"lsep: error: {run.checkpoints}: no checkpoint of step 3, found: 2, 4\n"
    )  # fmt: skip
    assert call("consolidate", path)[0] == 2
    assert call("consolidate", path, "--step", "2") == (0, f"{run.path}/consolidated-0000002\n")
    assert call("consolidate", path, "--step", "2")[0] == 2
    assert "Example: lsep checkpoint" in call("--help")[1]
    assert call("verfy", path) == (
        2, "lsep: error: command 'checkpoint verfy' is unknown; did you mean 'verify'?\n"
    )  # fmt: skip


def test_any_number_of_processes_loads_what_any_other_wrote(tmp_path: Path) -> None:
    """Four processes, plain, sharded and both, save and load in all pairs; one process loads all of it."""
    worker = Path(__file__).with_name("checkpoint_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, str(worker), str(tmp_path)], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all 2 checkpoints are damaged") == 4
    assert done.stderr.count("manifest.json: missing; the checkpoint before is used") == 2  # the first process says it
    truth = Held("one", 1).whole()
    for mode in ("fsdp", "hsdp"):
        held = Held("one", 5)
        assert load_into(held, tmp_path / mode, World()) == Progress(4, 1.5)
        found = held.whole()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        written = {p.name for p in (tmp_path / mode / "0000004").iterdir()}
        assert written == {"manifest.json", *(f"shard-{r:05d}-{p}.safetensors" for r in range(4) for p in shards.PARTS)}
