"""The commands `lsep checkpoint ...`: one function each, heavy imports inside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lsep.arguments import Args, first_arguments, no_flags, parse, wants_help
from lsep.errors import UserError, nearest


@dataclass(frozen=True)
class VerifyArgs:
    """Flags of `lsep checkpoint verify`."""

    checkpoint: int | None = None
    """Step of the checkpoint to verify; all when not given."""


@dataclass(frozen=True)
class ConsolidateArgs:
    """Flags of `lsep checkpoint consolidate`."""

    checkpoint: int | None = None
    """Step of the checkpoint to take; the newest when not given."""
    out: Path | None = None
    """A folder that is not there yet; RUN/consolidated-STEP when not given."""


def list_(argv: Args) -> None:
    """list a run's checkpoints, with what is damaged by the sizes of its files: lsep checkpoint list RUN"""
    (path,), argv = first_arguments("checkpoint list", ("RUN",), argv)
    text = "List a run's checkpoints; contents are not read.\n\nExample: lsep checkpoint list runs/quickstart"
    no_flags("checkpoint list RUN", text, argv)
    from lsep import shards
    from lsep.checkpoint import progress_of, steps
    from lsep.run import Run

    print(f"{'step':>10}{'MB':>12}{'seconds':>12}{'processes':>11}  state")
    for folder in steps(Run.existing(path).checkpoints):
        damage = shards.problems(folder, sha256=False)
        figures = " " * 35
        if not damage:
            manifest = shards.read_manifest(folder)
            seconds = progress_of(folder).seconds
            figures = f"{manifest.bytes / 1e6:12,.1f}{seconds:12,.0f}{manifest.values['world']:11}"
        print(f"{int(folder.name):10}{figures}  {damage[0] if damage else 'whole'}")


def verify(argv: Args) -> None:
    """verify checkpoints by sha256; exit code 1 when one is damaged: lsep checkpoint verify RUN [--checkpoint N]"""
    (path,), argv = first_arguments("checkpoint verify", ("RUN",), argv)
    text = "Verify a run's checkpoints, all of their bytes.\n\nExample: lsep checkpoint verify runs/quickstart"
    args: VerifyArgs = parse(VerifyArgs, argv, "lsep checkpoint verify RUN", text)
    from lsep import shards
    from lsep.checkpoint import find, steps
    from lsep.run import Run

    folder = Run.existing(path).checkpoints
    damaged = 0
    for checkpoint in steps(folder) if args.checkpoint is None else [find(folder, args.checkpoint)]:
        problems = shards.problems(checkpoint)
        damaged += bool(problems)
        print("\n".join(problems) if problems else f"{checkpoint}: whole")
    if damaged:
        raise SystemExit(1)


def consolidate(argv: Args) -> None:
    """gather a checkpoint's shards in one file each for model, EMA and optimizer: lsep checkpoint consolidate RUN"""
    (path,), argv = first_arguments("checkpoint consolidate", ("RUN",), argv)
    text = (
        "Write model.safetensors, ema.safetensors and optimizer.safetensors under the published names.\n\n"
        "Example: lsep checkpoint consolidate runs/quickstart --checkpoint 400 --out weights"
    )
    args: ConsolidateArgs = parse(ConsolidateArgs, argv, "lsep checkpoint consolidate RUN", text)
    from lsep.checkpoint import find
    from lsep.run import Run

    run = Run.existing(path)
    checkpoint = find(run.checkpoints, args.checkpoint)
    out = args.out or run.path / f"consolidated-{checkpoint.name}"
    gather(checkpoint, out)
    print(out)


def gather(path: Path, out: Path) -> None:
    """Write {model,ema,optimizer,...}.safetensors of a checkpoint into the new folder `out`, under the published names.

    Raises UserError where the checkpoint is damaged, or `out` is there already or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from lsep import shards
    from lsep.checkpoint import read_tensors
    from lsep.files import new_folder, replacing

    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is there already, expected a new folder")
    for problem in shards.problems(path):
        raise UserError(problem)
    try:
        with new_folder(out) as temporary:
            for part in shards.read_manifest(path).parts:
                with replacing(temporary / f"{part}.safetensors", flushed=True) as file:
                    save_file(read_tensors(path, part), file)
    except (OSError, SafetensorError) as error:  # safetensors wraps the operating system's errors
        raise UserError(f"--out {out}: cannot be written ({error})") from None


COMMANDS: dict[str, Callable[[Args], None]] = {"list": list_, "verify": verify, "consolidate": consolidate}


def main(argv: Args) -> None:
    """Run one of COMMANDS."""
    if not argv or (wants_help(argv) and argv[0] not in COMMANDS):
        print("usage: lsep checkpoint COMMAND ...\n")
        print("\n".join(f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items()))
        print("\nExample: lsep checkpoint verify runs/quickstart")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"command 'checkpoint {argv[0]}' is unknown{nearest(argv[0], list(COMMANDS))}")
    COMMANDS[argv[0]](argv[1:])
