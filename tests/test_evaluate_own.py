"""`lsep evaluate` on what `lsep sample` and a training wrote, and on images of another size than the reference's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lsep import cli, sample
from lsep.config import Config, override
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.evaluate.features import Extractor, Features, Identity
from lsep.evaluate.images import open_images
from lsep.evaluate.measure import evaluate
from lsep.evaluate.reference import compute, open_reference, save
from lsep.presets import PRESETS
from lsep.run import Run
from lsep.train import train


def images(n: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on pixels with two grids of its training and samples of two guidance scales."""
    small: dict[str, Any] = {"train.steps": 4, "train.sample_every": 2, "train.overhead_rounds": 0, "sample.num": 8}
    config: Config = override(PRESETS["quickstart"], small | {"train.batch_size": 20, "sample.steps": 1})
    run = train(config, tmp_path_factory.mktemp("own") / "run")
    for out in ("one", "two"):
        scales = ["1"] if out == "one" else ["1", "2"]
        assert cli.main(["sample", str(run.path), "--num", "40", "--cfg", *scales, "--out", str(run.path / out)]) == 0
    assert cli.main(["sample", str(run.path), "--num", "30", "--out", str(run.path / "file" / "mine.npz")]) == 0
    return run


def test_a_folder_of_samples_is_its_samples(run: Run) -> None:
    for folder, count in (("one", 40), ("two/cfg-2", 40), ("file", 30)):
        found = open_images(str(run.path / folder))
        assert (found.count, found.shape) == (count, (8, 8, 1)) and found.source.endswith(".npz")
    with pytest.raises(
        UserError, match=r"two: 2 sets of samples \(cfg-1/samples.npz, cfg-2/samples.npz\), expected one"
    ):
        open_images(str(run.path / "two"))


def test_a_runs_folder_of_samples_is_the_runs(run: Run, tmp_path: Path) -> None:
    """Its PNGs are grids of the training: of one folder above, or copied elsewhere, they are no samples."""
    assert sorted(p.name for p in run.samples.glob("*.png")) == ["step-0000002.png", "step-0000004.png"]
    with pytest.raises(UserError, match="samples: no .npz below it, expected one: draw samples with lsep sample"):
        open_images(str(run.samples))
    shutil.copytree(run.samples, tmp_path / "copy")
    with pytest.raises(UserError, match="copy: no images below it, but 2 grids of samples, expected some"):
        open_images(str(tmp_path / "copy"))
    for i, image in enumerate(images(3)):
        Image.fromarray(image).save(tmp_path / "copy" / f"{i}.png")
    found = open_images(str(tmp_path / "copy"))
    assert found.count == 3 and found.notes == (f"{tmp_path / 'copy'}: 2 grids of samples left out",)
    Image.fromarray(images(1)[0]).save(tmp_path / "copy" / "grid.png")  # a name alone makes no grid
    assert open_images(str(tmp_path / "copy")).count == 4


def test_images_beside_samples_are_not_chosen_between(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path / "one", tmp_path / "both")
    Image.fromarray(images(1)[0]).save(tmp_path / "both" / "real.png")
    with pytest.raises(UserError, match=r"both: 1 images and 1 files of samples \(samples.npz\), expected one or the"):
        open_images(str(tmp_path / "both"))
    (tmp_path / "both" / "samples.npz").write_bytes(b"damaged")
    (tmp_path / "both" / "real.png").unlink()
    with pytest.raises(UserError, match="samples.npz: cannot be read"):
        open_images(str(tmp_path / "both"))
    (tmp_path / "begun" / "samples.npz.parts").mkdir(parents=True)
    with pytest.raises(UserError, match="samples.npz.parts: a sampling that is not finished"):
        open_images(str(tmp_path / "begun"))
    np.savez(tmp_path / "begun" / "statistics.npz", mu=np.zeros(3))  # no samples: images beside it are images
    Image.fromarray(images(1)[0]).save(tmp_path / "begun" / "real.png")
    assert open_images(str(tmp_path / "begun")).count == 1


def test_a_grid_of_any_kind_is_marked(tmp_path: Path) -> None:
    sample.save_grid(images(4), tmp_path / "grid-of-mine.png")
    manifest = Manifest("test", "samples", (3, 8, 8), rows=1, num_classes=1, probe_classes=1)
    sample.save_grid(sample.to_images(torch.zeros(2, 3, 8, 8), manifest), tmp_path / "grid.png")
    with pytest.raises(UserError, match="no images below it, but 2 grids"):
        open_images(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def resized(batch: np.ndarray) -> Features:
    """Features of images of any size, as Inception's."""
    x = torch.from_numpy(batch).float().mean(3)
    return Features(torch.nn.functional.adaptive_avg_pool2d(x[:, None], 2).flatten(1))


EXTRACTOR = Extractor(Identity("resized", None, None), "fp32", torch.device("cpu"), resized)
SAID = (
    "the samples are of 8 x 8 x 3 (H x W x C), the reference of 16 x 16 x 3: they differ before any feature is computed"
)


@pytest.mark.parametrize("kind", ["images", "statistics", "older"])
def test_a_reference_of_another_size_is_said(kind: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images(30))
    np.savez(tmp_path / "real.npz", images(30, 16))
    reference = tmp_path / "real.npz"
    if kind != "images":
        save(compute(open_images(str(reference)), EXTRACTOR, 16), EXTRACTOR, reference)
        if kind == "older":
            arrays = dict(np.load(reference))
            about = json.loads(str(arrays["lsep"]))
            del about["shape"]
            np.savez(reference, **arrays | {"lsep": np.array(json.dumps(about))})
    result = evaluate(open_images(str(tmp_path / "mine.npz")), str(reference), EXTRACTOR, ["fid"])
    assert (SAID in result["warnings"]) == (kind != "older")
    assert (result["shape"], result["shape_of_reference"]) == ([8, 8, 3], None if kind == "older" else [16, 16, 3])
    same = evaluate(open_images(str(tmp_path / "mine.npz")), str(tmp_path / "mine.npz"), EXTRACTOR, ["fid"])
    assert not same["warnings"]


def test_adms_images_say_their_size_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    statistics: dict[str, Any] = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=images(3, 16), **statistics)
    inception = Extractor(Identity("inception", None, None), "fp32", torch.device("cpu"), resized)
    assert open_reference(str(tmp_path / "VIRTUAL.npz"), inception, 8, features=False).shape == (16, 16, 3)
    np.savez(tmp_path / "real.npz", images(30))
    save(compute(open_images(str(tmp_path / "real.npz")), EXTRACTOR, 16), EXTRACTOR, tmp_path / "r.npz")
    arrays = dict(np.load(tmp_path / "r.npz"))
    about = json.loads(str(arrays["lsep"])) | {"shape": [8, "x"]}
    np.savez(tmp_path / "r.npz", **arrays | {"lsep": np.array(json.dumps(about))})
    with pytest.raises(UserError, match=r"lsep: shape is \[8, 'x'\], expected three counts"):
        open_reference(str(tmp_path / "r.npz"), EXTRACTOR, 8)
