"""Lists of images: whose labels count, in which order, what is passed over, and what ends in a sentence."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsep.cli import main
from lsep.data.forms import open_form, recognise
from lsep.data.images import open_image
from lsep.data.pictures import open_pictures
from lsep.data.store import Store
from lsep.errors import UserError
from lsep.evaluate.images import open_images


def picture(number: int, kind: str = "PNG") -> bytes:
    """A 20 x 16 image whose colour says its number."""
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 255 - number, 7 * number % 256)).save(file, kind)
    return file.getvalue()


def put(folder: Path, *names: str) -> Path:
    """Images at these paths, numbered in this order."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, "GIF" if name.endswith(".gif") else "PNG"))
    return folder


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for member in sorted(folder.rglob("*")):
            archive.write(member, prefix + member.relative_to(folder).as_posix())
    return path


def listing(folder: Path, labels: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def edm2(folder: Path) -> tuple[Path, list[int]]:
    """Seven images as EDM2's and REPA's tools leave them, and their labels in the order of the names."""
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(7)]
    labels = [(3 * i) % 5 for i in range(7)]
    put(folder, *names)
    listing(folder, [[n, y] for n, y in zip(names, labels, strict=True)][::-1])
    return folder, labels


def pack(source: Path, out: Path, *flags: str) -> Store:
    if main(["data", "pack", str(source), str(out), "--size", "16", *flags]):
        raise UserError("packing failed")
    return Store(out)


def colours(store: Store) -> list[int]:
    return store.read(np.arange(store.manifest.rows)).x[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("prefix", [None, "", "images/"])
def test_dataset_json_says_the_labels(tmp_path: Path, prefix: str | None) -> None:
    folder, labels = edm2(tmp_path / "images")
    source = folder if prefix is None else zipped(folder, prefix)
    assert recognise(source) == "imagefolder"
    store = pack(source, tmp_path / "out")
    assert store.labels.tolist() == labels and store.manifest.num_classes == 5
    assert colours(store) == list(range(7))
    assert store.paths()[4] == "00001/img00000004.png"


def test_dataset_json_must_fit_its_images(tmp_path: Path) -> None:
    folder, _ = edm2(tmp_path / "images")
    with pytest.raises(UserError, match="dataset.json says the labels, expected auto"):
        open_pictures(folder, "folders")
    (folder / "00000/img00000001.png").unlink()
    with pytest.raises(UserError, match="7 labels found, expected 6"):
        open_pictures(folder)
    put(folder, "00000/img00000001.png", "00009/new.png")
    with pytest.raises(UserError, match="no label for '00009/new.png'"):
        open_pictures(folder)
    (tmp_path / "vae-sd").mkdir()
    with pytest.raises(UserError, match="images/dataset.json, expected the folder with it: .*/images"):
        open_pictures(tmp_path)
    (folder / "dataset.json").unlink()
    (folder / "00009/new.png").unlink()
    with pytest.raises(UserError, match="numbered folders as EDM2's and REPA's, which are no classes"):
        open_pictures(folder)
    assert not open_pictures(folder, "none").listed.labelled
    assert open_pictures(folder, "none").names[0] == "00000/img00000000.png"


@pytest.mark.parametrize("zip_it", [False, True])
def test_folders_of_classes_as_torchvision_lists_them(
    tmp_path: Path, zip_it: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        "b/x.PNG", "b/more/z.png", "b/a.pgm", "10/y.png", "9/deep/er/y.png", "b/w.gif", "b/v.gif", "b/._x.png",
        "__MACOSX/b/x.png", ".ipynb_checkpoints/x.png", "loose.png",
    ]  # fmt: skip
    folder = put(tmp_path / "set", *names)
    (folder / "b/readme.txt").write_text("x")
    (folder / "b/LICENSE").write_text("x")
    store = pack(zipped(folder) if zip_it else folder, tmp_path / "out")
    assert store.manifest.class_names == ("10", "9", "b")
    found = list(zip(store.paths(), store.labels.tolist(), colours(store), strict=True))
    assert found == [
        ("10/y.png", 0, 3), ("9/deep/er/y.png", 1, 4), ("b/a.pgm", 2, 2), ("b/x.PNG", 2, 0), ("b/more/z.png", 2, 1)
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "5 images; passed over: 1 beside the folders of classes, 3 hidden, 2 of type .gif, 1 of type .txt" in said
    assert "1 without a suffix" in said
    main(["data", "info", str(tmp_path / "out")])
    assert "  0 10: 1\n  1 9: 1\n  2 b: 3" in capsys.readouterr().out


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    put(tmp_path / "full", "n0/a.png", "n1/a.png", "n2/a.png")
    subset = tmp_path / "subset"
    (subset / "n2").mkdir(parents=True)
    (subset / "n1").symlink_to("../full/n1")
    (subset / "n2/b.png").symlink_to("../../full/n2/a.png")
    (subset / "n2/loop").symlink_to("..")
    assert open_pictures(subset).names == ["n1/a.png", "n2/b.png"]


def test_folders_that_can_hardly_be_classes(tmp_path: Path) -> None:
    put(tmp_path / "set", "train/n0/a.png", "val/n0/a.png")
    with pytest.raises(UserError, match="its folders are train, val, expected one folder for each class"):
        open_pictures(tmp_path / "set")
    assert open_pictures(tmp_path / "set", "folders").listed.class_names == ("train", "val")
    put(tmp_path / "high", "photos/n0/a.png", "photos/n1/a.png")
    with pytest.raises(UserError, match="high/photos: no images right inside the only folder"):
        open_pictures(tmp_path / "high")
    assert open_pictures(zipped(tmp_path / "high")).names == ["n0/a.png", "n1/a.png"]
    (put(tmp_path / "empty", "n0/a.png") / "n1").mkdir()
    with pytest.raises(UserError, match="empty/n1: no images inside this folder of a class"):
        open_pictures(tmp_path / "empty")
    (tmp_path / "nothing/a").mkdir(parents=True)
    (tmp_path / "nothing/a/x.gif").write_bytes(picture(1, "GIF"))
    with pytest.raises(UserError, match="nothing: no images inside, expected some .*; found 1 of type .gif"):
        open_pictures(tmp_path / "nothing")


def test_names_say_the_class_as_in_adm(tmp_path: Path) -> None:
    put(tmp_path / "set", "dog_1.png", "cat_0_b.png", "dog_0.png")
    for source in (tmp_path / "set", zipped(tmp_path / "set")):
        found = open_pictures(source, "names")
        assert found.names == ["cat_0_b.png", "dog_0.png", "dog_1.png"]
        assert (found.listed.labels.tolist(), found.listed.class_names) == ([0, 1, 1], ("cat", "dog"))
    put(tmp_path / "set", "x.png")
    with pytest.raises(UserError, match="--labels names: .*x.png, expected names as CLASS_more.png"):
        open_pictures(tmp_path / "set", "names")


def test_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = put(tmp_path / "flat", "b.png", "a.png")
    null, _ = edm2(tmp_path / "null")
    listing(null, None)
    for number, (source, rows) in enumerate([(flat, 2), (zipped(flat), 2), (null, 7), (zipped(null), 7)]):
        store = pack(source, tmp_path / f"out{number}")
        assert (store.manifest.labelled, store.manifest.num_classes, store.manifest.rows) == (False, 1, rows)
        assert "no labels, so a model of it is unconditional and has no probe" in capsys.readouterr().err
    assert colours(Store(tmp_path / "out0")) == [1, 0]
    main(["data", "info", str(tmp_path / "out0")])
    assert "no labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="--num-classes 3: .* has no labels"):
        open_form(flat, size=16, num_classes=3)


def webdataset(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [(f"a/{i:03d}", {"cls": str(i % 3).encode(), "png": picture(i)}) for i in range(3)]
    second = [
        (f"a/{i:03d}", {"png": picture(i), "json": json.dumps({"label": i % 3}).encode(), "txt": b""}) for i in (3, 4)
    ]
    webdataset(tmp_path / "set/x-000.tar", first)
    webdataset(tmp_path / "set/x-001.tar", second)
    store = pack(tmp_path / "set", tmp_path / "out")
    assert colours(store) == [0, 1, 2, 3, 4] and store.labels.tolist() == [0, 1, 2, 0, 1]
    assert store.paths()[3] == "x-001.tar/a/003.png"
    assert "passed over: 2 of type .txt" in capsys.readouterr().err
    assert pack(tmp_path / "set/x-000.tar", tmp_path / "one").manifest.rows == 3
    assert not pack(tmp_path / "set", tmp_path / "none", "--labels", "none").manifest.labelled
    named = webdataset(tmp_path / "n.tar", [("0", {"jpg": picture(0), "cls": b"dog\n"}),
                                            ("1", {"jpg": picture(1), "cls": b"cat"})])  # fmt: skip
    assert open_pictures(named).listed.class_names == ("cat", "dog")
    assert not open_pictures(webdataset(tmp_path / "u.tar", [("0", {"png": picture(0)})])).listed.labelled


def test_damage_to_webdataset_is_named(tmp_path: Path) -> None:
    whole = webdataset(tmp_path / "a.tar", [(str(i), {"png": picture(i), "cls": b"0"}) for i in range(9)])
    data = whole.read_bytes()
    whole.write_bytes(data[:5000])
    with pytest.raises(UserError, match="a.tar: expected an uncompressed tar, whole|a.tar:.*truncated"):
        open_pictures(whole)
    whole.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="a.tar: expected an uncompressed tar"):
        open_pictures(whole)
    with pytest.raises(UserError, match="a.tar:1.png: no .cls or .json with its label"):
        open_pictures(webdataset(whole, [("0", {"png": picture(0), "cls": b"0"}), ("1", {"png": picture(0)})]))
    with pytest.raises(UserError, match="a second image"):
        open_pictures(webdataset(whole, [("0", {"png": picture(0)}), ("0", {"jpg": picture(0)})]))
    with pytest.raises(UserError, match="0.json: cannot be read as a label"):
        open_pictures(webdataset(whole, [("0", {"png": picture(0), "json": b"{"})]))
    with pytest.raises(UserError, match="label 1000000000000 found, expected below"):
        open_pictures(webdataset(whole, [("0", {"png": picture(0), "cls": b"1000000000000"})]))
    with pytest.raises(UserError, match="--labels folders: .* holds labels of its own"):
        open_pictures(whole, "folders")


def parquet(path: Path, first: int, labels: list[int], column: str = "image", names: bool = True) -> Path:
    arrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(first + i), "path": None} for i in range(len(labels))]
    table = arrow.table({"id": arrow.array(range(len(labels))), column: images, "label": arrow.array(labels)})
    if names:
        features = {column: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    written.write_table(table, path, row_group_size=2)
    return path


def test_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "set/data/train-00000-of-00002.parquet", 0, [2, 0, 1, 2, 0])
    parquet(tmp_path / "set/data/train-00001-of-00002.parquet", 5, [1, 0])
    store = pack(tmp_path / "set", tmp_path / "out")
    assert colours(store) == list(range(7)) and store.labels.tolist() == [2, 0, 1, 2, 0, 1, 0]
    assert store.manifest.class_names == ("ant", "bee", "cat")
    assert store.paths()[5] == "train-00001-of-00002.parquet/0"
    one = open_pictures(parquet(tmp_path / "one.parquet", 0, [3, 0], "photo", names=False))
    assert one.listed.labels.tolist() == [3, 0] and one.listed.num_classes == 4 and one.listed.class_names == ()
    assert not open_pictures(parquet(tmp_path / "test.parquet", 0, [-1, -1])).listed.labelled
    with pytest.raises(UserError, match="row 1, column 'label': label 3 found, expected from 0 to 2"):
        open_pictures(parquet(tmp_path / "far.parquet", 0, [0, 3]))
    parquet(tmp_path / "set/data/test-00000-of-00001.parquet", 0, [0])
    with pytest.raises(UserError, match="files of 2 splits"):
        open_pictures(tmp_path / "set")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(UserError, match="bad.parquet: cannot be read as parquet"):
        open_pictures(tmp_path / "bad.parquet")


def test_a_damaged_image_ends_it_or_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "set", *(f"{'ab'[i // 4]}/{i}.png" for i in range(8)))
    (folder / "a/2.png").write_bytes(b"")
    (folder / "b/4.png").write_bytes(b"<html>")
    (folder / "b/5.png").write_bytes(picture(5)[:50])
    assert main(["data", "pack", str(folder), str(tmp_path / "out"), "--size", "16", "--shard-rows", "2"]) == 2
    error = capsys.readouterr().err
    assert "a/2.png: cannot be read as an image (it is empty); --on-corrupt skip goes on without it" in error
    store = pack(folder, tmp_path / "out", "--shard-rows", "2", "--on-corrupt", "skip")  # goes on where it ended
    assert colours(store) == [0, 1, 3, 6, 7] and store.labels.tolist() == [0, 0, 0, 1, 1]
    assert [e.rows for e in store.entries] == [2, 1, 2]  # and of the third shard nothing is left
    assert "3 images could not be read and are left out" in capsys.readouterr().err
    lines = (tmp_path / "out/passed-over.txt").read_text().splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines] == ["2.png", "4.png", "5.png"]
    assert main(["data", "check", str(tmp_path / "out")]) in (0, None)
    put(tmp_path / "gone", "a/0.png")
    (tmp_path / "gone/a/0.png").write_bytes(b"")
    with pytest.raises(UserError):
        pack(tmp_path / "gone", tmp_path / "none", "--on-corrupt", "skip")
    assert "none of 1 images could be read, expected at least one" in capsys.readouterr().err


def test_another_list_of_images_does_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "set", "a/0.png", "a/1.png", "b/2.png")
    (folder / "b/2.png").write_bytes(b"")
    arguments = ["data", "pack", str(folder), str(tmp_path / "out"), "--size", "16", "--shard-rows", "1"]
    assert main(arguments) == 2
    (folder / "a/1.png").rename(folder / "a/9.png")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "unfinished build of something else (images: " in capsys.readouterr().err
    (folder / "a/9.png").rename(folder / "a/1.png")
    assert main([*arguments[:-4], "--size", "8", "--shard-rows", "1"]) == 2
    assert "(shape: [3, 16, 16] -> [3, 8, 8]; size: 16 -> 8)" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "top"), [("PNG", 65535), ("TIFF", 65535), ("PGM", 65535), ("TIFF", 255)])
def test_grey_of_eight_and_sixteen_bits(kind: str, top: int) -> None:
    values = np.linspace(0, top, 64).round().astype(np.uint16 if top > 255 else np.uint8).reshape(8, 8)
    file = io.BytesIO()
    if kind == "PGM":  # of 16 bits, which Pillow reads and does not write
        file.write(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(file, kind)
    found = np.asarray(open_image("x", file.getvalue()))[..., 0].reshape(-1).astype(int)
    assert np.abs(found - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize(("dtype", "what"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_numbers_without_black_and_white_are_refused(dtype: Any, what: str, tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=f"x.tif: holds {what}, .* expected 8 or 16 bits a channel"):
        open_image(tmp_path / "x.tif", tmp_path / "x.tif")
    with pytest.raises(UserError, match=what):  # and in evaluation
        open_images(str(tmp_path))
