"""What belongs to rows: an encoder's stored tokens, or the images behind latents, damaged ones too."""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    LABELS,
    ROWS,
    WIDTH,
    aligned,
    batches,
    relative_error,
    tokens_of,
)
from PIL import Image

from lsep.cli import main
from lsep.data.features import Tokens
from lsep.data.images import center_crop, open_image
from lsep.data.manifest import CorruptRow
from lsep.data.paired import Images
from lsep.data.store import Store
from lsep.data.writer import Block, Header, build, write_store
from lsep.encoder import Encoder
from lsep.errors import UserError
from lsep.step import open_loader, setup

pytest.importorskip("transformers", reason='pip install -e ".[align]"')


def test_the_command_writes_every_image_and_its_mirror_image(
    features: Path, dino: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(features)
    assert store.manifest.shape == (WIDTH, 4, 4) and len(store.shards) == 3
    assert main(["data", "check", str(features)]) == 0 and main(["data", "info", str(features)]) == 0
    assert store.manifest.encoder == Encoder(str(dino), 4, torch.device("cpu")).origin
    told = capsys.readouterr().out
    assert f"encoder: {dino} at 56 pixels, sha256 {store.manifest.encoder.sha256[:16]}" in told
    assert "tokens over 30 rows: lengths" in told and "channel" not in told and "scale" not in told
    for mirrored, x in ((False, pixels), (True, np.ascontiguousarray(pixels[..., ::-1]))):
        rows = store.read(np.arange(ROWS), np.full(ROWS, mirrored)).x
        assert relative_error(torch.from_numpy(rows).flatten(2).transpose(1, 2), tokens_of(dino, x)) < 1e-5
    assert store.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_features_go_with_their_rows(
    latents: Path, features: Path, dino: Path, pixels: np.ndarray, loader: str, accumulate: int
) -> None:
    """Every loader, over epochs in which other rows are mirrored."""
    config = aligned(latents, align__features=str(features), data__loader=loader, optim__accumulate=accumulate)
    _check_tokens(batches(config), dino, pixels, Store(latents))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_images_are_encoded_on_the_fly(
    latents: Path, images: Path, dino: Path, pixels: np.ndarray, loader: str
) -> None:
    """Decoded by DALI; its cosine with the tokens of the images themselves is that of the same images."""
    config = aligned(latents, align__encoder=str(dino), align__images=str(images), data__loader=loader)
    _check_tokens(batches(config), dino, pixels, Store(latents))


def test_images_are_brought_to_the_size_asked_for(latents: Path, images: Path, dino: Path, pixels: np.ndarray) -> None:
    given = {"align__encoder": str(dino), "align__images": str(images), "train__batch_size": ROWS}
    ((batch,),) = batches(aligned(latents, **given, align__image_size=32), 1)
    store = Store(latents)
    mirrored = [
        not torch.equal(x, torch.from_numpy(store.read(np.array([i]), np.array([False])).x[0]))
        for x, i in zip(batch.x, batch.id.tolist(), strict=True)
    ]
    seen = np.stack(
        [pixels[i][..., ::-1] if m else pixels[i] for m, i in zip(mirrored, batch.id.tolist(), strict=True)]
    )
    small = np.stack([center_crop(Image.fromarray(x.transpose(1, 2, 0)), 32) for x in seen])
    errors = [relative_error(batch.tokens, tokens_of(dino, x)) for x in (small, np.ascontiguousarray(seen))]
    assert errors[0] < 0.3 * errors[1], errors


def _check_tokens(steps: list[Any], dino: Path, pixels: np.ndarray, store: Store) -> None:
    truth = [tokens_of(dino, x) for x in (pixels, np.ascontiguousarray(pixels[..., ::-1]))]
    seen = set()
    for batch in (b for step in steps for b in step):
        for x, sample, tokens in zip(batch.x, batch.id.tolist(), batch.tokens, strict=True):
            mirrored = not torch.equal(x, torch.from_numpy(store.read(np.array([sample]), np.array([False])).x[0]))
            assert relative_error(tokens, truth[mirrored][sample]) < 1e-5
            seen.add(mirrored)
    assert seen == {False, True}


@pytest.mark.parametrize("shape", [(375, 500), (640, 480), (256, 341), (600, 600)])
def test_decoded_images_are_those_the_latents_have(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG, not square, with an orientation in its EXIF: place, direction and filter of `center_crop`, by DALI itself.

    Noise tells filters apart: nearest pixels are 8 levels and more from it, no antialiasing 3.5, the bicubic one 2.
    """
    pytest.importorskip("nvidia.dali")
    from lsep.data.dali import Decoder

    height, width = shape
    rows, columns = np.mgrid[:height, :width] / 20.0
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + 2 * columns)], -1) * 80 + 128
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    waves += np.random.default_rng(0).normal(size=(height, width, 1)) * 15
    Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95, exif=exif)
    decoder = Decoder(1, 200, 1, torch.device("cpu"))
    monkeypatch.delattr(Decoder, "_one_by_one")
    got = decoder([file.getvalue()], None, lambda place: Path())[0].numpy().astype(int)
    cut = center_crop(open_image(Path("x"), file.getvalue()), 200).astype(int)
    apart = [np.abs(got - np.roll(cut, by, axis)).mean() for by, axis in ((0, 1), (1, 1), (-1, 1), (1, 2), (-1, 2))]
    assert apart[0] == min(apart) and apart[0] < 2.5, apart
    assert decoder.pipe.exec_dynamic, "a GPU's stream orders the output of no other executor"


def _touch(folder: Path, paths: list[str]) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def _store(folder: Path, labels: list[int], paths: list[str] | None = None) -> Store:
    x = np.zeros((len(labels), 1, 2, 2), np.float32)
    header = Header("samples", (1, 2, 2), "float32", 10)
    build(_Rows(header, len(labels), Block(x, np.array(labels), paths=paths)), folder, progress=False)
    return Store(folder)


@dataclass
class _Rows:
    header: Header
    rows: int
    block: Block

    def read(self, start: int, stop: int) -> Block:
        return self.block


def test_images_are_those_of_the_rows_in_their_order(tmp_path: Path) -> None:
    """Of the store's own paths, of a dataset.json, or of folders by name; through links, without what is hidden."""
    own = ["b/2.png", "a/1.png"]
    assert Images(str(tmp_path), _store(tmp_path / "own", [0, 1], own)).paths == own
    for name, path in (("above", "../c.png"), ("absolute", "/c.png")):
        with pytest.raises(UserError, match=f"path '{path}' of .* leaves the folder"):
            Images(str(tmp_path), _store(tmp_path / name, [0, 1], ["b/2.png", path]))
    with pytest.raises(UserError, match=r"path 'c\\x00.png' of .*nul, expected the name of a file"):
        Images(str(tmp_path), _store(tmp_path / "nul", [0, 1], ["b/2.png", "c\0.png"]))

    listed = _touch(tmp_path / "listed", ["00000/b.png", "00000/a.png", "00001/c.png"])
    (listed / "dataset.json").write_text(
        json.dumps({"labels": [["00001/c.png", 4], ["00000/b.png", 7], ["00000/a.png", 2]]})
    )
    found = Images(str(listed), _store(tmp_path / "s1", [2, 7, 4]))
    assert found.paths == ["00000/a.png", "00000/b.png", "00001/c.png"]
    assert found.path(2) == listed / "00001" / "c.png"
    with pytest.raises(UserError, match=r"the label of row 0 is 2 and 3 in .*s2, expected the same images"):
        Images(str(listed), _store(tmp_path / "s2", [3, 7, 4]))

    classes = _touch(
        tmp_path / "classes", ["a-b/1.JPEG", "a/2.png", "a/1.png", "a/.hidden.png", ".old/1.png", "a/x.txt"]
    )
    _touch(tmp_path / "elsewhere", ["9.webp", "10.webp"])
    (classes / "linked").symlink_to(tmp_path / "elsewhere")
    (classes / "a" / "up").symlink_to(classes)
    found = Images(str(classes), _store(tmp_path / "s3", [0, 0, 3, 9, 9]))
    assert found.paths == ["a/1.png", "a/2.png", "a-b/1.JPEG", "linked/10.webp", "linked/9.webp"]
    with pytest.raises(UserError, match=r"the label of row 2 is 3 and 0 in .*s4"):
        Images(str(classes), _store(tmp_path / "s4", [0, 0, 0, 3, 9]))
    with pytest.raises(
        UserError, match=r"3 folders of images, but rows of 2 classes in .*s5, expected one folder a cl"
    ):
        Images(str(classes), _store(tmp_path / "s5", [0, 0, 3, 3, 3]))
    assert len(Images(str(classes), _store(tmp_path / "s9", [3] * 5)).paths) == 5  # rows without classes
    around = _touch(tmp_path / "around", [f"{name}/1.png" for name in "abcd"])
    for name in "abcd":
        for other in "abcd":
            (around / name / f"to-{other}").symlink_to(around / other)
    assert len(Images(str(around), _store(tmp_path / "s8", [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16)).paths) == 64
    one = _touch(tmp_path / "one", ["all/train/1.png", "all/val/1.png", "all/val/2.png"])
    assert len(Images(str(one), _store(tmp_path / "s6", [0, 1, 2])).paths) == 3
    with pytest.raises(UserError, match=r"3 images, expected 2 as .*own has"):
        Images(str(one), _store(tmp_path / "s7" / "own", [0, 1]))


def test_a_build_of_tokens_goes_on_with_the_same_images_and_encoder(
    latents: Path, images: Path, dino: Path, tmp_path: Path, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after a shard it ends with the same bytes; with other images, paths or weights it is refused."""
    out, copy = tmp_path / "out", tmp_path / "images"
    shutil.copytree(images, copy)

    def command(*more: str, images: Path = images, out: Path = out) -> int:
        given = ["--encoder", str(dino), "--images", str(images), "--dtype", "float32", "--batch-size", "7"]
        return main(
            ["data", "features", str(latents), str(out), *given, "--shard-rows", "13", "--device", "cpu", *more]
        )

    (copy / "00002" / "img00000029.png").write_bytes(b"no image")
    assert command(images=copy) == 2
    assert "img00000029.png: cannot be read as an image" in capsys.readouterr().err
    assert len(list(out.glob("shard-*"))) == 2 and not (out / "manifest.json").exists()
    assert command() == 2 and "holds an unfinished build of something else" in capsys.readouterr().err
    for other in (("--batch-size", "8"), ("--image-size", "32"), ("--precision", "bf16")):
        assert command(*other, images=copy) == 2 and "unfinished build" in capsys.readouterr().err
    shutil.copy(images / "00002" / "img00000029.png", copy / "00002")
    last = copy / "00002" / "img00000028.png"
    last.rename(copy / "00002" / "img00000028.PNG")
    assert command(images=copy) == 2 and "unfinished build" in capsys.readouterr().err
    (copy / "00002" / "img00000028.PNG").rename(last)
    assert command(images=copy) == 0
    assert Store(out).fingerprint() == Store(features).fingerprint()


def test_flags_of_the_command_reach_the_encoder(
    latents: Path, images: Path, dino: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    """The side of the images, the precision and the stored type."""
    command = ["data", "features", str(latents), str(tmp_path / "out"), "--encoder", str(dino), "--images", str(images)]
    assert main([*command, "--image-size", "32", "--precision", "bf16", "--dtype", "float32", "--device", "cpu"]) == 0
    small = np.stack([center_crop(Image.fromarray(x.transpose(1, 2, 0)), 32) for x in pixels])
    found = torch.from_numpy(Store(tmp_path / "out").read(np.arange(ROWS), np.zeros(ROWS, bool)).x)
    error = relative_error(found.flatten(2).transpose(1, 2), tokens_of(dino, small))
    assert 1e-4 < error < 2e-2 < relative_error(found.flatten(2).transpose(1, 2), tokens_of(dino, pixels))


def test_tokens_beyond_float16_are_refused(latents: Path, images: Path, dino: Path, tmp_path: Path) -> None:
    """They would be damaged rows of a finished store."""
    source = Store(latents)
    encoder = Encoder(str(dino), 4, torch.device("cpu"))
    encoder.model.layernorm.weight.fill_(1e6)  # type: ignore[union-attr, operator]
    found = Images(str(images), source)
    with pytest.raises(
        UserError, match="rows 7 to 13 have tokens that are not finite in float16, expected --dtype float32"
    ):
        Tokens(source, found, encoder, 7, 64, "float16").read(7, ROWS)
    assert np.isfinite(Tokens(source, found, encoder, 7, 64, "float32").read(7, ROWS).x).all()


def test_mirror_images_of_a_store_of_pixels_are_its_own(dino: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """As they are stored, whatever they are."""
    others = np.ascontiguousarray(pixels[::-1])
    write_store(tmp_path / "pixels", kind="pixels", x=pixels, y=LABELS, num_classes=5, flip=others)
    command = ["data", "features", str(tmp_path / "pixels"), str(tmp_path / "out"), "--encoder", str(dino)]
    assert main([*command, "--patch-size", "16", "--dtype", "float32", "--device", "cpu"]) == 0
    for mirrored, x in ((False, pixels), (True, others)):
        rows = torch.from_numpy(Store(tmp_path / "out").read(np.arange(ROWS), np.full(ROWS, mirrored)).x)
        assert relative_error(rows.flatten(2).transpose(1, 2), tokens_of(dino, x)) < 1e-5


def test_a_shard_holds_a_gibibyte_of_whole_batches(latents: Path, images: Path, dino: Path) -> None:
    encoder, source = Encoder(str(dino), 4, torch.device("cpu")), Store(latents)
    tokens = Tokens(source, Images(str(images), source), encoder, 64, 64, "float16")
    row = WIDTH * 16 * 2 * 2
    assert tokens.fitting_rows() % 64 == 0 and 0 <= (1 << 30) - tokens.fitting_rows() * row < 64 * row


def test_without_crc_features_are_read_without_it_too(latents: Path, features: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(features, damaged)
    shard = Store(damaged).shards[0]
    data = bytearray(shard.path.read_bytes())
    for offset in (shard.entry.offset, shard.entry.flip_offset):
        assert offset is not None
        data[offset] ^= 1
    shard.path.write_bytes(data)
    given = {"align__features": str(damaged), "train__batch_size": ROWS, "data__loader": "torch"}
    with pytest.raises(UserError, match="crc32"):
        batches(aligned(latents, **given), 1)
    assert len(batches(aligned(latents, **given, data__crc=False), 1)) == 1


@pytest.mark.parametrize("damage", [b"no image", b"", None])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_damaged_image_is_named_or_passed_over(
    latents: Path, images: Path, dino: Path, pixels: np.ndarray, tmp_path: Path, loader: str, damage: bytes | None
) -> None:
    """What is no image, empty or a link to nowhere ends the run with its name, or is skipped like a damaged row.

    The next in order is one too, and shows its damage only once it has taken the first one's place.
    """
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    given = {"align__encoder": str(dino), "align__images": str(copy), "data__loader": loader, "train__batch_size": 10}
    skip = aligned(latents, **given, data__on_corrupt="skip")
    whole = [i for step in batches(skip, 3) for batch in step for i in batch.id.tolist()]
    bad = whole[3:5] + whole[12:13]
    for sample in bad:
        file = copy / f"{sample // 10:05d}" / f"img{sample:08d}.png"
        file.unlink()
        file.symlink_to("nowhere") if damage is None else file.write_bytes(damage)
    name = f"img{bad[0]:08d}.png: (cannot be read|is empty, expected an image).*sample {bad[0]}"
    with pytest.raises(UserError, match=name):
        batches(aligned(latents, **given), 3)
    found = []
    for _ in range(2):
        opened = open_loader(setup(skip), 0, 6)
        steps = [[b.clone() for b in step] for step in opened]
        found.append([batch.id.tolist() for step in steps for batch in step])
        first = [i for batch in found[-1][:3] for i in batch]
        assert first[3] == first[4] == whole[5] and first[12] == whole[13] and len(first) == len(whole)
        assert opened.skipped == 6 and not set(bad) & {i for batch in found[-1] for i in batch}
        _check_tokens(steps, dino, pixels, Store(latents))
    assert found[0] == found[1]


def test_sixteen_bits_are_not_cut_at_eight(tmp_path: Path) -> None:
    """Pillow's own conversion keeps the lowest 255 levels of 65,536, and makes everything white."""
    from lsep.data.dali import Decoder

    levels = (np.arange(40 * 50).reshape(40, 50) * 32).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    found = np.asarray(open_image(tmp_path, file.getvalue()))
    assert np.array_equal(found, (levels / 257).round().astype(np.uint8)[..., None].repeat(3, -1))
    got = Decoder(1, 32, 1, torch.device("cpu"))([file.getvalue()], None, lambda place: tmp_path)[0].numpy()
    assert np.abs(got - center_crop(Image.fromarray(found), 32).astype(int)).max() <= 2


def test_a_damaged_image_holds_no_memory(latents: Path, images: Path) -> None:
    """Each time it is met: an exception that is raised again and again keeps all that its frames held."""
    found = Images(str(images), Store(latents))
    found.give_up(29, "x.png: cannot be read as an image")
    met = []
    for _ in range(2):
        with pytest.raises(CorruptRow, match=r"x.png: cannot be read as an image \(sample 29\)") as caught:
            found.read(np.arange(ROWS))
        met.append((caught.value.sample, len(caught.traceback)))
    assert met == [(29, 2)] * 2


def test_what_dali_does_not_read_pillow_does(tmp_path: Path) -> None:
    """A GIF under another name, as the latents were made of it; the images beside it as they are without it."""
    from lsep.data.dali import Decoder, Undecodable

    def jpg(place: int) -> Path:
        return Path("abc"[place] + ".jpg")

    rng, files = np.random.default_rng(3), []
    for kind in ("PNG", "GIF", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(file, kind)
        files.append(file.getvalue())
    decoder = Decoder(3, 32, 2, torch.device("cpu"))
    beside = decoder([files[0], files[0], files[2]], None, jpg).clone()
    got = decoder(files, np.array([False, True, True]), jpg)
    gif = torch.from_numpy(center_crop(open_image(tmp_path, files[1]), 32))
    assert torch.equal(got[0], beside[0]) and torch.equal(got[1], gif.flip(-1))
    assert torch.equal(got[2], beside[2].flip(-1))
    cut = files[2][: len(files[2]) // 2]
    with pytest.raises(Undecodable, match=r"^b.jpg: cannot be read as an image \(OSError: .*truncated") as caught:
        decoder([files[1], cut, files[0]], None, jpg)
    assert caught.value.place == 1
    assert torch.equal(decoder([files[0], files[0], files[2]], None, jpg), beside)


def test_bad_input_of_the_command(
    latents: Path, images: Path, dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, sentence in (
        ([], "has latents, expected --images, the folder of their images"),
        (["--images", str(images), "--patch-size", "3"], "--patch-size is 3, expected a divisor of the data's side 8"),
        (["--images", str(images), "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
    ):
        command = ["data", "features", str(latents), str(tmp_path / "out"), "--encoder", str(dino), *more]
        code, err = main(command), capsys.readouterr().err
        assert code == 2 and sentence in err
        assert not (tmp_path / "out").exists()
    command = ["data", "features", "digits", str(tmp_path / "out"), "--encoder", str(dino), "--image-size", "32"]
    assert main(command) == 2 and "--image-size is 32 without --images, which it is for" in capsys.readouterr().err
