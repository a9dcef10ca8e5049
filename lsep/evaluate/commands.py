"""The commands `lsep evaluate ...`: flags here, heavy imports inside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lsep.arguments import Args, first_arguments, parse
from lsep.errors import UserError
from lsep.evaluate import Metric, Precision


@dataclass(frozen=True)
class FeatureArgs:
    """Flags that say where features come from."""

    features: str = "inception"
    """inception, or a function as MODULE:FUNCTION or FILE.py:FUNCTION (see lsep/evaluate/features.py)."""
    weights: Path | None = None
    """File of the extractor's weights; of inception weights-inception-2015-12-05-6726825d.pth, in torch.hub's folder
    when not given."""
    precision: Precision = "fp32"
    """Type features are computed in; fp64 does not depend on the batch size."""
    batch_size: int = 64
    """Images that go through the extractor at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one."""


@dataclass(frozen=True)
class _Required:
    reference: str
    """Statistics (ADM's VIRTUAL_*.npz, or of lsep evaluate reference), or images: .npz, folder, store or digits."""


@dataclass(frozen=True)
class EvaluateArgs(FeatureArgs, _Required):
    """Flags of `lsep evaluate`."""

    metrics: tuple[Metric, ...] | None = None
    """What to measure; all that the features allow when not given. fid is a Frechet distance over any features."""
    bootstrap: int = 0
    """Resamples of the samples for the interval of fid; 0 gives none."""
    distances: Literal["fp32", "adm-fp16"] = "fp32"
    """Distances of precision and recall: of fp32 features, or products in half precision as in ADM's evaluator."""
    json: Path | None = None
    """Write the result to this file."""


@dataclass(frozen=True)
class _Out:
    out: Path
    """File to write, ending in .npz."""


@dataclass(frozen=True)
class ReferenceArgs(FeatureArgs, _Out):
    """Flags of `lsep evaluate reference`."""

    keep: int = 10_000
    """Features to keep for precision, recall and KID, drawn with a fixed seed."""


def _extractor(args: FeatureArgs) -> Any:
    from lsep.evaluate.features import open_extractor
    from lsep.step import pick_device

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, expected at least 1")
    return open_extractor(args.features, args.weights, args.precision, pick_device(args.device))


def _require_folder(flag: str, file: Path) -> None:
    """Refuse a file that could not be written, before hours go into what it should hold."""
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"{flag} {file}: cannot be written, expected a file in a folder that is there")


def reference(argv: Args) -> None:
    """Compute and save the statistics of a reference set."""
    (source,), argv = first_arguments("evaluate reference", ("SOURCE",), argv)
    text = (
        "Compute the statistics of images and write them to a file for --reference.\n\n"
        "Example: lsep evaluate reference imagenet/train --out imagenet.npz"
    )
    args: ReferenceArgs = parse(ReferenceArgs, argv, "lsep evaluate reference SOURCE", text)
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}, expected a file ending in .npz")
    if args.keep < 1:
        raise UserError(f"--keep is {args.keep}, expected at least 1")
    _require_folder("--out", args.out)
    from lsep.evaluate.images import open_images
    from lsep.evaluate.reference import compute, save

    extractor = _extractor(args)
    found = compute(open_images(source, extractor.latents), extractor, args.batch_size, args.keep)
    save(found, extractor, args.out)
    print(args.out)


def main(argv: Args) -> None:
    """`lsep evaluate SAMPLES ...` or `lsep evaluate reference SOURCE ...`."""
    if argv and argv[0] == "reference":
        reference(argv[1:])
        return
    (samples,), argv = first_arguments("evaluate", ("SAMPLES",), argv)
    text = (
        "Measure samples (an .npz with arr_0, a folder of images, a run) against a reference; "
        "`lsep evaluate reference --help` makes one.\n\n"
        "Example: lsep evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json metrics.json"
    )
    args: EvaluateArgs = parse(EvaluateArgs, argv, "lsep evaluate SAMPLES", text)
    if args.bootstrap < 0:
        raise UserError(f"--bootstrap is {args.bootstrap}, expected at least 0")
    if args.json is not None:
        _require_folder("--json", args.json)
    from lsep.evaluate.images import open_images
    from lsep.evaluate.measure import evaluate, table

    extractor = _extractor(args)
    images = open_images(samples, extractor.latents)
    result = evaluate(images, args.reference, extractor, args.metrics, args.bootstrap, args.distances, args.batch_size)
    if args.json is not None:
        import json

        from lsep.run import write_atomic

        write_atomic(args.json, json.dumps(result, indent=2) + "\n")
    print(table(result))
