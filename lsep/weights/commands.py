"""The commands `lsep import` and `lsep export`; heavy imports inside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsep.arguments import Args, first_arguments, parse
from lsep.errors import UserError


@dataclass(frozen=True)
class ImportArgs:
    """Flags of `lsep import`."""

    out: Path
    """Directory of the run to be made."""
    form: Literal["sit", "repa", "lsep", "dit", "diffusers"] | None = None
    """Whose weights they are; recognised when not given, but for those of SiT and DiT, whose names are the same."""
    ema: bool = True
    """Of a file with both, take the averaged weights."""
    num_heads: int | None = None
    """Attention heads, for a width of no published size."""
    kind: Literal["moments", "samples", "pixels"] | None = None
    """What the model was trained on: a VAE's moments or samples, or pixels; our own exports say it, else moments."""
    scale: float | None = None
    """Factor the model's latents have over the VAE's; our own exports say it, else 0.18215."""
    keep_projectors: bool = False
    """Write REPA's projectors beside the run."""


def import_weights(argv: Args) -> None:
    """`lsep import`: a run of others' weights."""
    (path,), argv = first_arguments("import", ("FILE",), argv)
    example = "lsep import SiT-XL-2-256x256.pt --form sit --out runs/sit-xl"
    args: ImportArgs = parse(ImportArgs, argv, "lsep import FILE", f"Make a run of weights.\n\nExample: {example}")
    from lsep.weights.importing import Given
    from lsep.weights.importing import import_weights as run

    values = {k: v for k, v in vars(args).items() if k != "out"}
    for sentence in run(Path(path), args.out, Given(**values)):
        print(sentence)
    print(args.out)


@dataclass(frozen=True)
class ExportArgs:
    """Flags of `lsep export`."""

    out: Path
    """Folder to be made, for the weights and their card."""
    format: Literal["safetensors", "sit", "diffusers"] = "safetensors"
    """safetensors: our names and time; sit: for SiT's code; diffusers: a DiTTransformer2DModel's directory,
    or a UNet2DModel's."""
    ema: bool = True
    """The averaged weights, not those being trained."""
    average: str = "ema"
    """Another average that the checkpoint has, such as power_0_05 (see lsep ema list)."""
    with_probe: bool = False
    """With the probe's classifier (safetensors)."""
    checkpoint: int | None = None
    """Step of the checkpoint to take; the newest when not given."""


def export_weights(argv: Args) -> None:
    """`lsep export`: a run's weights for others."""
    (path,), argv = first_arguments("export", ("RUN",), argv)
    example = "lsep export runs/quickstart --format diffusers --out exported"
    args: ExportArgs = parse(ExportArgs, argv, "lsep export RUN", f"Write a run's weights.\n\nExample: {example}")
    from lsep.run import Run
    from lsep.weights.exporting import export as write

    if not args.ema and args.average != "ema":
        raise UserError(f"--no-ema and --average {args.average} exclude each other: expected one of them")
    if args.average == "model":
        raise UserError("--average is 'model', expected an average; --no-ema takes the weights in training")
    part = args.average if args.ema else "model"
    for sentence in write(Run.existing(path), args.format, args.out, part, args.with_probe, args.checkpoint):
        print(sentence)
