import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pip install diffusers")

from lsep.data import encode as encode_module
from lsep.data.encode import encode, load_vae, pick_device, ranks
from lsep.data.images import center_crop, load_image
from lsep.data.store import Store
from lsep.errors import UserError

SIZE, IMAGES = 64, 14


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen cuts of two photographs, of several sizes and forms, one class for each photograph."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for i in range(IMAGES // 2):
            top, left, side = rng.integers(0, 200), rng.integers(0, 300), 50 + 35 * i
            cut = Image.fromarray(photograph[top : top + side, left : left + side + 20])
            cut.save(folder / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AutoencoderKL that downsamples by 8 to four channels, as the real ones do."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


def run(images: Path, out: Path, vae: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"size": SIZE, "batch_size": 3, "shard_rows": 4, "device": "cpu", **changes}
    encode(images, out, str(vae), **settings)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(images: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoding with flips that nothing interrupted: shards of 4, 4, 4 and 2 rows."""
    return run(images, tmp_path_factory.mktemp("whole"), vae, flips=True)


def direct(images: Path, vae: Path) -> tuple[np.ndarray, np.ndarray]:
    """Moments of the images and of their mirror images, one image at a time, by diffusers' own mean and std."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    variants: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for path in sorted(images.rglob("*.*")):
        pixels = np.asarray(center_crop(load_image(path), SIZE), np.float64) / 255 * 2 - 1
        for found, x in zip(variants, (pixels, pixels[:, :, ::-1]), strict=True):
            with torch.no_grad():
                posterior = model.encode(torch.from_numpy(x.copy())[None].float()).latent_dist
            found.append(torch.cat([posterior.mean, posterior.std], 1))
    return torch.cat(variants[0]).numpy(), torch.cat(variants[1]).numpy()


def test_moments_are_those_of_the_vae(images: Path, vae: Path, whole: Path, tmp_path: Path) -> None:
    plain, mirrored = direct(images, vae)
    assert np.abs(plain - mirrored).max() > 0.05  # the mirror image is another image
    exact = Store(run(images, tmp_path / "fp32", vae, flips=True, dtype="float32"))
    half = Store(whole)
    ids = np.arange(IMAGES)
    for truth, flip in ((plain, False), (mirrored, True)):
        flips = np.full(IMAGES, flip)
        np.testing.assert_allclose(exact.read(ids, flips).x, truth, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(half.read(ids, flips).x, truth, rtol=2**-10, atol=2e-5)
    np.testing.assert_array_equal(half.read(ids).y, [0] * 7 + [1] * 7)


def test_manifest(whole: Path) -> None:
    manifest = Store(whole).manifest
    assert (manifest.kind, manifest.shape, manifest.dtype, manifest.flips) == ("moments", (4, 8, 8), "float16", True)
    assert (manifest.class_names, manifest.num_classes, manifest.rows) == (("china", "flower"), 2, IMAGES)
    assert (manifest.scale, manifest.shift) == (0.3, 0.1)


def test_paths_of_the_images_are_kept(whole: Path) -> None:
    from safetensors.numpy import load_file

    columns = load_file(whole / "shard-00001.safetensors")
    ends = columns["path_ends"].tolist()
    paths = [columns["paths"].tobytes()[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert paths == ["china/4.jpg", "china/5.png", "china/6.jpg", "flower/0.jpg"]


def test_bf16_is_near(images: Path, vae: Path, tmp_path: Path) -> None:
    plain, _ = direct(images, vae)
    store = Store(run(images, tmp_path / "bf16", vae, precision="bf16", dtype="float32"))
    error = np.abs(store.read(np.arange(IMAGES)).x - plain).max() / np.abs(plain).max()
    assert 2**-12 < error < 2**-5  # eight bits of mantissa, and not silently fp32
    assert not store.manifest.flips


RUN = "import sys, json; from lsep.data.encode import encode; encode(*sys.argv[1:4], **json.loads(sys.argv[4]))"
SLOW = "import time, lsep.data.encode as e; r = e.Encoder.read; e.Encoder.read = lambda *a: (time.sleep(1), r(*a))[1];"


def start(images: Path, out: Path, vae: Path, program: str = RUN, **env: str) -> subprocess.Popen[bytes]:
    settings = {"size": SIZE, "batch_size": 3, "shard_rows": 4, "device": "cpu", "flips": True}
    # As many threads as this process: their number decides the order in which convolutions are summed up.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env}
    arguments = [str(images), str(out), str(vae), json.dumps(settings)]
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()


def test_killed_and_started_again_gives_the_same_bytes(images: Path, vae: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(images, out, vae, SLOW + RUN)
    first = out / "shard-00000.safetensors"
    for _ in range(1200):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert first.exists() and not (out / "manifest.json").exists()
    assert not (out / "shard-00003.safetensors").exists()
    kept = first.stat().st_ino, first.stat().st_mtime_ns
    finish(start(images, out, vae))
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == kept  # not encoded again
    assert contents(out) == contents(whole)


def test_two_processes_give_the_same_bytes(images: Path, vae: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [start(images, out, vae, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in range(2)]
    for process in both:
        finish(process)
    assert contents(out) == contents(whole)


def begun(images: Path, out: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that failed after its first shard."""
    read = encode_module.Encoder.read

    def fail(self: encode_module.Encoder, start: int, stop: int) -> Any:
        if start:
            raise KeyboardInterrupt
        return read(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(encode_module.Encoder, "read", fail)
        with pytest.raises(KeyboardInterrupt):
            run(images, out, vae)


def test_two_encodings_are_not_mixed(images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that the manifest's header does not hold: precision, other weights, another image."""
    from diffusers import AutoencoderKL

    out = tmp_path / "out"
    begun(images, out, vae, monkeypatch)
    with pytest.raises(UserError, match="begun with precision 'fp32', now it is 'bf16'"):
        run(images, out, vae, precision="bf16")
    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.quant_conv.bias += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="begun with vae "):
        run(images, out, tmp_path / "other")
    (out / "encode.json").write_text("[]")
    with pytest.raises(UserError, match="encode.json: cannot be read as JSON settings"):
        run(images, out, vae)


def test_an_unreadable_image_is_named(images: Path, vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    data = (images / "china" / "6.jpg").read_bytes()
    (folder / "good.jpg").write_bytes(data)
    (folder / "short.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a/short.jpg: "):
        run(folder.parent, tmp_path / "out", vae)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damaged_images_are_left_out(images: Path, vae: Path, tmp_path: Path, whole: Path) -> None:
    """Also where the run ended over one before; the others' rows do not change."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    good = (folder / "china/4.jpg").read_bytes()
    (folder / "china/4.jpg").write_bytes(good[: len(good) // 2])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="china/4.jpg: cannot be read as an image .* --on-corrupt skip goes on without"):
        run(folder, out, vae, flips=True)
    (folder / "flower/6.jpg").unlink()  # and another one goes
    with pytest.raises(
        UserError, match=r"begun with other images \(14 then and 13 now; without '\"flower/6.jpg\" 1'\)"
    ):
        run(folder, out, vae, flips=True)
    run(folder, out, vae, flips=True, on_corrupt="skip")
    found, all_of_them = Store(out), Store(whole)
    kept = np.array([i for i, path in enumerate(all_of_them.paths()) if path not in ("china/4.jpg", "flower/6.jpg")])
    assert found.paths() == [all_of_them.paths()[i] for i in kept]
    assert (
        found.manifest.class_names == ("china", "flower") and found.labels.tolist() == all_of_them.labels[kept].tolist()
    )
    for variant in (False, True):
        rows = found.read(np.arange(len(kept)), np.full(len(kept), variant)).x
        np.testing.assert_array_equal(rows, all_of_them.read(kept, np.full(len(kept), variant)).x)
    lines = (out / "passed-over.txt").read_text().splitlines()
    assert "china/4.jpg" in lines[0] and "flower/6.jpg: is gone since the encoding was begun" in lines[1]
    assert not (out / "encode-images.txt").exists() and not (out / "build.json").exists()


def test_moments_that_overflow_are_refused(images: Path, vae: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.quant_conv.bias[0] += 1e5  # beyond float16's 65,504
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="china/0.jpg: its moments are not finite in float16, expected --dtype float32"):
        run(images, tmp_path / "out", tmp_path / "vae")
    run(images, tmp_path / "single", tmp_path / "vae", dtype="float32")
    assert Store(tmp_path / "single").read(np.arange(IMAGES)).x[:, 0].min() > 65504


def test_labels_are_those_of_dataset_json(images: Path, vae: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(images).as_posix() for path in images.glob("*/*"))
    shutil.copytree(images, tmp_path / "images")
    listed = {"labels": [[name, i % 3] for i, name in enumerate(names)]}
    (tmp_path / "images/dataset.json").write_text(json.dumps(listed))
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "images")
    for source in ("images", "zipped.zip"):
        store = Store(run(tmp_path / source, tmp_path / f"out-{source}", vae))
        assert store.paths() == names and store.labels.tolist() == [i % 3 for i in range(IMAGES)]


def test_a_vae_that_cannot_be_used(images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="no such folder"):
        load_vae(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"cannot be loaded, .*pip install diffusers"):
        load_vae(str(tmp_path))
    copy = tmp_path / "pipeline" / "vae"
    copy.mkdir(parents=True)
    for path in vae.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert load_vae(str(copy.parent)).config.scaling_factor == 0.3
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    del weights["quant_conv.bias"]
    save_file(weights, copy / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="1 weights are missing or of another shape, such as 'quant_conv.bias'"):
        load_vae(str(copy))
    config = json.loads((vae / "config.json").read_text()) | {"latents_mean": [0, 0, 0, 0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(vae / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="latents_mean"):
        load_vae(str(tmp_path))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        load_vae(str(vae))


def test_settings_out_of_range(images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"size": 60}, "--size is 60, expected a multiple of 8"),
        ({"size": 0}, "--size is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"shard_rows": -1}, "--shard-rows is -1"),
        ({"device": "gpu"}, "--device is 'gpu'"),
        ({"device": "cuda:99"}, "99 was asked for"),
    ):
        with pytest.raises(UserError, match=message):
            run(images, tmp_path / "out", vae, **changes)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is 2"):
        ranks()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK is 'x'"):
        ranks()
    assert pick_device("cpu", 3) == torch.device("cpu")
