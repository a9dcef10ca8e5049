"""`lsep evaluate` on files: what it measures end to end, and one sentence for each that is not what it should be."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import scipy_fid

from lsep import cli
from lsep.data.store import Store
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.evaluate import reference as reference_room
from lsep.evaluate.archives import Archive
from lsep.evaluate.features import Extractor, Features, Identity, open_extractor
from lsep.evaluate.images import open_images
from lsep.evaluate.measure import evaluate
from lsep.evaluate.reference import compute, open_reference, save

CPU = torch.device("cpu")
CODE = """
from typing import NamedTuple
import numpy as np
import torch

class Found(NamedTuple):
    features: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor

def pixels(images):
    return images.reshape(len(images), -1)[:, :12].astype(np.float32) / 255

def all_kinds(images, device):
    x = torch.from_numpy(images).to(device).float().flatten(1) / 255
    return Found(x[:, :12], x[:, 12:20], 5 * x[:, 20:24])

def mapping(images):
    return {"features": torch.from_numpy(images).flatten(1)[:, :12], "logits": None}

def weighted(images, weights):
    return pixels(images) * float(open(weights).read())

def latent(x):
    assert x.dtype == np.float32 and x.shape[1] == 3
    return torch.from_numpy(x).flatten(1)[:, :10]

latent.latents = True

def flat(images): return np.zeros(len(images))
def text(images): return "features"
def strange(images): return {"features": np.zeros((len(images), 2)), "more": 1}
def infinite(images): return np.full((len(images), 2), np.inf)
def varying(images): return np.zeros((len(images), len(images)))
number = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def opened(code: Path) -> Callable[[str], Extractor]:
    return lambda name: open_extractor(f"{code}:{name}", None, "fp32", CPU)


def random_images(n: int, seed: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (n, 4, 5, 3), np.uint8)


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["evaluate", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---------------------------------------------------------------------------------------------------------------------
# End to end


def test_samples_against_every_kind_of_reference(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An .npz, a store, a folder and the statistics of one of them give the same figures, which are scipy's."""
    real, drawn = random_images(90, 0), random_images(70, 1, top=200)
    np.savez(tmp_path / "samples.npz", drawn)
    np.savez_compressed(tmp_path / "real.npz", real)
    write_store(
        tmp_path / "store", kind="pixels", x=real.transpose(0, 3, 1, 2), y=np.zeros(90, np.int64), num_classes=1,
        scale=1.0, shard_rows=32,
    )  # fmt: skip
    for i, image in enumerate(real):
        (tmp_path / "folder" / f"class-{i // 50}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / f"class-{i // 50}" / f"{i:03}.png")
    (tmp_path / "folder" / "class-0" / "notes.txt").write_text("not an image")
    features = ("--features", f"{code}:all_kinds", "--batch-size", "16")
    made = call(capsys, "reference", tmp_path / "store", "--out", tmp_path / "made.npz", *features)
    assert made[:2] == (0, f"{tmp_path / 'made.npz'}\n")
    results = []
    for reference in ("real.npz", "store", "folder", "made.npz"):
        status, out, err = call(
            capsys, tmp_path / "samples.npz", "--reference", tmp_path / reference, *features, "--bootstrap", 30,
            "--json", tmp_path / "result.json",
        )  # fmt: skip
        assert (status, err) == (0, "")
        results.append(json.loads((tmp_path / "result.json").read_text()))
        assert f"{results[-1]['metrics']['fd']['value']:.6f}" in out and "70 images" in out
    first = results[0]
    for other in results[1:]:
        for metric, values in first["metrics"].items():
            assert other["metrics"][metric]["value"] == pytest.approx(values["value"], rel=1e-9), metric
    x, y = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in (drawn, real))
    metrics = first["metrics"]
    assert list(metrics) == ["fd", "sfd", "is", "precision", "recall", "kid"]
    assert metrics["fd"]["value"] == pytest.approx(scipy_fid(x[:, :12], y[:, :12]), rel=1e-9)
    assert metrics["sfd"]["value"] == pytest.approx(scipy_fid(x[:, 12:20], y[:, 12:20]), rel=1e-9)
    assert metrics["fd"]["floor"] == pytest.approx(scipy_fid(y[::2, :12], y[1::2, :12]), rel=1e-9)
    low, high = metrics["fd"]["interval_95"]
    assert low < metrics["fd"]["value"] < high and metrics["fd"]["resamples"] == 30
    assert metrics["kid"]["subset_size"] == 70 and metrics["is"]["chunks"] == 1
    stated = ("num_samples", "num_reference", "num_reference_features", "precision_of_features", "weights_sha256")
    assert [first[k] for k in stated] == [70, 90, 90, "fp32", None]
    assert first["extractor"] == "mine.py:all_kinds" and len(first["source_sha256"]) == 64
    assert first["warnings"] == ["kid: subsets of 70, where 1000 is the custom"]


def test_fewer_samples_than_features_are_warned_of(opened: Callable[[str], Extractor], tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", random_images(11, 2))
    np.savez(tmp_path / "real.npz", random_images(30, 3))
    result = evaluate(open_images(str(tmp_path / "few.npz")), str(tmp_path / "real.npz"), opened("pixels"), ["fid"])
    assert result["warnings"] == [
        "fd: 11 samples for 12 features: the covariance has no full rank, and the distance is far above that of many "
        "samples"
    ]


def test_metrics_that_the_features_do_not_allow(opened: Callable[[str], Extractor], tmp_path: Path) -> None:
    file = str(tmp_path / "a.npz")
    np.savez(file, random_images(30, 4))
    found = evaluate(open_images(file), file, opened("pixels"))
    assert list(found["metrics"]) == ["fd", "precision", "recall", "kid"]
    with pytest.raises(UserError, match="--metrics holds 'sfid', but the extractor gives no spatial features"):
        evaluate(open_images(file), file, opened("pixels"), ["fid", "sfid"])
    with pytest.raises(UserError, match="--metrics holds 'is', but the extractor gives no logits"):
        evaluate(open_images(file), file, opened("mapping"), ["is"])


def test_a_run_is_its_newest_samples(tmp_path: Path) -> None:
    samples = tmp_path / "run" / "samples"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="samples: no .npz below it, expected one: draw samples with lsep sample"):
        open_images(str(tmp_path / "run"))
    for name in ("step-0000002-ode", "step-0000010-ode"):
        (samples / name).mkdir(parents=True)
        np.savez(samples / name / "samples.npz", random_images(5, 5))
    assert open_images(str(tmp_path / "run")).source.endswith("step-0000010-ode/samples.npz")
    (samples / "step-0000010-sde").mkdir()
    np.savez(samples / "step-0000010-sde" / "samples.npz", random_images(5, 6))
    with pytest.raises(UserError, match="2 sets of samples of its latest step .*, expected one: name it"):
        open_images(str(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# References


def test_statistics_of_another_extractor_are_refused(
    code: Path, opened: Callable[[str], Extractor], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", random_images(30, 7))
    save(compute(open_images(str(tmp_path / "a.npz")), opened("pixels"), 8), opened("pixels"), tmp_path / "r.npz")
    path = str(tmp_path / "r.npz")
    assert open_reference(path, opened("pixels"), 8).count == 30
    with pytest.raises(UserError, match="of two extractors .name 'mine.py:pixels' and 'mine.py:mapping'"):
        open_reference(path, opened("mapping"), 8)
    code.write_text(CODE + "\n# another version\n")
    with pytest.raises(UserError, match=r"of two extractors .source_sha256 '[0-9a-f]{64}' and '[0-9a-f]{64}'"):
        open_reference(path, opened("pixels"), 8)


def test_kept_features_are_a_fixed_draw(opened: Callable[[str], Extractor], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", random_images(40, 8))
    images, extractor = open_images(str(tmp_path / "a.npz")), opened("pixels")
    few, again = (compute(images, extractor, size, keep=13).features for size in (7, 40))
    every = compute(images, extractor, 40).features
    assert few is not None and again is not None and every is not None
    assert few.shape == (13, 12) and torch.equal(few, again)
    assert len({tuple(row.tolist()) for row in few} & {tuple(row.tolist()) for row in every}) == 13


def adm(path: Path, **changes: Any) -> Path:
    """A file like ADM's, with statistics that are not those of its images."""
    arrays: dict[str, Any] = {
        "arr_0": random_images(20, 9),
        "mu": np.full(48, 0.5), "sigma": np.eye(48), "mu_s": np.zeros(40, np.float32), "sigma_s": np.eye(40),
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    """A stand-in by that name, with fewer features: a root at 2048 takes seconds."""
    monkeypatch.setattr(reference_room, "_INCEPTION", {"mu": 48, "mu_s": 40})

    def call(images: np.ndarray) -> Features:
        x = torch.from_numpy(images).flatten(1).double()
        return Features(x[:, :48], x[:, :40], x[:, :30])

    return Extractor(Identity("inception", None, "0" * 64), "fp32", CPU, call)


def test_adms_statistics_are_inceptions(
    opened: Callable[[str], Extractor], inception: Extractor, tmp_path: Path
) -> None:
    path = str(adm(tmp_path / "VIRTUAL_test.npz"))
    found = open_reference(path, inception, 8)
    assert found.spatial is not None and found.features is not None
    assert float(found.pool.mean[0]) == 0.5 and found.spatial.width == 40 and found.features.shape == (20, 48)
    assert found.count is None
    # Another extractor sees the images; without images the file says nothing to it.
    assert open_reference(path, opened("pixels"), 8).pool.width == 12
    path = str(adm(tmp_path / "no-images.npz", arr_0=None))
    with pytest.raises(UserError, match="name no extractor, so Inception's, expected ones of mine.py:pixels"):
        open_reference(path, opened("pixels"), 8)
    drawn = open_images(str(adm(tmp_path / "VIRTUAL_test.npz")))
    result = evaluate(drawn, path, inception, ["fid", "sfid"])
    assert list(result["metrics"]) == ["fid", "sfid"] and result["num_reference"] is None
    with pytest.raises(
        UserError, match="--metrics holds 'kid', but the reference .* holds neither images nor features"
    ):
        evaluate(drawn, path, inception, ["kid"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, r"no array 'sigma' \(arr_0, mu, mu_s, sigma_s found\), expected a covariance \(48, 48\)"),
        ({"sigma": np.eye(3)}, r"sigma is \(3, 3\), expected a covariance \(48, 48\) of floats"),
        ({"mu": np.zeros(64)}, r"mu is \(64,\), expected \(48,\) of Inception"),
        ({"mu": np.zeros((2, 3))}, r"mu is \(2, 3\), expected \(48,\) of Inception"),
        ({"mu": np.zeros(48, int)}, r"mu is int64 \(48,\), expected a mean \(D,\) of floats"),
        ({"mu": np.full(48, np.nan)}, "mu holds values that are not finite, expected finite ones"),
        (
            {"mu": None, "arr_0": None},
            r"no array 'mu' \(mu_s, sigma, sigma_s found\), expected mu and sigma, or images",
        ),
    ],
)
def test_statistics_that_are_wrong(inception: Extractor, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_reference(str(adm(tmp_path / "s.npz", **changes)), inception, 8)
    assert "\n" not in str(caught.value) and "s.npz" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not what they should be


def npz_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", data)
    return file.getvalue()


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def huge() -> bytes:
    """A header that promises 3 TB of images, and a few bytes of them."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    )
    return file.getvalue() + b"123"


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (sys.exit, ("unpickled",))


IMAGES = random_images(3, 10)
EXPECTED = r"expected uint8 images \(N, H, W, 1 or 3\) or float32 latents \(N, C, H, W\)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read \(BadZipFile: .*\), expected a whole .npz file"),
        (pickle.dumps(Evil()), r"cannot be read \(BadZipFile: .*\), expected a whole .npz file"),
        (npy_of(IMAGES), r"cannot be read \(BadZipFile: .*\), expected a whole .npz file"),
        (npz_of(npy_of(IMAGES))[:-40], "cannot be read"),
        (npz_of(b"text"), "arr_0: 4 bytes without a whole .npy header, expected an array saved by numpy"),
        (npz_of(npy_of(np.array([Evil()], dtype=object))), "arr_0: holds pickled Python objects, expected numbers"),
        (npz_of(npy_of(IMAGES)[:-7]), "arr_0: 301 bytes found, expected 308 by its .npy header"),
        (npz_of(huge()), "arr_0: 131 bytes found, expected 3000000000128 by its .npy header"),
        (npz_of(npy_of(IMAGES.astype(np.int64))), rf"arr_0 is int64 \(3, 4, 5, 3\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES.astype(np.uint16))), rf"arr_0 is uint16 \(3, 4, 5, 3\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES.astype(np.float64))), rf"arr_0 is float64 \(3, 4, 5, 3\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES.transpose(0, 3, 1, 2).copy())), rf"arr_0 is uint8 \(3, 3, 4, 5\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES[0])), rf"arr_0 is uint8 \(4, 5, 3\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES[:0])), rf"arr_0 is uint8 \(0, 4, 5, 3\), {EXPECTED}"),
        (npz_of(npy_of(IMAGES.astype(np.float32))), "holds latents, expected images for this extractor: decode them"),
    ],
)
def test_samples_that_are_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_images(str(path))
    assert "\n" not in str(caught.value) and "samples.npz" in str(caught.value)


def test_missing_keys_and_damage_that_the_header_hides(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, images=IMAGES)
    with pytest.raises(UserError, match=rf"samples.npz: no array 'arr_0' \(images found\), {EXPECTED}"):
        open_images(str(path))
    np.savez(path, IMAGES)
    data = bytearray(path.read_bytes())
    data[data.index(IMAGES.tobytes()[:40]) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"samples.npz: cannot be read \(BadZipFile: Bad CRC-32"):
        list(open_images(str(path)).batches(2))
    np.savez(path, np.asfortranarray(IMAGES))
    with pytest.raises(UserError, match="arr_0 is in Fortran order, expected C order"):
        list(open_images(str(path)).batches(2))
    with pytest.raises(UserError, match="nothing.npz: not there, expected an .npz file, a folder"):
        open_images(str(tmp_path / "nothing.npz"))


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(UserError, match="images: no images below it, expected some"):
        open_images(str(folder))
    for i, size in enumerate([(5, 4), (5, 4), (6, 4)]):
        Image.new("RGB", size).save(folder / f"{i}.png")
    with pytest.raises(UserError, match="2.png: 6 x 4 pixels, expected 5 x 4 as 0.png"):
        list(open_images(str(folder)).batches(2))
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="2.png: cannot be read as an image"):
        list(open_images(str(folder)).batches(2))


def test_own_files_that_are_wrong(opened: Callable[[str], Extractor], tmp_path: Path) -> None:
    extractor, path = opened("pixels"), tmp_path / "r.npz"
    np.savez(tmp_path / "a.npz", random_images(30, 11))
    save(compute(open_images(str(tmp_path / "a.npz")), extractor, 8), extractor, path)
    archive = Archive(path)
    whole = {name: archive.read(name) for name in archive.headers}
    about = json.loads(str(whole["lsep"]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lsep": np.array("{")}, r"lsep: cannot be read as JSON \(JSONDecodeError"),
        ({"lsep": np.array("[" * 100_000)}, "lsep: cannot be read as JSON"),
        ({"lsep": np.array("3")}, "lsep is 3, expected format 'lsep-reference' of version 1"),
        ({"lsep": np.zeros(3)}, r"lsep is float64 \(3,\), expected a string"),
        ({"lsep": np.array(json.dumps(about | {"count": "many"}))}, "lsep: count is 'many', expected int"),
        ({"features": np.zeros((4, 3))}, r"features is of width 3, expected floats \(N, 12\) as mu"),
        ({"sigma": np.zeros((12, 11))}, r"sigma is \(12, 11\), expected a covariance \(12, 12\)"),
    ]
    for changes, message in cases:
        np.savez(path, **(whole | changes))
        with pytest.raises(UserError, match=message) as caught:
            open_reference(str(path), extractor, 8)
        assert "\n" not in str(caught.value) and "r.npz" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Extractors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", r"features has shape \(5,\) for 5 images, expected \(5, D\)"),
        ("text", "features is of type str, expected a tensor or an array of numbers"),
        ("strange", r"returned \['features', 'more'\], expected 'features' and, where it has them, 'spatial'"),
        ("infinite", "features holds values that are not finite"),
    ],
)
def test_extractors_that_break_the_contract(opened: Callable[[str], Extractor], name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"--features mine.py:{name}: {message}"):
        opened(name)(random_images(5, 12))


def test_features_of_always_the_same_width(opened: Callable[[str], Extractor], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", random_images(7, 13))
    with pytest.raises(UserError, match="3 features of an image, and 4 of one before, expected always as many"):
        compute(open_images(str(tmp_path / "a.npz")), opened("varying"), 4)
    np.savez(tmp_path / "a.npz", random_images(1, 13))
    with pytest.raises(UserError, match="a.npz: 1 image found, expected at least 2"):
        compute(open_images(str(tmp_path / "a.npz")), opened("pixels"), 4)


def test_extractors_that_cannot_be_had(code: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    cases = {
        "nonsense": "--features is 'nonsense', expected inception, MODULE:FUNCTION or FILE.py:FUNCTION",
        f"{tmp_path}/no.py:f": "no.py does not exist, expected a Python file",
        f"{broken}:f": r"broken.py cannot be imported \(ModuleNotFoundError: No module named 'nothing_of_this_name'\)",
        "nothing_of_this_name:f": "--features: nothing_of_this_name cannot be imported",
        f"{code}:missing": "mine.py has no function 'missing'",
        f"{code}:number": "mine.py has no function 'number'",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_extractor(name, None, "fp32", CPU)


def test_weights_reach_the_function_and_its_identity(code: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.txt"
    weights.write_text("2")
    images = random_images(5, 14)
    plain = open_extractor(f"{code}:pixels", None, "fp32", CPU)
    heavy = open_extractor(f"{code}:weighted", weights, "fp64", CPU)
    assert torch.equal(heavy(images).features, 2 * plain(images).features.double())
    before = heavy.identity
    weights.write_text("3")
    assert "weights_sha256" in str(before.differs(open_extractor(f"{code}:weighted", weights, "fp32", CPU).identity))
    with pytest.raises(UserError, match="w.txt: the function 'pixels' has no parameter `weights`"):
        open_extractor(f"{code}:pixels", weights, "fp32", CPU)
    with pytest.raises(UserError, match="gone: cannot be read"):
        open_extractor(f"{code}:weighted", tmp_path / "gone", "fp32", CPU)


def test_latents_go_to_extractors_of_latents_only(
    opened: Callable[[str], Extractor], store: Path, tmp_path: Path
) -> None:
    """A store of moments gives samples of its posteriors, always the same, as samples files hold them."""
    with pytest.raises(UserError, match="store: holds latents, expected images for this extractor: decode them"):
        open_images(str(store))
    images = open_images(str(store), latents=True)
    x = np.concatenate(list(images.batches(10)))
    assert x.shape == (43, 3, 8, 8) and np.array_equal(x, np.concatenate(list(images.batches(43))))
    rows = Store(store).read(np.arange(43)).x
    standard = (x - rows[:, :3]) / rows[:, 3:]
    assert abs(standard.mean()) < 4 / np.sqrt(x.size) and abs(standard.std() - 1) < 4 / np.sqrt(2 * x.size)
    np.savez(tmp_path / "latents.npz", x)
    drawn = open_images(str(tmp_path / "latents.npz"), latents=True)
    assert evaluate(drawn, str(store), opened("latent"), ["fid"])["metrics"]["fd"]["value"] == pytest.approx(
        0, abs=1e-9
    )
    np.savez(tmp_path / "images.npz", IMAGES)
    with pytest.raises(UserError, match="images.npz: holds images, expected latents for this extractor"):
        open_images(str(tmp_path / "images.npz"), latents=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected SAMPLES first, then flags"),
        (["a.npz"], "--reference is missing, expected a value"),
        (["a.npz", "--reference", "a.npz", "--metrics", "fdi"], "invalid choice 'fdi' for argument '--metrics'"),
        (["a.npz", "--reference", "a.npz", "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["a.npz", "--reference", "a.npz", "--bootstrap", "-1"], "--bootstrap is -1, expected at least 0"),
        (["a.npz", "--reference", "a.npz", "--json", "no/r.json"], "--json no/r.json: cannot be written, expected"),
        (["reference", "a.npz", "--out", "r.txt"], "--out r.txt, expected a file ending in .npz"),
        (["reference", "a.npz", "--out", "no/r.npz"], "--out no/r.npz: cannot be written, expected"),
        (["reference", "a.npz", "--out", "r.npz", "--keep", "0"], "--keep is 0, expected at least 1"),
        (["reference"], "expected SOURCE first, then flags"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *args)
    assert status == 2
    assert err.startswith("lsep: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A real extractor


CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "cifar10.py"


@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not beside the project")
def test_a_real_extractor(tmp_path: Path) -> None:
    """FD-R128 of 300 images of CIFAR-10's test set: as its own code has it, small for real images, large for noise."""
    extractor = open_extractor(f"{CIFAR}:features", None, "fp32", CPU)
    z = np.load(CIFAR.with_name("test.npz"))
    header, scans, ends = z["header"].tobytes(), z["data"].tobytes(), np.cumsum(z["lengths"][:600].astype(np.int64))
    starts = [0, *ends[:-1]]
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(header + scans[a:b] + b"\xff\xd9")))
            for a, b in zip(starts, ends, strict=True)
        ]
    )
    np.savez(tmp_path / "real.npz", images[:300])
    np.savez(tmp_path / "others.npz", images[300:])
    noise = np.random.default_rng(0).normal(0, 40, images[300:].shape)
    np.savez(tmp_path / "noisy.npz", (images[300:] + noise).clip(0, 255).astype(np.uint8))
    reference = tmp_path / "reference.npz"
    save(compute(open_images(str(tmp_path / "real.npz")), extractor, 200), extractor, reference)
    values = {
        name: evaluate(open_images(str(tmp_path / f"{name}.npz")), str(reference), extractor, batch_size=200)["metrics"]
        for name in ("others", "noisy")
    }
    sys.path.insert(0, str(CIFAR.parent))
    try:
        from cifar10 import features, frechet_distance
    finally:
        sys.path.remove(str(CIFAR.parent))
    truth = frechet_distance(features(images[300:]), features(images[:300]))
    assert values["others"]["fd"]["value"] == pytest.approx(truth, rel=1e-4)
    assert values["noisy"]["fd"]["value"] > 3 * truth
    assert values["noisy"]["precision"]["value"] < values["others"]["precision"]["value"]
