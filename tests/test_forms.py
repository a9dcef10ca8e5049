"""The forms users bring: each is recognised, its rows come back through a packed store, and damage is named."""

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lsep.data.forms import EDM2_MEAN, EDM2_STD, open_form, recognise
from lsep.data.images import center_crop, load_image
from lsep.data.pictures import open_pictures
from lsep.data.store import Store
from lsep.data.writer import build
from lsep.errors import UserError

ROWS = 11
FUZZ = 150
LABELS = np.array([3, 0, 6, 1, 1, 2, 5, 4, 0, 6, 3])


def npy(path: Path, x: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x)
    return path


def moments(rows: int = ROWS, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 1.0) -> np.ndarray:
    """Mean and std of 4 channels, `(rows, 8, 4, 4)`, whose means have this mean and deviation by channel."""
    rng = np.random.default_rng(1)
    means = rng.normal(size=(rows, 4, 4, 4))
    means = (means - means.mean((0, 2, 3), keepdims=True)) / means.std((0, 2, 3), keepdims=True)
    means = means * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    return np.concatenate([means, rng.uniform(0.01, 0.5, size=means.shape)], 1).astype(np.float32)


def make_repa(folder: Path, x: np.ndarray, base: str = "vae-sd", name: str = "img-mean-std") -> None:
    labels = []
    for i, row in enumerate(x):
        file = f"{i // 5:05d}/{name}-{i:08d}.npy"
        npy(folder / base / file, row)
        labels.append([file, int(LABELS[i])])
    (folder / base / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))


def archived(folder: Path) -> Path:
    """The folder's files in an uncompressed zip archive beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member in sorted(folder.rglob("*.*")):
            archive.write(member, member.relative_to(folder).as_posix())
    return path


def make_lightningdit(folder: Path, stats: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    x, flip = rng.normal(1, 3, size=(2, ROWS, 32, 2, 2)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for k, cut in enumerate((slice(0, 4), slice(4, ROWS))):
        shard = {"latents": x[cut], "latents_flip": flip[cut], "labels": LABELS[cut]}
        save_file(shard, folder / f"latents_rank00_shard{k:03d}.safetensors")
    if stats:
        values = {
            "mean": torch.linspace(-1, 1, 32).view(1, 32, 1, 1),
            "std": torch.linspace(1, 2, 32).view(1, 32, 1, 1),
        }
        torch.save(values, folder / "latents_stats.pt")
    return x, flip


def make_fast_dit(folder: Path) -> np.ndarray:
    x = np.random.default_rng(3).normal(size=(ROWS, 1, 4, 4, 4)).astype(np.float32)
    for i in range(ROWS):
        npy(folder / f"imagenet256_features/{i}.npy", x[i])
        npy(folder / f"imagenet256_labels/{i}.npy", LABELS[i : i + 1])
    return x[:, 0]


def make_images(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(4)
    for name, sizes in {"cat": [(40, 30), (9, 20)], "ant": [(16, 16)], "bee": [(64, 100), (33, 32)]}.items():
        (folder / name).mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            image = Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8))
            image.save(folder / name / f"{i}.{'png' if i else 'jpg'}")


def packed(source_path: Path | str, out: Path, form: str | None = None, **options: float | int | None) -> Store:
    build(open_form(source_path, form, **options), out, shard_rows=4, progress=False)  # type: ignore[arg-type]
    return Store(out)


def test_repa(tmp_path: Path) -> None:
    x = moments(mean=0.5, std=4.0)
    make_repa(tmp_path / "set", x)
    assert recognise(tmp_path / "set") == recognise(tmp_path / "set/vae-sd") == "repa"
    for path in (tmp_path / "set", tmp_path / "set/vae-sd"):
        store = packed(path, tmp_path / f"out-{path.name}")
        m = store.manifest
        assert (m.kind, m.shape, m.dtype, m.scale, m.shift, m.num_classes) == (
            "moments", (4, 4, 4), "float32", 0.18215, 0.0, 7,
        )  # fmt: skip
        rows = store.read(np.arange(ROWS))
        np.testing.assert_array_equal(rows.x, x)
        np.testing.assert_array_equal(rows.y, LABELS)
    given = open_form(tmp_path / "set", scale=0.2, num_classes=1000).header
    assert (given.scale, given.num_classes) == (0.2, 1000)


def test_repa_with_a_leading_one(tmp_path: Path) -> None:
    make_repa(tmp_path, moments()[:, None])
    np.testing.assert_array_equal(packed(tmp_path, tmp_path / "out").read(np.arange(ROWS)).x, moments())


def test_blocks_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    make_repa(tmp_path, moments())
    source = open_form(tmp_path)
    whole = source.read(0, ROWS)
    np.testing.assert_array_equal(np.concatenate([source.read(0, 3).x, source.read(3, ROWS).x]), whole.x)
    np.testing.assert_array_equal(source.read(5, 6).y, whole.y[5:6])


@pytest.mark.parametrize("archive", [False, True])
def test_edm2_is_told_apart_and_normalised(tmp_path: Path, archive: bool) -> None:
    x = moments(mean=EDM2_MEAN, std=EDM2_STD)
    make_repa(tmp_path / "set", x, base="")
    path = archived(tmp_path / "set") if archive else tmp_path / "set"
    assert recognise(path) == "edm2"
    store = packed(path, tmp_path / "out")
    assert (store.manifest.kind, store.manifest.scale, store.manifest.shift) == ("moments", 1.0, 0.0)
    rows = store.read(np.arange(ROWS))
    np.testing.assert_array_equal(rows.y, LABELS)
    truth = x.astype(np.float64)
    for c, (mean, std) in enumerate([(5.81, 4.17), (3.25, 4.62), (0.12, 3.71), (-2.15, 3.28)]):
        np.testing.assert_allclose(rows.x[:, c], (truth[:, c] - mean) / std * 0.5, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows.x[:, 4 + c], truth[:, 4 + c] / std * 0.5, rtol=1e-5)
    np.testing.assert_allclose(rows.x[:, :4].mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(rows.x[:, :4].std((0, 2, 3)), 0.5, rtol=1e-4)


def test_between_repa_and_edm2_it_asks(tmp_path: Path) -> None:
    x = moments(mean=EDM2_MEAN / 2)
    make_repa(tmp_path, x)
    with pytest.raises(UserError, match="say --form edm2 or --form repa"):
        recognise(tmp_path)
    np.testing.assert_array_equal(open_form(tmp_path, "repa").read(0, ROWS).x, x)
    assert open_form(tmp_path, "edm2").header.scale == 1.0


def test_statistics_are_of_the_whole_set(tmp_path: Path) -> None:
    """The first rows are of one class in many sets, and a damaged row must not decide."""
    x = moments(mean=EDM2_MEAN)
    x[0] = np.nan
    x[1, :4] = 0
    make_repa(tmp_path, x)
    assert recognise(tmp_path) == "edm2"


def test_lightningdit(tmp_path: Path) -> None:
    x, flip = make_lightningdit(tmp_path / "set")
    assert recognise(tmp_path / "set") == "lightningdit"
    store = packed(tmp_path / "set", tmp_path / "out", scale=1.5)
    m = store.manifest
    assert (m.kind, m.shape, m.scale, m.num_classes, m.flips) == ("samples", (32, 2, 2), 1.5, 7, True)
    mean, std = np.linspace(-1, 1, 32)[:, None, None], np.linspace(1, 2, 32)[:, None, None]
    ids = np.arange(ROWS)
    for flips, truth in ((np.zeros(ROWS, bool), x), (np.ones(ROWS, bool), flip)):
        rows = store.read(ids, flips)
        np.testing.assert_allclose(rows.x, (truth - mean) / std, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows.y, LABELS)
    assert open_form(tmp_path / "set").header.scale == 1.0


def test_lightningdit_without_statistics(tmp_path: Path) -> None:
    x, _ = make_lightningdit(tmp_path / "set", stats=False)
    with pytest.raises(UserError, match="no latents_stats.pt found, expected it or --scale"):
        open_form(tmp_path / "set")
    store = packed(tmp_path / "set", tmp_path / "out", scale=0.18215)
    np.testing.assert_array_equal(store.read(np.arange(ROWS)).x, x)
    assert store.manifest.scale == 0.18215


def test_fast_dit_sorts_as_strings(tmp_path: Path) -> None:
    x = make_fast_dit(tmp_path / "set")
    assert recognise(tmp_path / "set") == "fast-dit"
    store = packed(tmp_path / "set", tmp_path / "out")
    assert (store.manifest.kind, store.manifest.shape, store.manifest.scale) == ("samples", (4, 4, 4), 1.0)
    order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    rows = store.read(np.arange(ROWS))
    np.testing.assert_array_equal(rows.x, x[order])
    np.testing.assert_array_equal(rows.y, LABELS[order])


def test_speedrundit(tmp_path: Path) -> None:
    x = np.random.default_rng(5).normal(size=(ROWS, 1, 32, 2, 2)).astype(np.float32)
    make_repa(tmp_path / "set", x, base="vae-in", name="img-latents")
    assert recognise(tmp_path / "set") == recognise(tmp_path / "set/vae-in") == "speedrundit"
    store = packed(tmp_path / "set", tmp_path / "out")
    assert (store.manifest.kind, store.manifest.shape, store.manifest.scale) == ("samples", (32, 2, 2), 0.3099)
    np.testing.assert_array_equal(store.read(np.arange(ROWS)).x, x[:, 0])
    np.testing.assert_array_equal(store.read(np.arange(ROWS)).y, LABELS)


def test_imagefolder(tmp_path: Path) -> None:
    make_images(tmp_path / "set")
    assert recognise(tmp_path / "set") == "imagefolder"
    store = packed(tmp_path / "set", tmp_path / "out", size=16)
    m = store.manifest
    assert (m.kind, m.shape, m.dtype, m.class_names) == ("pixels", (3, 16, 16), "uint8", ("ant", "bee", "cat"))
    pictures = open_pictures(tmp_path / "set")
    labels, names = pictures.listed.labels, pictures.listed.class_names
    paths = [tmp_path / "set" / name for name in pictures.names]
    assert labels.tolist() == [0, 1, 1, 2, 2]
    assert [names[y] for y in labels] == [p.parent.name for p in paths]
    rows = store.read(np.arange(5))
    np.testing.assert_array_equal(rows.y, labels)
    for x, path in zip(rows.x, paths, strict=True):
        np.testing.assert_array_equal(x, center_crop(load_image(path), 16))
    with pytest.raises(UserError, match="needs --size"):
        open_form(tmp_path / "set")


def test_center_crop_keeps_the_middle() -> None:
    from PIL import Image

    x = np.random.default_rng(0).integers(256, size=(20, 31, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(x), 20), x[:, 5:25].transpose(2, 0, 1))
    # 80 x 124 is halved twice by the mean of 2 x 2 pixels, then needs no other filter.
    large = x.repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(center_crop(Image.fromarray(large), 20), x[:, 5:25].transpose(2, 0, 1))
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[::2] = 200
    assert np.unique(center_crop(Image.fromarray(halves), 16)).tolist() == [100]


def test_digits(tmp_path: Path) -> None:
    from lsep.data.digits import Digits

    assert recognise("digits") == "digits"
    source = open_form("digits")
    assert (source.rows, source.header.kind, source.header.num_classes) == (1797, "pixels", 10)
    truth = Digits().read(100, 120)
    block = source.read(100, 120)
    np.testing.assert_array_equal(block.x, truth.x)
    np.testing.assert_array_equal(block.y, truth.y)


def edit_labels(folder: Path, change: Callable[[list], object]) -> None:
    file = folder / "vae-sd/dataset.json"
    file.write_text(json.dumps({"labels": change(json.loads(file.read_text())["labels"])}))


FIRST, FIFTH = "vae-sd/00000/img-mean-std-00000000.npy", "vae-sd/00001/img-mean-std-00000005.npy"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda f: (f / "vae-sd/dataset.json").write_text("{"), "dataset.json: expected {'labels'"),
    "no labels file": (lambda f: (f / "vae-sd/dataset.json").unlink(), "dataset.json: does not exist"),
    "one label short": (lambda f: edit_labels(f, lambda v: v[1:]), "dataset.json: no label for '00002"),
    "one file short": (lambda f: (f / FIFTH).unlink(), "11 labels found, expected 10.*00000005"),
    "label twice": (lambda f: edit_labels(f, lambda v: [*v, v[0]]), "12 labels found, expected 11"),
    "label of text": (lambda f: edit_labels(f, lambda v: [*v[1:], [v[0][0], "cat"]]), "label cat for"),
    "label negative": (lambda f: edit_labels(f, lambda v: [*v[1:], [v[0][0], -1]]), "00000010.npy: label -1 found"),
    "shape of the first": (lambda f: npy(f / FIRST, np.zeros((4, 4, 4), np.float32)), "00.npy: float32 \\(4, 4, 4\\)"),
    "shape": (lambda f: npy(f / FIFTH, np.zeros((8, 4, 5), np.float32)), "05.npy: float32 \\(8, 4, 5\\) found"),
    "dtype": (lambda f: npy(f / FIFTH, np.zeros((8, 4, 4))), "05.npy: float64 \\(8, 4, 4\\) found"),
    "dtype of the first": (lambda f: npy(f / FIRST, np.zeros((8, 4, 4))), "00.npy: float64 found, expected float32"),
    "truncated": (lambda f: (f / FIFTH).write_bytes((f / FIFTH).read_bytes()[:-9]), "05.npy: 631 bytes found"),
    "empty": (lambda f: (f / FIFTH).write_bytes(b""), "05.npy: 0 bytes without a whole .npy header"),
    "broken header": (
        lambda f: (f / FIFTH).write_bytes((f / FIFTH).read_bytes().replace(b"'descr'", b"'desrc'")),
        "05.npy: its .npy header cannot be read",
    ),
    "header cut open": (
        lambda f: (f / FIFTH).write_bytes((f / FIFTH).read_bytes().replace(b")", b"(", 1)),
        "05.npy: its .npy header cannot be read",
    ),
    "negative shape": (
        lambda f: (f / FIFTH).write_bytes((f / FIFTH).read_bytes().replace(b"(8, 4, 4), }  ", b"(8, -4, -4), }")),
        "05.npy: shape \\(8, -4, -4\\) found",
    ),
    "objects": (lambda f: np.save(f / FIFTH, np.array([{}], object)), "05.npy: "),
    "log-variance": (
        lambda f: [npy(p, np.load(p) - 20) for p in f.rglob("*.npy")], "look like log-variances"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_repa_is_named(tmp_path: Path, how: str) -> None:
    make_repa(tmp_path, moments())
    damage, message = DAMAGE[how]
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_form(tmp_path, "repa").read(0, ROWS)


def test_labels_beyond_the_number_of_classes(tmp_path: Path) -> None:
    make_repa(tmp_path, moments())
    with pytest.raises(UserError, match="00000002.npy: label 6 found, expected from 0 to 5 by the number of classes"):
        open_form(tmp_path, num_classes=6)


def test_images_and_latents_of_repa_must_pair(tmp_path: Path) -> None:
    make_repa(tmp_path, moments())
    images = [tmp_path / f"images/{i // 5:05d}/img{i:08d}.png" for i in range(ROWS)]
    for image in images:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    labels = [[p.relative_to(tmp_path / "images").as_posix(), int(y)] for p, y in zip(images, LABELS, strict=True)]
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": labels}))
    assert open_form(tmp_path).rows == ROWS
    labels[3][1] = 5
    (tmp_path / "images/dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match="label 5 for 'images/00000/img00000003.png', expected 1"):
        open_form(tmp_path)
    images[3].rename(images[3].with_name("img00000033.png"))
    with pytest.raises(UserError, match=r"img00000004.png: found where '.*00000003.npy' needs its image"):
        open_form(tmp_path)
    images[4].unlink()
    with pytest.raises(UserError, match="images: 10 images found, expected 11"):
        open_form(tmp_path)


def test_damage_to_lightningdit_is_named(tmp_path: Path) -> None:
    make_lightningdit(tmp_path)
    second = tmp_path / "latents_rank00_shard001.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="shard001.safetensors: truncated"):
        open_form(tmp_path)
    x = np.zeros((3, 32, 2, 2), np.float32)
    for shard, message in (
        ({"latents": x, "labels": LABELS[:3]}, "no 'latents_flip' tensor"),
        ({"latents": x, "latents_flip": x[:2], "labels": LABELS[:3]}, "latents_flip is float32"),
        ({"latents": x, "latents_flip": x, "labels": LABELS[:2]}, "labels is int64 \\(2,\\), expected int64 \\(3,\\)"),
        ({"latents": x[:, :4], "latents_flip": x[:, :4], "labels": LABELS[:3]}, "expected float32 \\(N, 32, 2, 2\\)"),
        ({"latents": x, "latents_flip": x, "labels": LABELS[:3] - 1}, "shard001.safetensors: row 1: label -1"),
    ):
        save_file({k: np.ascontiguousarray(v) for k, v in shard.items()}, second)
        with pytest.raises(UserError, match=message):
            open_form(tmp_path)
    second.write_bytes(whole)
    source = open_form(tmp_path)
    second.write_bytes(whole[:3000])  # cut while it is in use: an error, not a crash
    with pytest.raises(UserError, match="shard001.safetensors: truncated"):
        source.read(0, ROWS)


@pytest.mark.parametrize(
    "stats",
    [
        {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)},
        {"mean": torch.zeros(1, 32, 1, 1), "std": torch.zeros(1, 32, 1, 1)},
        {"mean": torch.zeros(1, 32, 1, 1)},
        {"mean": Path("/"), "std": 1},
        b"no torch file",
    ],
)
def test_damage_to_the_statistics_is_named(tmp_path: Path, stats: object) -> None:
    make_lightningdit(tmp_path)
    if isinstance(stats, bytes):
        (tmp_path / "latents_stats.pt").write_bytes(stats)
    else:
        torch.save(stats, tmp_path / "latents_stats.pt")
    with pytest.raises(UserError, match="latents_stats.pt: .*expected"):
        open_form(tmp_path)


def test_damage_to_fast_dit_is_named(tmp_path: Path) -> None:
    make_fast_dit(tmp_path)
    npy(tmp_path / "imagenet256_labels/4.npy", np.array([1, 2]))
    with pytest.raises(UserError, match="imagenet256_labels/4.npy: int64 \\(2,\\) found"):
        open_form(tmp_path)
    (tmp_path / "imagenet256_labels/4.npy").unlink()
    with pytest.raises(UserError, match="11 files in .* and 10 in .*'4.npy' is in one only"):
        open_form(tmp_path)


def test_damage_to_images_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "set")
    (tmp_path / "set/bee/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bee/1.png: cannot be read as an image"):
        open_form(tmp_path / "set", size=16).read(0, 5)
    with pytest.raises(UserError, match="set: no images right inside"):
        open_form(tmp_path, "imagefolder", size=16)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, lengthened, or with a few wrong bytes, most of them in the header."""
    how, changed = rng.randrange(4), bytearray(data)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        return data + rng.randbytes(8)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(min(len(data), 150) if how == 2 else len(data))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("form", ["repa", "edm2", "fast-dit", "lightningdit", "imagefolder"])
@pytest.mark.filterwarnings("ignore")
def test_random_damage_ends_in_our_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / "set"
    if form in ("repa", "edm2"):
        make_repa(path, moments())
    elif form == "fast-dit":
        make_fast_dit(path)
    elif form == "lightningdit":
        make_lightningdit(path)
    else:
        make_images(path)
    if form == "edm2":
        path = archived(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    rng, refused = random.Random(form), 0
    acts: list[Callable[[Path], object]] = [
        recognise,
        lambda p: open_form(p, form, size=16 if form == "imagefolder" else None).read(0, 5),
    ]
    for _ in range(FUZZ):
        file = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(mutate(whole, rng))
        for act in acts:
            try:
                act(path)
            except UserError:
                refused += 1
        file.write_bytes(whole)
    assert refused > FUZZ / 10


def test_what_is_not_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of no known form, expected --form with one of repa, edm2"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="nowhere: does not exist"):
        recognise(tmp_path / "nowhere")
    (tmp_path / "file.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="file.zip: expected a folder or a zip archive"):
        recognise(tmp_path / "file.zip")
    with pytest.raises(UserError, match="--form 'repra' is not known; did you mean 'repa'"):
        open_form(tmp_path, "repra")
    with pytest.raises(UserError, match="--size 16 with form 'repa'"):
        open_form(tmp_path, "repa", size=16)
    with pytest.raises(UserError, match="--num-classes 0, expected at least 1"):
        open_form("digits", num_classes=0)
    with pytest.raises(UserError, match="--scale 2.0 with form 'edm2'"):
        open_form(tmp_path, "edm2", scale=2.0)
