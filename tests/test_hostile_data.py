"""Data that costs memory or time for nothing, leads elsewhere, or that no reader would take: one sentence, soon."""

import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from safetensors.torch import save_file
from test_forms import LABELS, ROWS, make_fast_dit, make_lightningdit, npy

from lsep.cli import main
from lsep.data.forms import open_form
from lsep.data.index import index
from lsep.data.loader import open_source
from lsep.data.paired import Images
from lsep.data.pictures import open_pictures
from lsep.data.stage import stage
from lsep.data.store import Store
from lsep.data.writer import build, write_store
from lsep.errors import UserError
from lsep.evaluate.images import open_images
from lsep.run import Run
from lsep.train import train
from lsep.weights.read import read as read_weights

LARGE = 640 << 20
"""Bytes of a file in an archive; as many are what reading it may take."""


def zip_of_zeros(path: Path, name: str, head: bytes, size: int) -> Path:
    """An archive of a file that is `head` and then zeros (spaces in JSON) up to `size` bytes: a thousandth of them."""
    fill = b" " if name.endswith("json") else bytes(1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("00000/img-mean-std-00000001.npy", b"")
        with archive.open(name, "w", force_zip64=True) as file:
            file.write(head)
            block = fill * (1 << 24)
            for left in range(size - len(head), 0, -len(block)):
                file.write(block[:left])
    return path


def bounded(command: list[str], seconds: float = 60) -> str:
    """stderr of `lsep ...`, which must end with code 2 without the memory for a file of LARGE bytes."""
    got = subprocess.run(
        [sys.executable, "-m", "lsep", *command], capture_output=True, text=True, timeout=seconds,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LARGE, LARGE)),
    )  # fmt: skip
    assert got.returncode == 2, got.stderr[-2000:]
    return got.stderr


def test_a_small_archive_of_a_large_file(tmp_path: Path) -> None:
    listing = zip_of_zeros(tmp_path / "a.zip", "dataset.json", b'{"labels": [', LARGE)
    assert listing.stat().st_size < 5 << 20
    error = bounded(["data", "pack", str(listing), str(tmp_path / "out"), "--form", "repa"])
    assert f"a.zip:dataset.json: cannot be read (ValueError: {LARGE} bytes found, expected at most" in error
    header = io.BytesIO()
    shape = (8, 16384, 16384)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    rows = zip_of_zeros(tmp_path / "b.zip", "00000/img-mean-std-00000000.npy", header.getvalue(), LARGE)
    with zipfile.ZipFile(rows, "a") as archive:
        archive.writestr(
            "dataset.json", json.dumps({"labels": [[f"00000/img-mean-std-{i:08d}.npy", 0] for i in (0, 1)]})
        )
    error = bounded(["data", "pack", str(rows), str(tmp_path / "out"), "--form", "edm2"])
    assert f"img-mean-std-00000000.npy: cannot be read (ValueError: {LARGE} bytes found" in error


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


PIPES: dict[str, Callable[[Path], object]] = {
    "shard": lambda f: [pipe(f / "store/shard-00001.safetensors"), Store(f / "store")],
    "manifest": lambda f: [pipe(f / "store/manifest.json"), Store(f / "store")],
    "staged shard": lambda f: [
        pipe(f / "store/shard-00001.safetensors"), stage(str(f / "store"), f / "copy", progress=False)
    ],
    "lightningdit": lambda f: [pipe(f / "set/a.safetensors"), open_form(f / "set", "lightningdit")],
    "latent": lambda f: [make_fast_dit(f / "set"), pipe(f / "set/imagenet256_features/3.npy"),
                         open_form(f / "set").read(0, ROWS)],
    "zip": lambda f: open_form(pipe(f / "set.zip"), "edm2"),
    "listing": lambda f: [npy(f / "set/00000/img-mean-std-0.npy", np.zeros(3)), pipe(f / "set/dataset.json"),
                          open_form(f / "set", "repa")],
    "image": lambda f: open_pictures(pipe(f / "set/a/x.png").parent.parent).data(0),
    "tar": lambda f: open_pictures(pipe(f / "x.tar")),
    "image of evaluation": lambda f: open_images(str(pipe(f / "set/x.png").parent)),
    "image of alignment": lambda f: [
        [pipe(f / f"set/{i}.png") for i in range(43)], Images(str(f / "set"), Store(f / "store")).read(np.array([0]))
    ],
}  # fmt: skip


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a test that waits."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError("waited for")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("where", PIPES)
def test_a_pipe_is_not_waited_for(store: Path, tmp_path: Path, alarm: None, where: str) -> None:
    with pytest.raises(UserError, match="not a regular file|does not exist|no manifest|found and \\d+ expected"):
        PIPES[where](tmp_path)


def test_what_is_written_can_be_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        make_fast_dit(tmp_path / "set")
        index(tmp_path / "set", progress=False)
        write_store(tmp_path / "store", kind="samples", x=np.zeros((3, 1, 2, 2), np.float32), y=np.zeros(3, int),
                    num_classes=1, shard_rows=2)  # fmt: skip
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        main(["data", "info", "digits"])
    finally:
        os.umask(before)
    made = [*(tmp_path / "store").iterdir(), *(tmp_path / "set/lsep-index").iterdir(), tmp_path / "set/manifest.json",
            *(tmp_path / "cache/lsep/digits").iterdir()]  # fmt: skip
    assert len(made) >= 8
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in made} == {p.name: 0o640 for p in made}
    assert stat.S_IMODE((tmp_path / "cache/lsep/digits").stat().st_mode) == 0o750


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "out").mkdir()
    for name in ("manifest.json", "shard-00000.safetensors", "build.json"):
        (tmp_path / "out" / f".{name}.tmp").symlink_to(precious)
    write_store(tmp_path / "out", kind="samples", x=np.zeros((3, 1, 2, 2), np.float32), y=np.zeros(3, int),
                num_classes=1)  # fmt: skip
    assert precious.read_text() == "precious" and Store(tmp_path / "out").manifest.rows == 3


X, Y = np.zeros((3, 2, 4, 4), np.float32), np.zeros(3, np.int64)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"kind": "latents"}, "kind is 'latents', expected moments or samples"),
        ({"y": Y + 10**12, "num_classes": 10**12 + 1}, "num_classes is 1000000000001, expected a count"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"scale": float("nan")}, "scale is nan"), ({"scale": 0}, "scale is 0"),
        ({"shift": float("inf")}, "shift is inf"), ({"x": X[0]}, "x has shape \\(2, 4, 4\\)"),
        ({"kind": "moments", "x": X[:, :1]}, "expected \\(N, 2C, H, W\\)"), ({"y": Y + 0.5}, "y is float64"),
        ({"y": Y[:, None]}, "y is int64 \\(3, 1\\)"), ({"probe_y": Y * 1.0}, "probe_y is float64"),
        ({"flip": X[:, :1]}, "flip is float32 \\(3, 1, 4, 4\\)"), ({"class_names": (1,)}, "class_names is"),
        ({"x": np.zeros((3, 1, 2, 2**16), np.float32)}, "shape is"),
    ],
)  # fmt: skip
def test_what_no_reader_takes_is_not_written(tmp_path: Path, given: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        write_store(tmp_path / "s", **{"kind": "samples", "x": X, "y": Y, "num_classes": 1, **given})
    assert not (tmp_path / "s").exists()


def test_labels_that_no_reader_takes_are_not_packed(tmp_path: Path) -> None:
    make_fast_dit(tmp_path / "set")
    npy(tmp_path / "set/imagenet256_labels/4.npy", np.array([10**12]))
    for read in (lambda: open_form(tmp_path / "set"), lambda: index(tmp_path / "set", progress=False)):
        with pytest.raises(UserError, match="4.npy: label 1000000000000 found, expected below 2147483647"):
            read()


def test_links_in_place_are_refused_where_the_reader_refuses_them(tmp_path: Path) -> None:
    make_fast_dit(tmp_path / "full")
    for kind in ("features", "labels"):
        (tmp_path / f"subset/imagenet256_{kind}").mkdir(parents=True)
        for i in (1, 3):
            name = f"imagenet256_{kind}/{i}.npy"
            (tmp_path / "subset" / name).symlink_to(tmp_path / "full" / name)
    with pytest.raises(UserError, match="1.npy: a symbolic link, expected a file to use it in place: pack it instead"):
        index(tmp_path / "subset", progress=False)
    build(open_form(tmp_path / "subset"), tmp_path / "out", progress=False)
    assert Store(tmp_path / "out").labels.tolist() == [LABELS[1], LABELS[3]]


@pytest.mark.parametrize("integers", [torch.int32, torch.int64, torch.uint8])
def test_half_precision_latents_and_other_integers(tmp_path: Path, integers: torch.dtype) -> None:
    x, flip = make_lightningdit(tmp_path / "set", stats=False)
    for file in (tmp_path / "set").glob("*.safetensors"):
        file.unlink()
    tensors = {"latents": torch.from_numpy(x).bfloat16(), "latents_flip": torch.from_numpy(flip).bfloat16(),
               "labels": torch.from_numpy(LABELS).to(integers)}  # fmt: skip
    save_file(tensors, tmp_path / "set/latents_rank00_shard000.safetensors")
    build(open_form(tmp_path / "set", scale=0.18215), tmp_path / "out", progress=False)
    store = Store(tmp_path / "out")
    assert store.manifest.dtype == "float32" and store.labels.tolist() == LABELS.tolist()
    ids = np.arange(ROWS)
    np.testing.assert_array_equal(store.read(ids, np.zeros(ROWS, bool)).x, tensors["latents"].float())
    np.testing.assert_array_equal(store.read(ids, np.ones(ROWS, bool)).x, tensors["latents_flip"].float())
    with pytest.raises(UserError, match="latents are bfloat16, expected float32 or float16 to use the shards in place"):
        index(tmp_path / "set", scale=0.18215, progress=False)
    tensors = {k: v.float() if k != "labels" else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "set/latents_rank00_shard000.safetensors")
    index(tmp_path / "set", scale=0.18215, progress=False)
    assert Store(tmp_path / "set").labels.tolist() == LABELS.tolist()
    save_file({**tensors, "latents": x_as(x, torch.float64)}, tmp_path / "set/latents_rank00_shard000.safetensors")
    with pytest.raises(UserError, match="latents is float64 .* expected float32, float16 or bfloat16"):
        open_form(tmp_path / "set", scale=1)


def x_as(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x).to(dtype)


@pytest.mark.parametrize(
    "data", [b".", b"0.", b"(.", b"}\n", b"\x80\x04}.", b"PK\x03\x04" + bytes(60), b"", b"\x80\x02K"]
)
def test_garbage_under_the_name_of_weights(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UserError, match="x.pt: "):
        read_weights(tmp_path / "x.pt")


def test_no_flag_is_named_that_was_not_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["info"], ["check"], ["features", "--encoder", "x"]):
        flags = [str(tmp_path / "out"), *command[1:]] if len(command) > 1 else []
        assert main(["data", command[0], str(tmp_path / "nowhere"), *flags]) == 2
        error = capsys.readouterr().err
        assert f"error: {tmp_path}/nowhere: no manifest.json there" in error and "--data.path" not in error


def unlabelled(folder: Path) -> Path:
    """Twelve flat images as a store."""
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(folder / f"images/{i:02d}.png")
    main(["data", "pack", str(folder / "images"), str(folder / "store"), "--size", "8"])
    return folder / "store"


def test_without_labels_a_model_is_unconditional_and_has_no_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny(data__path=str(unlabelled(tmp_path)), train__steps=2), tmp_path / "run")
    config = run.config()
    assert not config.model.conditional and not config.probe.enabled and not run.manifest().labelled
    assert "no labels: the model is unconditional, and the probe is off" in capsys.readouterr().out
    assert main(
        ["sample", str(run.path), "--num", "2", "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "x.npz")]
    ) in (0, None)
    train(tiny(data__path=str(tmp_path / "store"), train__steps=2), tmp_path / "run")  # goes on, or is over


def test_classes_without_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)
    write_store(tmp_path / "store", kind="samples", x=x, y=np.arange(20) % 4 * 2, num_classes=9)
    assert open_source(tiny(data__path=str(tmp_path / "store")).data).manifest.unused == (
        (1, 1), (3, 3), (5, 5), (7, 8)
    )  # fmt: skip
    run = train(tiny(data__path=str(tmp_path / "store"), train__steps=1, probe__enabled=False), tmp_path / "run")
    said = f"5 of 9 classes have no rows in {(tmp_path / 'store').resolve()} (1, 3, 5, 7 to 8)"
    assert said in capsys.readouterr().out
    arguments = ["sample", str(run.path), "--num", "2", "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "x.npz")]
    main(arguments)
    assert f"{said}: the model has not learned them; --classes leaves them out" in capsys.readouterr().err
    main([*arguments, "--classes", "0", "2"])
    assert "not learned" not in capsys.readouterr().err
    main([*arguments, "--classes", "0", "8"])
    assert "1 of 9 classes have no rows" in capsys.readouterr().err
    assert Run(run.path).manifest().unused[3] == (7, 8)


def test_a_picture_that_cannot_be_written(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["data", "info", str(store), "--picture", str(tmp_path / "file/x.png")]) == 2
    assert f"--picture {tmp_path}/file/x.png: cannot be written" in capsys.readouterr().err
