"""The commands `lsep data ...`: one function each, heavy imports inside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsep.arguments import Args, first_arguments, no_flags, parse, wants_help
from lsep.data import FORMS, Form, Labels
from lsep.errors import UserError, nearest


@dataclass(frozen=True)
class EncodeArgs:
    """Flags of `lsep data encode`."""

    vae: str
    """Folder or hub id of a diffusers AutoencoderKL, such as stabilityai/sd-vae-ft-mse."""
    size: int = 256
    """Side of the centre crop, in pixels."""
    flips: bool = False
    """Encode the mirror image of every image as a second variant."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type the VAE runs in."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type the moments are stored in."""
    batch_size: int = 16
    """Images encoded at once."""
    shard_rows: int = 4096
    """Rows of a shard; a killed encoding goes on after its last whole one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode; auto takes a GPU when there is one."""
    labels: Labels = "auto"
    """Where labels are: folders (of classes), names (what stands before the first _), none; auto: where dataset.json,
    tars or parquet say them, else folders."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An image that cannot be read ends the encoding, or is left out and listed in OUT/passed-over.txt."""


@dataclass(frozen=True)
class FeaturesArgs:
    """Flags of `lsep data features`."""

    encoder: str
    """transformers id or folder of a vision transformer, such as facebook/dinov2-base."""
    images: Path | None = None
    """Folder of the images behind latents; not for a store of images."""
    image_size: int | None = None
    """Side to which these images are resized and cropped, in pixels; 8 a latent pixel when not given."""
    patch_size: int = 2
    """Of the model to be trained; the tokens are as many as its own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the encoder's matrix products."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type the tokens are stored in."""
    batch_size: int = 64
    """Images encoded at once."""
    shard_rows: int | None = None
    """Rows of a shard, about 1 GiB of them when not given; killed, it goes on after its last whole one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode; auto takes a GPU when there is one."""


@dataclass(frozen=True)
class PackArgs:
    """Flags of `lsep data pack`."""

    form: Form | None = None
    """Form of the source; recognised when not given."""
    size: int | None = None
    """imagefolder: side of the centre crop, in pixels."""
    scale: float | None = None
    """Factor the model's latents have over the stored ones, where the form does not say it."""
    num_classes: int | None = None
    """Classes; the largest label plus one when not given."""
    shard_rows: int = 8192
    """Rows of a shard."""
    labels: Labels = "auto"
    """imagefolder: where labels are: folders (of classes), names (what stands before the first _), none; auto:
    dataset.json, tars and parquet say it, else folders."""
    on_corrupt: Literal["error", "skip"] = "error"
    """imagefolder: an image that cannot be read ends it, or is left out and listed in OUT/passed-over.txt."""


@dataclass(frozen=True)
class IndexArgs:
    """Flags of `lsep data index`."""

    form: Form | None = None
    """Form of the source; recognised when not given."""
    scale: float | None = None
    """Factor the model's latents have over the stored ones, where the form does not say it."""
    num_classes: int | None = None
    """Classes; the largest label plus one when not given."""


@dataclass(frozen=True)
class InfoArgs:
    """Flags of `lsep data info`."""

    picture: Path | None = None
    """Write a picture of a few samples to this PNG file."""
    vae: str | None = None
    """Folder or hub id of a diffusers AutoencoderKL that decodes latents for the picture."""


def encode(argv: Args) -> None:
    """encode images with a VAE: lsep data encode IMAGES OUT --vae PATH_OR_HUB_ID"""
    (images, out), argv = first_arguments("data encode", ("IMAGES", "OUT"), argv)
    example = "lsep data encode imagenet/train store --vae stabilityai/sd-vae-ft-mse --flips"
    text = (
        "Encode images as a store of moments: folders of classes, a folder or zip with EDM2's dataset.json, "
        f"WebDataset's tars or parquet.\n\nExample: {example}"
    )
    args: EncodeArgs = parse(EncodeArgs, argv, "lsep data encode IMAGES OUT", text)
    from lsep.data.encode import encode as run

    run(Path(images), Path(out), **vars(args))


def features(argv: Args) -> None:
    """an encoder's tokens of a store's images, for align.features: lsep data features STORE OUT --encoder ID"""
    (store, out), argv = first_arguments("data features", ("STORE", "OUT"), argv)
    example = "lsep data features store dinov2 --encoder facebook/dinov2-base --images images"
    text = f"Write a store of a vision transformer's tokens, row by row those of STORE.\n\nExample: {example}"
    args: FeaturesArgs = parse(FeaturesArgs, argv, "lsep data features STORE OUT", text)
    from lsep.data.features import write_features

    write_features(store, Path(out), **vars(args))
    print(out)


def pack(argv: Args) -> None:
    """make a store of latents or images in another form: lsep data pack SOURCE OUT [--form FORM]"""
    (source, out), argv = first_arguments("data pack", ("SOURCE", "OUT"), argv)
    text = f"Make a store. Forms: {', '.join(FORMS)}.\n\nExample: lsep data pack vae-sd store --form repa"
    args: PackArgs = parse(PackArgs, argv, "lsep data pack SOURCE OUT", text)
    from lsep.data.forms import open_form
    from lsep.data.squares import PixelRows
    from lsep.data.writer import build

    if args.shard_rows < 1:
        raise UserError(f"--shard-rows is {args.shard_rows}, expected at least 1")
    rows = open_form(source, args.form, args.size, args.scale, args.num_classes, args.labels, args.on_corrupt)
    flags = {k: v for k, v in vars(args).items() if k != "on_corrupt"}  # an unfinished store may go on without errors
    identity = {
        "source": str(Path(source).resolve()),
        **flags,
        "images": rows.identity if isinstance(rows, PixelRows) else None,
    }
    build(rows, Path(out), args.shard_rows, identity=identity)
    print(out)


def index(argv: Args) -> None:
    """use LightningDiT shards or per-file .npy in place: lsep data index FOLDER"""
    (folder,), argv = first_arguments("data index", ("FOLDER",), argv)
    text = "Write a manifest beside the data, without copying it.\n\nExample: lsep data index latents"
    args: IndexArgs = parse(IndexArgs, argv, "lsep data index FOLDER", text)
    from lsep.data.index import index as run

    print(run(Path(folder), args.form, scale=args.scale, num_classes=args.num_classes))


def check(argv: Args) -> None:
    """verify checksums, values and labels of a store; exit code 1 when something is wrong: lsep data check STORE"""
    (store,), argv = first_arguments("data check", ("STORE",), argv)
    no_flags("data check STORE", "Verify a store, all of it.\n\nExample: lsep data check store", argv)
    from lsep.data.inspect import problems

    count = 0
    for problem in problems(Path(store)):
        count += 1
        print(problem)
    print(f"{store}: {count} problems" if count else f"{store}: whole")
    if count:
        raise SystemExit(1)


def info(argv: Args) -> None:
    """count classes, compare channel statistics with the scale, show samples: lsep data info STORE"""
    (store,), argv = first_arguments("data info", ("STORE",), argv)
    text = "Describe a store.\n\nExample: lsep data info store --picture samples.png"
    args: InfoArgs = parse(InfoArgs, argv, "lsep data info STORE", text)
    from lsep.data.inspect import describe, picture

    print(describe(store))
    if args.picture is not None:
        picture(store, args.picture, args.vae)
        print(args.picture)


def stage(argv: Args) -> None:
    """copy a store from an object store, verified and resumable: lsep data stage URL DIR"""
    (url, folder), argv = first_arguments("data stage", ("URL", "DIR"), argv)
    no_flags("data stage URL DIR", "Copy a store.\n\nExample: lsep data stage s3://bucket/store /local/store", argv)
    from lsep.data.stage import stage as run

    run(url, Path(folder))
    print(folder)


COMMANDS: dict[str, Callable[[Args], None]] = {
    c.__name__: c for c in (encode, features, pack, index, check, info, stage)
}


def main(argv: Args) -> None:
    """Run one of COMMANDS."""
    if not argv or (wants_help(argv) and argv[0] not in COMMANDS):
        print("usage: lsep data COMMAND ...\n")
        print("\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items()))
        print("\nExample: lsep data pack vae-sd store")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"command 'data {argv[0]}' is unknown{nearest(argv[0], list(COMMANDS))}")
    COMMANDS[argv[0]](argv[1:])
