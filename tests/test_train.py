"""The trainer as a program: exact resume, no host sync, learning, and every way to stop it."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import relative_error, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from bench.trial import flags
from lsep import checkpoint
from lsep.backends import missing_compiler
from lsep.config import Config
from lsep.errors import UserError
from lsep.run import Run
from lsep.shards import PARTS
from lsep.step import State, open_loader, setup, train_step
from lsep.train import train


def command(run_dir: Path, config: Config, *more: str) -> list[str]:
    return [sys.executable, "-m", "lsep", "train", "quickstart", *flags(config), "--run-dir", str(run_dir), *more]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / f"{step:07d}"
    return {f"{part}:{k}": v for part in PARTS for k, v in checkpoint.read_tensors(path, part).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different[:3]


@pytest.mark.parametrize("branch", ["shared", "paper"])
def test_resume_after_kill_is_bitwise(store: Path, tmp_path: Path, branch: str) -> None:
    """2N steps in one go = N steps, kill -9, and N more: weights, EMA, optimizer and the logged losses."""
    config = tiny(
        data__path=str(store), train__steps=24, train__checkpoint_every=6, probe__branch=branch, optim__accumulate=2,
        optim__schedule="cosine", optim__warmup_steps=3, probe__end_step=20, probe__decay_start_epoch=1,
    )  # fmt: skip
    whole = train(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    process = subprocess.Popen(command(broken, config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "0000012").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = checkpoint.latest(broken / "checkpoints")
    assert last is not None and 12 <= int(last.name) < 24, "the kill came too late to test anything"
    again = subprocess.run(command(broken, config), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"continuing {broken} at step {int(last.name)}" in again.stdout
    assert_same_bits(tensors(broken, 24), tensors(whole.path, 24))
    timeless = [
        {k: v for k, v in m.items() if k not in ("seconds", "images_per_second")} for m in Run(broken).metrics()
    ]
    assert [m["step"] for m in timeless] == [*range(2, 25, 2)]
    assert timeless == [{k: m[k] for k in timeless[0]} for m in whole.metrics()]


def test_two_runs_are_bitwise_equal_and_seeds_differ(store: Path, tmp_path: Path) -> None:
    config = tiny(data__path=str(store))
    for name in ("a", "b"):
        train(config, tmp_path / name)
    train(tiny(data__path=str(store), train__seed=1), tmp_path / "c")
    assert_same_bits(tensors(tmp_path / "a", 8), tensors(tmp_path / "b", 8))
    key = "ema:blocks.0.mlp.fc1.weight"
    assert not torch.equal(tensors(tmp_path / "a", 8)[key], tensors(tmp_path / "c", 8)[key])
    assert Run(tmp_path / "a").metrics()[0]["loss"] != Run(tmp_path / "c").metrics()[0]["loss"]


def losses_of(state: State, steps: int) -> torch.Tensor:
    batches = open_loader(state, 0, steps)
    return torch.stack([train_step(state, step, b) for step, b in enumerate(batches)])


@pytest.mark.parametrize("branch", ["shared", "paper"])
def test_accumulation_leaves_the_losses_as_they_are(store: Path, branch: str) -> None:
    """Label states, noise and windows belong to the global batch, so 1, 2 and 5 micro-batches give one loss trace."""
    changes = {"data__path": str(store), "probe__branch": branch}
    truth = losses_of(setup(tiny(**changes)), 6)
    for accumulate in (2, 5):
        got = losses_of(setup(tiny(**changes, optim__accumulate=accumulate)), 6)
        assert relative_error(got[:, :3], truth[:, :3]) < 1e-5
        assert torch.equal(got[:, 3:], truth[:, 3:])


class NoHostReads(TorchDispatchMode):
    """Raises on every operation that brings a value, or a shape that depends on one, to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in reads or masks:
            raise AssertionError(f"host read: {name}")
        return func(*args, **(kwargs or {}))


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("host read")


@pytest.mark.parametrize(
    ("branch", "optimizer"), [("shared", "torch"), ("paper", "torch"), ("shared", "csrc"), ("shared", "reference")]
)
def test_step_reads_nothing_back(store: Path, branch: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = setup(tiny(data__path=str(store), probe__branch=branch, optim__accumulate=2, backend__optimizer=optimizer))
    ready = list(open_loader(state, 0, 2))
    train_step(state, 0, ready[0])
    for name in ("tolist", "numpy", "cpu", "__array__"):  # on a CPU these do not go through the dispatcher
        monkeypatch.setattr(torch.Tensor, name, refuse)
    x = torch.ones(3)
    with NoHostReads():
        train_step(state, 1, ready[1])
        for read in (lambda: x.sum().item(), lambda: x[x > 0], x.unique, x.tolist, x.cpu, lambda: bool(x[0])):
            with pytest.raises(AssertionError, match="host read"):
                read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_does_not_wait_for_the_gpu(store: Path) -> None:
    state = setup(tiny(data__path=str(store), train__device="cuda"))
    ready = list(open_loader(state, 0, 2))
    train_step(state, 0, ready[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, 1, ready[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_overfits_one_batch(store: Path) -> None:
    """Both losses of one fixed batch, at fixed noise, go towards zero."""
    state = setup(tiny(data__path=str(store), optim__lr=5e-3, probe__weight_start=0.3, probe__weight_end=0.3))
    batch = next(iter(open_loader(state, 0, 1)))
    trace = []
    for _ in range(400):
        trace.append(train_step(state, 0, batch))
    first, last = trace[0], torch.stack(trace[-20:]).mean(0)
    assert last[0] < 0.15 * first[0]
    assert last[1] < 0.15 * first[1]


def test_unconditional_model_trains_with_a_probe(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), model__conditional=False, train__steps=4), tmp_path / "run")
    assert run.metrics()[-1]["lsep"] > 0


def test_probe_ends(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), probe__end_step=4), tmp_path / "run")
    assert [m["lsep"] > 0 for m in run.metrics()] == [True, True, False, False]
    assert [m["probe_accuracy"] is None for m in run.metrics()] == [False, False, True, True]


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["block", "model"])
def test_compiled_training_has_the_same_losses(store: Path, what: str) -> None:
    changes = {"data__path": str(store), "model__depth": 1, "probe__depth": 1}
    got = losses_of(setup(tiny(**changes, train__compile=what)), 3)
    assert relative_error(got[:, :3], losses_of(setup(tiny(**changes)), 3)[:, :3]) < 1e-4


def test_bf16_autocast_stays_near_fp32(store: Path) -> None:
    truth = losses_of(setup(tiny(data__path=str(store))), 6)
    for wide in (False, True):
        got = losses_of(setup(tiny(data__path=str(store), train__precision="bf16", train__fp32_residual=wide)), 6)
        for i in (0, 1):  # denoising, LSEP
            assert relative_error(got[:, i], truth[:, i]) < 0.01


def test_another_configuration_is_refused_and_listed(store: Path, tmp_path: Path) -> None:
    train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"another configuration \(optim.lr: 0.001 -> 0.002; train.seed: 0 -> 7\)"):
        train(tiny(data__path=str(store), optim__lr=0.002, train__seed=7), tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(tiny(data__path=str(store)), tmp_path)


def test_resume_without_checkpoint(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume: no checkpoint in"):
        train(tiny(data__path=str(store)), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_longer_run_goes_on(store: Path, tmp_path: Path) -> None:
    train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    train(tiny(data__path=str(store)), tmp_path / "run", resume=True)
    train(tiny(data__path=str(store)), tmp_path / "whole")
    assert_same_bits(tensors(tmp_path / "run", 8), tensors(tmp_path / "whole", 8))


def test_finished_run_has_nothing_to_do(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    before = run.metrics_file.read_bytes()
    train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    assert "already at step 4 of 4, nothing to train" in capsys.readouterr().out
    assert run.metrics_file.read_bytes() == before


def test_refusals_leave_the_configuration_alone(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    before = run.config_file.read_bytes()
    with pytest.raises(UserError, match="--train.steps is 2, but .* is at step 4 already"):
        train(tiny(data__path=str(store), train__steps=2), run.path)
    os.truncate(run.checkpoints / "0000004" / "shard-00000-model.safetensors", 100)
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        train(tiny(data__path=str(store), train__steps=8), run.path, resume=True)
    assert run.config_file.read_bytes() == before


def test_a_run_cut_off_before_its_results_is_finished(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    grid = run.samples / "step-0000004.png"
    run.results_file.unlink(), grid.unlink()
    train(tiny(data__path=str(store), train__steps=4), run.path)
    assert run.results()["steps"] == 4 and grid.exists()


@pytest.mark.parametrize("optimizer", ["torch", "csrc", "reference"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(store: Path, optimizer: str) -> None:
    state = setup(tiny(data__path=str(store), backend__optimizer=optimizer))
    batches = iter(open_loader(state, 0, 3))
    train_step(state, 0, next(batches))
    before = {k: v.clone() for k, v in state.objective.state_dict().items()}
    moments = {k: v.clone() for k, v in state.optimizer.tensors().items()}
    averages = {k: v.clone() for k, v in state.ema.state_dict().items()}
    (batch,) = next(batches)
    skipped = train_step(state, 1, [batch._replace(x=torch.full_like(batch.x, torch.nan))])
    assert skipped[-1] == 1 and not skipped[:-1].any()
    assert_same_bits(before, state.objective.state_dict())
    assert_same_bits(moments, state.optimizer.tensors())
    assert_same_bits(averages, state.ema.state_dict())
    done = train_step(state, 2, next(batches))
    assert done[-1] == 0 and done[0] > 0 and done[2] > 0


def test_infinite_loss_stops_with_the_step(store: Path, tmp_path: Path) -> None:
    config = tiny(data__path=str(store), optim__lr=1e18, optim__clip=1e18, train__steps=40)
    with pytest.raises(UserError, match="11 steps in a row up to step 12 had no finite gradient"):
        train(config, tmp_path / "run")
    lines = Run(tmp_path / "run").metrics()
    assert [(m["loss"] is None, m["skipped_steps"]) for m in lines] == [(False, 1), *[(True, 2)] * 4]


def test_ctrl_c_saves_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    """And while it runs, nothing else can train there."""
    config = tiny(data__path=str(store), train__steps=100_000, train__checkpoint_every=100_000)
    process = subprocess.Popen(
        command(tmp_path / "run", config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "step 4/" not in process.stdout.readline():
        assert process.poll() is None
    with pytest.raises(UserError, match=f"run is in use by process {process.pid} on host .*: wait for it, stop it, or"):
        train(config, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: lsep train quickstart" in errors and "--resume" in errors
    assert "Traceback" not in errors
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert last is not None and int(last.name) >= 4
    assert Run(tmp_path / "run").metrics()[-1]["step"] == int(last.name)
    assert not Run(tmp_path / "run").lock_file.exists()


def test_full_disk_leaves_the_earlier_checkpoint(store: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the write fails in its middle, as with no space left."""
    run = tmp_path / "run"
    train(tiny(data__path=str(store), train__steps=4), run)
    before = tensors(run, 4)
    size = (run / "checkpoints" / "0000004" / "shard-00000-model.safetensors").stat().st_size
    limited = subprocess.run(
        command(run, tiny(data__path=str(store), train__checkpoint_every=2)),
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )  # fmt: skip
    assert limited.returncode == 2, limited.stderr
    warning, error = limited.stderr.strip().splitlines()  # training goes on after the first, and ends with the last
    for step, line in ((6, warning), (8, error)):
        assert f"000000{step}: the checkpoint could not be written" in line
        assert "the one before, 0000004, is intact" in line
    assert "step 8/8" in limited.stdout
    assert_same_bits(tensors(run, 4), before)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["0000004"]


def test_missing_gpu_is_one_sentence(store: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="'cuda' was asked for"):
        setup(tiny(data__path=str(store), train__device="cuda"))
