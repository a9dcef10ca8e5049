"""The commands `lsep ema ...`: one function each, heavy imports inside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lsep.arguments import Args, first_arguments, no_flags, parse, wants_help
from lsep.errors import UserError, nearest


@dataclass(frozen=True)
class ReconstructArgs:
    """Flags of `lsep ema reconstruct`."""

    out: Path
    """Folder to be made: a run with the average as its weights."""
    sigma_rel: float | None = None
    """Its width relative to the training, of a power function (EDM2)."""
    decay: float | None = None
    """Instead, its constant decay per step."""
    step: int | None = None
    """Step of a copy; the last when not given."""


def list_(argv: Args) -> None:
    """list the averages of a run's checkpoints, and the copies others can be made of: lsep ema list RUN"""
    (path,), argv = first_arguments("ema list", ("RUN",), argv)
    text = "List a run's averages; contents are not read.\n\nExample: lsep ema list runs/quickstart"
    no_flags("ema list RUN", text, argv)
    from lsep import shards
    from lsep.averages import among
    from lsep.checkpoint import steps
    from lsep.run import Run

    run = Run.existing(path)
    print(f"{'step':>10}{'MB':>12}  averages")
    for folder in (*steps(run.checkpoints), *steps(run.snapshots)):
        copy = folder.parent == run.snapshots
        damage = shards.problems(folder, (), sha256=False)  # of the manifest
        manifest = None if damage else shards.read_manifest(folder)
        if manifest:
            damage = shards.problems(folder, tuple(manifest.parts), sha256=False)
            manifest = None if damage else manifest
        size = f"{manifest.bytes / 1e6:12,.1f}" if manifest else " " * 12
        names = among(manifest.parts) if manifest else damage[:1]
        print(f"{int(folder.name):10}{size}  {', '.join(names)}{' (copy)' if copy and manifest else ''}")


def reconstruct(argv: Args) -> None:
    """make an average of another width or decay: lsep ema reconstruct RUN --sigma-rel 0.075 --out NEW"""
    (path,), argv = first_arguments("ema reconstruct", ("RUN",), argv)
    text = (
        "Make a run of an average that was not kept, out of copies of power-function averages (EDM2).\n\n"
        "Example: lsep ema reconstruct runs/sit-xl --sigma-rel 0.075 --out runs/sit-xl-0.075"
    )
    args: ReconstructArgs = parse(ReconstructArgs, argv, "lsep ema reconstruct RUN", text)
    if (args.sigma_rel is None) == (args.decay is None):
        found = "neither" if args.decay is None else "both"
        raise UserError(f"{found} of --sigma-rel and --decay given, expected one of them")
    from lsep.power import NARROWEST, WIDEST
    from lsep.reconstruction import reconstruct as run_reconstruction
    from lsep.run import Run

    if args.sigma_rel is not None and not NARROWEST <= args.sigma_rel <= WIDEST:
        raise UserError(f"--sigma-rel is {args.sigma_rel}, expected from {NARROWEST} to {WIDEST}")
    if args.decay is not None and not 0 <= args.decay < 1:
        raise UserError(f"--decay is {args.decay}, expected from 0 to below 1")
    for sentence in run_reconstruction(Run.existing(path), args.out, args.sigma_rel, args.decay, args.step):
        print(sentence)
    print(args.out)


COMMANDS: dict[str, Callable[[Args], None]] = {"list": list_, "reconstruct": reconstruct}


def main(argv: Args) -> None:
    """Run one of COMMANDS."""
    if not argv or (wants_help(argv) and argv[0] not in COMMANDS):
        print("usage: lsep ema COMMAND ...\n")
        print("\n".join(f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items()))
        print("\nExample: lsep ema list runs/quickstart")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"command 'ema {argv[0]}' is unknown{nearest(argv[0], list(COMMANDS))}")
    COMMANDS[argv[0]](argv[1:])
