"""Averages beside `ema`, and EDM2's reconstruction: against sums of the weights that were recorded step by step."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from test_dist import torchrun

from bench.trial import flags
from lsep import checkpoint, cli, shards
from lsep.averages import kept, part_name, part_value
from lsep.checks import check
from lsep.config import Config, from_dict, override
from lsep.errors import UserError
from lsep.power import Profile, coefficients, gamma_of
from lsep.reconstruction import reconstruct
from lsep.run import Run
from lsep.sample import load_ema
from lsep.step import open_loader, setup, train_step
from lsep.train import train

KEPT = {"optim__ema_extra": (0.7, 0.95), "optim__ema_profiles": (0.05, 0.1)}


def config(store: Path, **changes: object) -> Config:
    return tiny(data__path=str(store), train__log_every=6, train__checkpoint_every=6, **KEPT | changes)


def tensors(path: Path, part: str) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(path, part)


def error(got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative, of all tensors together."""
    assert got.keys() == truth.keys()
    flat = [torch.cat([t[name].double().flatten() for name in sorted(truth)]) for t in (got, truth)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_exponents_are_those_published() -> None:
    """EDM2, section 3.1: gamma 16.97 and 6.94 for widths 0.05 and 0.10."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.001, 0.02, 0.2, 0.28):
        g = gamma_of(width)
        assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("profile", [Profile(40, sigma_rel=0.03), Profile(40, sigma_rel=0.25), Profile(40, decay=0.9)])
def test_a_profile_is_what_its_update_amounts_to(profile: Profile) -> None:
    """Unit vectors in place of the weights: the average of them is the profile."""
    weights = np.eye(41)
    average = weights[0]
    for t in range(1, 41):
        gamma = 0.0 if profile.sigma_rel is None else gamma_of(profile.sigma_rel)
        beta = profile.decay if profile.decay is not None else (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * weights[t]
    np.testing.assert_allclose(profile.weights(0, 41), average, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(np.append(profile.weights(0, 7), profile.weights(7, 60)), profile.weights(0, 60))
    assert profile.weights(0, 60).sum() == pytest.approx(1) and not profile.weights(41, 60).any()
    if profile.sigma_rel is not None:  # its standard deviation, in the limit of many steps
        k, p = np.arange(20_001) / 20_000, Profile(20_000, sigma_rel=profile.sigma_rel).weights(0, 20_001)
        assert np.sqrt(p @ k**2 - (p @ k) ** 2) == pytest.approx(profile.sigma_rel, rel=1e-3)


@pytest.mark.parametrize("by", ["reference", "torch", "csrc"])
def test_averages_follow_the_weights(store: Path, by: str) -> None:
    """Twelve steps, one without a finite gradient: sums of the recorded weights in float64."""
    state = setup(config(store, backend__optimizer=by, optim__lr=0.01))
    recorded = [{k: v.double().clone() for k, v in checkpoint.weights(state.objective).items()}]
    for step, (batch,) in enumerate(open_loader(state, 0, 12)):
        bad = batch._replace(x=torch.full_like(batch.x, torch.nan))
        assert train_step(state, step, [bad if step == 5 else batch])[-1] == (step == 5)
        recorded.append({k: v.double().clone() for k, v in checkpoint.weights(state.objective).items()})
    assert list(state.averages) == ["ema_0_7", "ema_0_95", "power_0_05", "power_0_1"] == list(kept(state.config.optim))
    for name, module in state.averages.items():
        value = part_value(name)
        if name.startswith("power"):
            shares, weights = Profile(12, sigma_rel=value).weights(0, 13), recorded
        else:  # a skipped step is none
            shares, weights = Profile(11, decay=value).weights(0, 12), [r for i, r in enumerate(recorded) if i != 6]
        truth = {k: sum(float(s) * r[k] for s, r in zip(shares, weights, strict=True)) for k in weights[0]}
        assert error(checkpoint.weights(module), truth) < 1e-6  # type: ignore[arg-type]
        assert error(checkpoint.weights(module), weights[-1]) > 1e-3  # type: ignore[arg-type]


def test_without_further_averages_nothing_changes(store: Path, tmp_path: Path) -> None:
    with_them, without = (setup(tiny(data__path=str(store), **changes)) for changes in (KEPT, {}))
    for state in (with_them, without):
        for step, batches in enumerate(open_loader(state, 0, 3)):
            train_step(state, step, batches)
    assert not without.averages
    plain = train(tiny(data__path=str(store), train__steps=1), tmp_path / "plain")
    with pytest.raises(UserError, match="missing tensors for this model"):
        checkpoint.load(
            checkpoint.find(plain.checkpoints, 1),
            with_them.objective,
            with_them.ema,
            with_them.optimizer,
            with_them.averages,
        )
    for a, b in ((with_them.objective, without.objective), (with_them.ema, without.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def trained(store: Path, tmp_path: Path) -> Run:
    return train(config(store, train__steps=12, optim__ema_snapshot_every=1), tmp_path / "run")


def test_resumed_runs_have_the_same_averages_and_copies(store: Path, trained: Run, tmp_path: Path) -> None:
    """6 and 6 steps are 12, bit for bit; copies of steps that are lost are dropped and written again."""
    other = train(config(store, train__steps=6, optim__ema_snapshot_every=1), tmp_path / "other")
    damaged = checkpoint.steps(other.snapshots)[-1]
    shutil.copytree(damaged, other.snapshots / "0000009")
    shutil.copytree(damaged, other.snapshots / "0000020")
    train(config(store, train__steps=12, optim__ema_snapshot_every=4), other.path)  # may change on the way
    for part in shards.read_manifest(checkpoint.find(trained.checkpoints, 12)).parts:
        a, b = (tensors(checkpoint.find(run.checkpoints, 12), part) for run in (trained, other))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    assert [int(p.name) for p in checkpoint.steps(other.snapshots)] == [1, 2, 3, 4, 5, 6, 8, 12]
    for step in (1, 6, 8, 12):
        files = [sorted(checkpoint.find(run.snapshots, step).glob("*.safetensors")) for run in (trained, other)]
        assert len(files[0]) == 2
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    with pytest.raises(UserError, match=r"optim.ema_profiles: \(0.05, 0.1\) -> \(0.05,\)"):
        train(config(store, train__steps=12, optim__ema_profiles=(0.05,)), other.path)


def test_reconstruction_is_the_average_itself(store: Path, trained: Run, tmp_path: Path) -> None:
    """Copies of every step span all profiles: what was kept elsewhere comes out, up to rounding."""
    asked = config(store, train__steps=12, optim__ema_profiles=(0.075,), optim__ema_extra=())
    kept_there = tensors(checkpoint.find(train(asked, tmp_path / "direct").checkpoints, 12), "power_0_075")
    said = reconstruct(trained, tmp_path / "new", 0.075, None, None)
    found = checkpoint.find(Run(tmp_path / "new").checkpoints, 12)
    assert error(tensors(found, "ema"), kept_there) < 1e-5 and said[0].endswith(
        "of 24 copies; error of the profile 0.00%"
    )
    others = [tensors(checkpoint.find(trained.checkpoints, 12), part) for part in ("power_0_05", "power_0_1", "ema")]
    assert min(error(other, kept_there) for other in others) > 1e-4
    # Earlier ones, and constant decays, whose share of the first weights no copy has.
    reconstruct(trained, tmp_path / "early", None, 0.7, 6)
    truth = tensors(checkpoint.find(trained.checkpoints, 6), "ema_0_7")
    assert 0 < error(tensors(checkpoint.find(Run(tmp_path / "early").checkpoints, 6), "ema"), truth) < 0.02
    # The run that was made is one: it samples, exports and starts trainings.
    assert cli.main(["sample", str(tmp_path / "new"), "--num", "4", "--steps", "2"]) == 0
    assert cli.main(["export", str(tmp_path / "new"), "--out", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported and all(torch.equal(v, tensors(found, "ema")[k]) for k, v in exported.items())
    train(tiny(data__path=str(store), train__steps=1, train__init=str(tmp_path / "new")), tmp_path / "started")


def test_shards_of_two_processes_are_put_together(store: Path, tmp_path: Path) -> None:
    asked = config(store, train__steps=4, optim__ema_snapshot_every=2, dist__mode="fsdp")
    command = ["-m", "lsep", "train", "quickstart", *flags(asked), "--run-dir", str(tmp_path / "two")]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    train(asked, tmp_path / "one")
    for name in ("one", "two"):
        reconstruct(Run(tmp_path / name), tmp_path / f"new-{name}", 0.07, None, None)
    one, two = (tensors(checkpoint.find(Run(tmp_path / f"new-{n}").checkpoints, 4), "ema") for n in ("one", "two"))
    assert error(two, one) < 1e-5
    assert len(list(checkpoint.find(Run(tmp_path / "two").snapshots, 4).glob("*.safetensors"))) == 4


def test_few_copies_come_close_and_fewer_are_said(trained: Run, tmp_path: Path) -> None:
    """32 copies of two widths over a long training: within 1 % of any width between (EDM2, figure 5)."""
    steps = [10_000 * i // 32 for i in range(1, 33)]
    bases = [Profile(t, sigma_rel=width) for t in steps for width in (0.05, 0.1)]
    for wanted in (Profile(10_000, sigma_rel=0.075), Profile(5000, sigma_rel=0.06), Profile(10_000, sigma_rel=0.15)):
        shares, left = coefficients(wanted, [b for b in bases if b.step <= wanted.step])
        assert left < 0.01 and shares.sum() == pytest.approx(1, abs=1e-12)
        made = sum(s * b.weights(0, 10_001) for s, b in zip(shares, bases, strict=False))
        truth = wanted.weights(0, 10_001)
        assert np.linalg.norm(made - truth) / np.linalg.norm(truth) == pytest.approx(left, rel=1e-6)
    assert coefficients(Profile(10_000, sigma_rel=0.01), bases)[1] > 0.1
    for path in checkpoint.steps(trained.snapshots)[:-1]:
        shutil.rmtree(path)
    first, loose = reconstruct(trained, tmp_path / "new", 0.02, None, None)
    assert "of 2 copies" in first and loose.startswith("above 5%: only roughly")


def test_averages_are_sampled_and_exported(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_ema(trained, average="ema_0_95")[0]
    truth = tensors(checkpoint.find(trained.checkpoints, 12), "ema_0_95")
    assert all(torch.equal(p, truth[name]) for name, p in model.named_parameters())
    grids = []
    for average in ("ema", "power_0_1"):
        assert cli.main(["sample", str(trained.path), "--num", "4", "--steps", "2", "--average", average]) == 0
        grids.append(Path(capsys.readouterr().out.splitlines()[0]))
    assert grids[0] != grids[1] and all(grid.exists() for grid in grids)
    assert cli.main(["export", str(trained.path), "--average", "power_0_05", "--out", str(tmp_path / "out")]) == 0
    truth = tensors(checkpoint.find(trained.checkpoints, 12), "power_0_05")
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["x_embedder.proj.weight"], truth["x_embedder.proj.weight"]
    )
    assert "weights: power_0_05, step 12" in (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["checkpoint", "verify", str(trained.path)]) == 0
    file = checkpoint.find(trained.checkpoints, 12) / "shard-00000-ema_0_7.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert cli.main(["ema", "list", str(trained.path)]) == 0
    listed = capsys.readouterr().out
    assert "ema, ema_0_7, ema_0_95, power_0_05, power_0_1\n" in listed and "ema_0_7.safetensors: truncated" in listed
    assert listed.count("power_0_05, power_0_1 (copy)") == 12


def test_names_and_configurations(store: Path) -> None:
    assert part_name("ema", 0.9999) == "ema_0_9999" and part_name("power", 0.05) == "power_0_05"
    for kind, value in (("ema", 0.0), ("ema", 0.99999999), ("power", 0.001)):
        assert part_value(part_name(kind, value)) == value
    assert [part_value(name) for name in ("ema", "model", "ema_", "power_x", "ema_0_9_9")] == [None] * 5
    one = config(store)
    assert from_dict(json.loads(json.dumps(vars(one), default=vars)), "x") == one
    assert override(one, {"optim.ema_extra": [0, 0.5]}).optim.ema_extra == (0.0, 0.5)
    for values, sentence in (
        ({"optim__ema_extra": (0.9, 1.0)}, "--optim.ema-extra holds 1.0, expected numbers from 0 to below 1"),
        ({"optim__ema_extra": (0.9, 0.9)}, "--optim.ema-extra holds 0.9 2 times, expected once"),
        ({"optim__ema_profiles": (0.3,)}, "--optim.ema-profiles holds 0.3, expected numbers from 0.001 to 0.28"),
        ({"optim__ema_profiles": (float("nan"),)}, "--optim.ema-profiles holds nan, expected"),
        ({"optim__ema_snapshot_every": 5}, "--optim.ema-snapshot-every is 5 without --optim.ema-profiles"),
        ({"optim__ema_snapshot_every": -1}, "--optim.ema-snapshot-every is -1, expected at least 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            check(tiny(**values))
    for wrong in ("0.9", 0.9, ["a"], [True]):
        with pytest.raises(UserError, match="optim.ema_extra is .*, expected a list of floats"):
            override(one, {"optim.ema_extra": wrong})


def test_bad_input_is_one_sentence(
    trained: Run, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = str(trained.path), str(tmp_path / "new")
    plain = str(train(tiny(data__path=str(store), train__steps=1), tmp_path / "plain").path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    make = ["ema", "reconstruct", run, "--out", new]
    for argv, sentence in (
        (make, "neither of --sigma-rel and --decay given, expected one of them"),
        ([*make, "--sigma-rel", "0.1", "--decay", "0.9"], "both of --sigma-rel and --decay given"),
        ([*make, "--sigma-rel", "0.5"], "--sigma-rel is 0.5, expected from 0.001 to 0.28"),
        ([*make, "--decay", "1"], "--decay is 1.0, expected from 0 to below 1"),
        ([*make, "--decay", "0.9", "--step", "13"], "--step is 13, expected one of the copies': 1, 2, 3, ..., 12"),
        (["ema", "reconstruct", plain, "--out", new, "--decay", "0.9"], "no copies of averages, expected a training"),
        (["ema", "reconstruct", run, "--out", str(taken), "--decay", "0.9"], "is there already, expected a folder"),
        (["ema", "reconstruct", run, "--out", run, "--decay", "0.9"], "is there already, expected a folder"),
        (["ema", "make", run], "command 'ema make' is unknown"),
        (["ema", "list", new], "not a run directory"),
        (["sample", run, "--average", "0.9"], "--average is '0.9', and "),
        (["sample", plain, "--average", "power_0_05"], "0000001 has ema"),
        (["export", run, "--out", new, "--average", "model"], "--average is 'model', expected an average; --no-ema"),
        (["export", run, "--out", new, "--average", "power_0_2"], "has ema, ema_0_7, ema_0_95, power_0_05, power_0_1"),
        (["export", run, "--out", new, "--no-ema", "--average", "ema_0_7"], "--no-ema and --average ema_0_7 exclude"),
    ):
        assert cli.main(argv) == 2, argv
        assert sentence in capsys.readouterr().err, sentence
        assert not Path(new).exists()
    file = checkpoint.find(trained.snapshots, 3) / "shard-00000-power_0_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert cli.main([*make, "--sigma-rel", "0.075"]) == 2
    assert f"{file}: damaged, sha256" in capsys.readouterr().err and not Path(new).exists()
    assert cli.main([*make, "--sigma-rel", "0.075", "--step", "2"]) == 0  # what is not needed need not be whole
    older, newer = (len(shards.read_manifest(p).parts) for p in checkpoint.steps(trained.checkpoints))
    assert older == newer == 7 and all(a < b for a, b in pairwise(checkpoint.steps(trained.snapshots)))
