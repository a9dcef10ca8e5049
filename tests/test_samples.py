"""`lsep sample` at scale: the same bits whatever draws them, kills survived, guidance of all kinds, decoding."""

import os
import resource
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively, tiny
from test_dist import torchrun

from lsep import parts as parts_room
from lsep import sample
from lsep.cli import main
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.parts import Parts, assemble
from lsep.run import Run
from lsep.sample import to_uint8
from lsep.samples import Request, sample_run
from lsep.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("samples")
    x = np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)
    write_store(folder / "store", kind="samples", x=x, y=np.arange(20) % 5, num_classes=5, scale=0.5, shift=0.1)
    changes = {"train__steps": 6, "train__checkpoint_every": 3, "sample__num": 2, "sample__steps": 2}
    return train(
        tiny(data__path=str(folder / "store"), optim__ema_decay=0.1, optim__lr=0.05, **changes), folder / "run"
    )


def drawn(
    run: Run, out: Path, num: int = 70, scales: tuple[float, ...] = (1.5,), **changes: Any
) -> dict[str, np.ndarray]:
    """The arrays of `num` samples; `batch_size` and `sampler` are the configuration's, the rest the request's."""
    own = {k: changes.pop(k) for k in ("batch_size", "sampler", "steps") if k in changes}
    config = run.config()
    config = replace(config, sample=replace(config.sample, num=num, steps=own.pop("steps", 2), **own))
    files = sample_run(run, config, Request(**changes), scales, out, None, "cpu")
    return loaded(files[-1])


def loaded(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(a[name], b[name])


def test_batch_size_changes_no_bit(run: Run, tmp_path: Path) -> None:
    whole = drawn(run, tmp_path / "whole", batch_size=100)
    assert whole["arr_0"].shape == (70, 3, 8, 8) and np.ptp(whole["arr_0"]) > 0
    for size in (8, 64):
        assert_equal(drawn(run, tmp_path / str(size), batch_size=size), whole)
    assert_equal({k: v[:33] for k, v in drawn(run, tmp_path / "a", shuffle=False).items()},
                 drawn(run, tmp_path / "b", num=33, shuffle=False))  # fmt: skip


def test_two_processes_change_no_bit(run: Run, tmp_path: Path) -> None:
    flags = ["--num", "70", "--cfg", "1.5", "--steps", "2", "--batch-size", "32", "--out", str(tmp_path / "two.npz")]
    done = torchrun(2, "-m", "--", "lsep", "sample", str(run.path), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two.png"), str(tmp_path / "two.npz")]
    assert "images/s" in done.stderr
    assert_equal(loaded(tmp_path / "two.npz"), drawn(run, tmp_path / "one"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two.npz", "two.png"]


def test_what_was_drawn_before_a_kill_is_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(run, tmp_path / "whole", batch_size=32)
    real, calls = sample.draw, []

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args[4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "draw", draw)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        drawn(run, out, batch_size=32)
    parts = sorted((out / "samples.npz.parts").glob("part-*.npy"))
    assert [p.name[:10] for p in parts] == ["part-00000", "part-00001"] and not (out / "samples.npz").exists()
    content = bytearray(parts[0].read_bytes())
    content[-1] ^= 1
    parts[0].write_bytes(content)  # damaged: drawn again
    (out / "samples.npz.parts" / ".part-00002.tmp").write_bytes(b"torn")
    calls.append(-1)
    assert_equal(drawn(run, out, batch_size=32), whole)
    assert calls[4:] == [0, 64]
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "samples.npz", "settings.json"]


def test_a_killed_process_is_continued(run: Run, tmp_path: Path) -> None:
    flags = ["--num", "256", "--steps", "100", "--cfg", "1.5", "--batch-size", "32", "--out", str(tmp_path / "cut.npz")]
    command = [sys.executable, "-m", "lsep", "sample", str(run.path), *flags, "--device", "cpu"]
    parts = tmp_path / "cut.npz.parts"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while len(list(parts.glob("part-*.npy"))) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*.npy")}
    assert 2 <= len(before) < 8
    kept = {}
    real = Parts.remove

    def remove(self: Parts) -> None:
        kept.update({p.name: p.stat().st_mtime_ns for p in self.folder.glob("part-*.npy")})
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "remove", remove)
        cut = drawn(run, tmp_path / "cut.npz", num=256, steps=100, batch_size=32)
    assert len(kept) == 8 and before.items() <= kept.items()
    assert_equal(cut, drawn(run, tmp_path / "whole", num=256, steps=100))


def test_a_killed_sweep_keeps_its_whole_scales(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = sample.draw, []

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args[1].sample.cfg, args[4]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "draw", draw)
    out, scales = tmp_path / "out", (1.5, 2.0)
    with pytest.raises(KeyboardInterrupt):
        drawn(run, out, batch_size=32, scales=scales)
    drawn(run, out, batch_size=32, scales=scales)
    assert calls[5:] == [(2.0, 32), (2.0, 64)]
    for scale in scales:
        alone = drawn(run, tmp_path / f"{scale}.npz", scales=(scale,))
        assert_equal(loaded(out / f"cfg-{scale:g}" / "samples.npz"), alone)
    del calls[5:]
    drawn(run, out, batch_size=32, scales=scales, seed=1)  # other samples: nothing is kept
    assert len(calls) == 5 + 6


def test_parts_without_settings_are_of_nobody(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", 40, 32)
    parts.open({"seed": 0})
    parts.write(0, np.zeros((32, 2, 2, 3), np.uint8))
    (parts.folder / "settings.json").unlink()
    parts.open({"seed": 1})
    assert parts.whole(0) is None
    parts.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_no_image(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sample.draw

    def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = real(*args, **kwargs)
        x[7, 0, 3, 3] = float("nan")
        return x

    monkeypatch.setattr(sample, "draw", draw)
    with pytest.raises(UserError, match=r"image 7 of .* is not finite"):
        drawn(run, tmp_path / "out")


def test_parts_of_other_samples_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drawn(run, tmp_path / "out")
    monkeypatch.setattr(sample, "draw", real)
    with pytest.raises(UserError, match=r"holds parts of other samples \(seed: 0 -> 1\): remove it or give the same"):
        drawn(run, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match=r"\(compile: False -> True\)"):  # another rounding
        drawn(run, tmp_path / "out", compile=True)
    (tmp_path / "out" / "samples.npz.parts" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="not settings of this program"):
        drawn(run, tmp_path / "out")


def test_labels(run: Run, tmp_path: Path) -> None:
    whole = drawn(run, tmp_path / "a")
    assert np.bincount(whole["arr_1"]).tolist() == [14] * 5 and whole["arr_1"][:5].tolist() != [0, 1, 2, 3, 4]
    plain = drawn(run, tmp_path / "b", shuffle=False)
    assert plain["arr_1"].tolist() == [i % 5 for i in range(70)]
    order = np.random.default_rng(0).permutation(70)
    assert_equal({k: v[order] for k, v in plain.items()}, whole)
    chance = drawn(run, tmp_path / "c", num=500, labels="random", shuffle=False, steps=1)["arr_1"]
    assert set(chance) == set(range(5)) and np.bincount(chance).tolist() != [100] * 5
    assert chance[:70].tolist() == drawn(run, tmp_path / "d", labels="random", shuffle=False)["arr_1"].tolist()
    assert set(drawn(run, tmp_path / "e", classes=(3, 1), labels="random")["arr_1"]) == {1, 3}


def test_a_sweep_is_its_scales_one_by_one(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num", "5", "--steps", "2", "--no-shuffle"]
    assert main(["sample", str(run.path), *flags, "--cfg", "1", "1.5", "--out", str(tmp_path / "sweep")]) == 0
    assert [line.split("/")[-2] for line in capsys.readouterr().out.split()] == ["cfg-1"] * 2 + ["cfg-1.5"] * 2
    for scale in ("1", "1.5"):
        assert main(["sample", str(run.path), *flags, "--cfg", scale, "--out", str(tmp_path / f"{scale}.npz")]) == 0
        file = tmp_path / "sweep" / f"cfg-{scale}" / "samples.npz"
        assert_equal(loaded(file), loaded(tmp_path / f"{scale}.npz"))
    with pytest.raises(UserError, match="is one file, but --cfg has 2 scales"):
        drawn(run, tmp_path / "x.npz", scales=(1.0, 2.0))


def test_autoguidance_extrapolates_from_the_weaker_model(run: Run) -> None:
    config = run.config()
    config = replace(config, sample=replace(config.sample, cfg=2.5, guidance_high=0.5))
    model, weak = (lively(Objective(config, run.manifest()), seed).model for seed in (0, 1))
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    velocity = sample.guided(model, y, config.sample, weak)
    with torch.no_grad():
        strong, base = (m(x.float(), torch.full((4,), 0.4), y).double() for m in (model, weak))
        torch.testing.assert_close(velocity(x, 0.4), base + 2.5 * (strong - base))
        torch.testing.assert_close(velocity(x, 0.6), model(x.float(), torch.full((4,), 0.6), y).double())


def test_autoguidance_by_a_runs_earlier_weights(run: Run, tmp_path: Path) -> None:
    alone, guided = (
        drawn(run, tmp_path / name, autoguidance=weak) for name, weak in (("a", None), ("b", f"{run.path}@3"))
    )
    assert not np.allclose(alone["arr_0"], guided["arr_0"])
    same = drawn(run, tmp_path / "c", autoguidance=str(run.path))  # by itself it changes nothing
    assert np.abs(same["arr_0"] - drawn(run, tmp_path / "d", scales=(1.0,))["arr_0"]).max() < 1e-5
    with pytest.raises(UserError, match="no checkpoint of step 4, found: 3, 6"):
        drawn(run, tmp_path / "e", autoguidance=f"{run.path}@4")
    with pytest.raises(UserError, match="expected RUN or RUN@STEP"):
        drawn(run, tmp_path / "e", autoguidance=f"{run.path}@last")


def test_rounding_by_hand() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1 / 255, 0.9, 1.0, 2.0]).view(1, 1, 1, 7)
    assert to_uint8(x, "truncate").ravel().tolist() == [0, 0, 127, 128, 242, 255, 255]
    assert to_uint8(x, "nearest").ravel().tolist() == [0, 0, 128, 128, 242, 255, 255]
    for byte in range(256):  # what was an image is that image
        assert to_uint8(torch.full((1, 1, 1, 1), byte / 127.5 - 1)).item() == byte


def test_latents_are_decoded(run: Run, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"block_out_channels": [4, 4], "norm_num_groups": 2, "latent_channels": 3}
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(**blocks, **types).eval()
    vae.save_pretrained(tmp_path / "vae")
    images = drawn(run, tmp_path / "a", vae=str(tmp_path / "vae"), rounding="truncate", shuffle=False, batch_size=32)
    assert images["arr_0"].shape == (70, 16, 16, 3) and images["arr_0"].dtype == np.uint8
    latents = torch.from_numpy(drawn(run, tmp_path / "b", shuffle=False)["arr_0"])
    with torch.no_grad():
        truth = vae.decode(latents).sample
    wanted = ((truth + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).floor().numpy()
    assert np.abs(images["arr_0"] - wanted).max() <= 1 and (images["arr_0"] == wanted).mean() > 0.999
    assert_equal(images, drawn(run, tmp_path / "e", vae=str(tmp_path / "vae"), rounding="truncate", shuffle=False))
    other = diffusers.AutoencoderKL(**{**blocks, "latent_channels": 4}, **types)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="its latents have 4 channels, expected the run's 3"):
        drawn(run, tmp_path / "c", vae=str(tmp_path / "other"))


def test_a_vae_is_known_by_its_weights(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    shape: dict[str, Any] = {"block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 3}

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draw", interrupted)
    for seed, expected in (
        (0, pytest.raises(KeyboardInterrupt)),
        (1, pytest.raises(UserError, match=r"\(vae_sha256: ")),
    ):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(**shape).save_pretrained(tmp_path / "vae")
        with expected:
            drawn(run, tmp_path / "out", vae=str(tmp_path / "vae"))


def test_dopri5_meets_small_steps(run: Run, tmp_path: Path) -> None:
    fine = drawn(run, tmp_path / "fine", num=4, sampler="heun", steps=60, scales=(1.0,))
    found = drawn(run, tmp_path / "dopri5", num=4, sampler="dopri5", scales=(1.0,))
    assert np.abs(found["arr_0"] - fine["arr_0"]).max() < 1e-3 * np.abs(fine["arr_0"]).max()
    assert_equal(found, drawn(run, tmp_path / "again", num=4, sampler="dopri5", scales=(1.0,)))


def test_the_archive_is_put_together_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_room, "_ROWS", 7)
    parts = Parts(tmp_path / "parts", 100, 32)
    parts.open({"a": 1})
    images = np.random.default_rng(0).integers(256, size=(100, 4, 4, 3)).astype(np.uint8)
    for i in range(parts.count):
        parts.write(i, images[slice(*parts.range(i))])
    order, labels = np.random.default_rng(1).permutation(100), np.arange(100)
    opened, load = [], np.load
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", lambda *args, **kwargs: opened.append(load(*args, **kwargs)) or opened[-1])
        assemble(tmp_path / "x.npz", parts.files(), order, labels)
    assert opened and all(isinstance(a, np.memmap) for a in opened)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["arr_0"], images[order])
        np.testing.assert_array_equal(archive["arr_1"], order)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
    next(iter(parts.folder.glob("part-00001-*"))).unlink()
    with pytest.raises(UserError, match="part 1 is missing or damaged"):
        parts.files()


def test_more_parts_than_files_may_be_open(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", 32 * 60, 32)
    parts.open({})
    images = np.random.default_rng(0).integers(256, size=(parts.num, 2, 2, 1)).astype(np.uint8)
    for i in range(parts.count):
        parts.write(i, images[slice(*parts.range(i))])
    order = np.random.default_rng(1).permutation(parts.num)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(p.name) for p in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        assemble(tmp_path / "x.npz", parts.files(), order, order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(loaded(tmp_path / "x.npz")["arr_0"], images[order])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num", "0"], "--num is 0, expected at least 1"),
        (["--cfg", "-1"], "--cfg is -1.0, expected at least 0"),
        (["--classes", "7"], "--classes holds 7, expected from 0 to 4"),
        (["--vae", "./none"], "--vae ./none: no such folder"),
        (["--cfg", "2", "--autoguidance", "none"], "none: not a run directory"),
        (["--checkpoint", "9"], "no checkpoint of step 9"),
        (["--cfg"], "--cfg is empty"),
        (["--cfg", "1.5", "2", "1.5"], "--cfg holds 1.5 2 times"),
        (["--classes"], "--classes is empty"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (["--autoguidance", "."], "--autoguidance acts where --cfg is not 1"),
    ],
)
def test_bad_flags(run: Run, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.samples.iterdir())
    assert main(["sample", str(run.path), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(run.samples.iterdir()) == before


def test_a_missing_torchdiffeq_is_named(run: Run, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torchdiffeq'] = None; from lsep.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "sample", str(run.path), "--sampler", "dopri5", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "needs torchdiffeq, which is not installed: pip install torchdiffeq" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_missing_torchdiffeq_ends_a_training_at_its_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    config = run.config()
    with pytest.raises(UserError, match="the sampler dopri5 needs torchdiffeq"):
        train(replace(config, sample=replace(config.sample, sampler="dopri5")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_stands_in_the_way_is_found_before_drawing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "draw", lambda *args, **kwargs: pytest.fail("sampled first"))
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(UserError, match=r"a.npz is a folder, expected a file or nothing there"):
        drawn(run, tmp_path / "a.npz")
    (tmp_path / "b.npz.parts").write_text("mine")
    with pytest.raises(UserError, match=r"b.npz.parts is a file, expected a folder of parts"):
        drawn(run, tmp_path / "b.npz")
    monkeypatch.setattr("lsep.backends.missing_compiler", lambda device: "a C++ compiler")
    with pytest.raises(UserError, match=r"--compile on cpu needs a C\+\+ compiler"):
        drawn(run, tmp_path / "c.npz", compile=True)


def test_autoguidance_by_a_model_of_another_kind(run: Run, tmp_path: Path) -> None:
    config = run.config()
    changes = {"model": replace(config.model, conditional=False), "train": replace(config.train, steps=1)}
    other = train(replace(config, **changes), tmp_path / "other")
    with pytest.raises(UserError, match="its model is unconditional, expected class-conditional as in"):
        drawn(run, tmp_path / "out", autoguidance=str(other.path))
