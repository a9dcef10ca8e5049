"""The command `lsep`: one line a sub-command here, heavy imports inside each.

Bad input ends with one sentence on stderr and exit code 2, an interrupted training with 130.
"""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from lsep.arguments import Args, first_arguments, no_flags, parse, wants_help
from lsep.errors import DISK, UserError, nearest, out_of_memory
from lsep.voice import take_flags


def train(argv: Args) -> None:
    """train a preset, or go on with its run: lsep train PRESET [--section.field VALUE] [--run-dir DIR] [--resume]"""
    import tyro

    from lsep import config as configuration
    from lsep.presets import PRESETS, preset

    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is None and not wants_help(argv):
        raise UserError(f"lsep train: no preset comes first{nearest('', list(PRESETS))}")
    start = preset(name) if name else PRESETS["quickstart"]

    @dataclass(frozen=True)
    class TrainArgs:
        config: Annotated[configuration.Config, tyro.conf.arg(name="")]
        run_dir: Path = Path("runs") / (name or "PRESET")
        """Directory of the run; an existing run of the same configuration is continued."""
        resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Continue from the newest checkpoint, and fail if there is none."""
        strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Fail where the newest checkpoint is damaged, instead of going on from the one before."""

    defaults = TrainArgs(config=start)
    description = (
        "Train a preset. Presets: " + ", ".join(PRESETS) + ".\n\n"
        "Example: lsep train quickstart --train.steps 200 --run-dir runs/short"
    )
    args = parse(TrainArgs, argv[1:] if name else argv, f"lsep train {name or 'PRESET'}", description, defaults)

    from lsep.checkpoint import latest
    from lsep.dist import rank
    from lsep.launch import command
    from lsep.signals import Preempted
    from lsep.train import train as run_training

    try:
        run_training(args.config, args.run_dir, args.resume, preset=name or "", strict=args.strict)
    except (KeyboardInterrupt, Preempted) as stopped:
        if rank() == 0:
            kept = latest(args.run_dir / "checkpoints")
            again = command(["train", *(a for a in argv if a != "--resume"), "--resume"])
            saved = f"saved in {kept}; go on with: {again}" if kept else "there was no checkpoint to save yet"
            print(f"\n{str(stopped) or 'stopped'}; {saved}", file=sys.stderr)
        if isinstance(stopped, KeyboardInterrupt):
            raise


def profile(argv: Args) -> None:
    """where a step's time goes: lsep profile PRESET [--section.field VALUE] [--steps N] [--out DIR] [--run nsys|ncu]"""
    import tyro

    from lsep import config as configuration
    from lsep.presets import PRESETS, preset

    (name,), flags = first_arguments("profile", ("PRESET",), argv)
    start = PRESETS["quickstart"] if wants_help(argv) else preset(name)

    @dataclass(frozen=True)
    class ProfileArgs:
        config: Annotated[configuration.Config, tyro.conf.arg(name="")]
        steps: int = 3
        """Steps in the window."""
        warmup: int = 5
        """Steps before the window."""
        out: Path = Path("runs") / f"profile-{name}"
        """Directory of the trace, the table and Nsight's reports."""
        run: Literal["nsys", "ncu"] | None = None
        """Run the profile under Nsight Systems (nsys) or Nsight Compute (ncu)."""
        trace: bool = True
        """Without it only the window is marked, for nsys or ncu around this command."""

    description = (
        "Profile training steps of a preset; nothing of them is kept.\n\n"
        "Example: lsep profile quickstart --steps 3 --out runs/profile-quickstart"
    )
    args = parse(ProfileArgs, flags, f"lsep profile {name}", description, ProfileArgs(config=start))

    from lsep import profile as profiling

    if args.run:
        profiling.run_tool(args.run, args.config, argv, args.out)
    else:
        profiling.profile(args.config, args.out, args.steps, args.warmup, argv, args.trace)


def plan(argv: Args) -> None:
    """memory, time and price of a run, without a GPU: lsep plan PRESET [--gpu h100] [--gpus N] [--hours-price X]"""
    import tyro

    from lsep import config as configuration
    from lsep.presets import PRESETS, preset

    (name,), flags = first_arguments("plan", ("PRESET",), argv)
    start = PRESETS["sit-xl-2-256"] if wants_help(argv) else preset(name)

    @dataclass(frozen=True)
    class PlanArgs:
        config: Annotated[configuration.Config, tyro.conf.arg(name="")]
        gpu: Literal["h100", "h200", "b200", "a100"] = "h200"
        """The card: H100 SXM 80 GB, H200, B200 or A100 SXM 80 GB."""
        gpus: int = 1
        """How many, with the batch in equal parts."""
        hours_price: float | None = None
        """Price of a GPU for an hour, in any currency."""

    description = (
        "Compute what a run of a preset needs, on cards that need not be here; nothing is measured. Without data it is "
        "ImageNet's latents.\n\nExample: lsep plan sit-xl-2-256 --gpu h100 --gpus 8 --hours-price 2.5"
    )
    args = parse(PlanArgs, flags, f"lsep plan {name}", description, PlanArgs(config=start))

    from lsep.cost.cards import CARDS
    from lsep.cost.sheet import Request, sheet

    print(sheet(Request(name, args.config, CARDS[args.gpu], args.gpus, args.hours_price)), end="")


@dataclass(frozen=True)
class SampleArgs:
    """Flags of `lsep sample`; what is None comes from the run's configuration."""

    classes: tuple[str, ...] | None = None
    """Classes to draw, in turn, by their numbers or by the data's names for them; all when not given."""
    num: int | None = None
    """Number of images."""
    labels: Literal["balanced", "random"] = "balanced"
    """The classes in turn, or each image's at random, a function of seed and image."""
    sampler: Literal["ode", "heun", "sde", "dopri5"] | None = None
    """ode: Euler; heun: second order; sde: Euler-Maruyama; dopri5: adaptive."""
    steps: int | None = None
    """Sampler steps."""
    cfg: tuple[float, ...] | None = None
    """Guidance scale, 1 is no guidance; of several each gets samples of its own."""
    guidance_low: float | None = None
    """Smallest t at which guidance acts."""
    guidance_high: float | None = None
    """Largest t at which guidance acts."""
    guidance_rule: Literal["time", "repa"] | None = None
    """Which t must be in that interval: time, the one the model is asked at; repa, the step's start, for Heun's second
    slope too, as REPA's and LSEP's samplers have it."""
    cfg_channels: int | None = None
    """First channels that guidance acts on, all when not given; SiT's and DiT's own figures guide 3 of 4."""
    autoguidance: str | None = None
    """RUN or RUN@STEP of a weaker model, whose velocity takes the place of the unlabelled one."""
    batch_size: int | None = None
    """Images that are kept in memory at once, and are lost by a kill; changes nothing of them."""
    seed: int = 0
    """Seed of the noise; image i depends on (seed, i) only."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest when not given."""
    average: str = "ema"
    """Another average that the checkpoint has, such as power_0_05 (see lsep ema list)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample; auto takes a GPU when there is one."""
    vae: str | None = None
    """Folder or hub id of diffusers' AutoencoderKL, AutoencoderDC or AutoencoderTiny that decodes latents to images."""
    rounding: Literal["nearest", "truncate"] = "nearest"
    """To whole numbers from 0 to 255: nearest (as SiT and DiT), or cut off (as REPA and LSEP)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products; auto is that of the training."""
    compile: bool = False
    """torch.compile of the blocks."""
    shuffle: bool = True
    """Write the images in random order, so that consecutive ones have all classes."""
    out: Path | None = None
    """A folder for grid.png and samples.npz, or a file ending in .npz; in the run's samples when not given."""


def sample(argv: Args) -> None:
    """draw images from a run's EMA weights: lsep sample RUN [--classes 3 7] [--num N] [--cfg 1.5 2] [--out DIR]"""
    (path,), argv = first_arguments("sample", ("RUN",), argv)
    example = "lsep sample runs/quickstart --classes 3 7 --num 64 --cfg 2"
    description = f"Draw images from a run's EMA weights.\n\nExample: {example}"
    args = parse(SampleArgs, argv, "lsep sample RUN", description)

    from lsep.checks import check
    from lsep.dist import rank
    from lsep.run import Run
    from lsep.samples import Request, class_numbers, sample_run

    run = Run.existing(path)
    config = run.config()
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{run.config_file}: {error}") from None
    names = ("sampler", "steps", "guidance_low", "guidance_high", "guidance_rule", "cfg_channels", "num", "batch_size")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    guides = config.model.conditional or args.autoguidance is not None
    scales = ((config.sample.cfg if guides else 1.0),) if args.cfg is None else args.cfg
    for scale in scales:
        config = replace(config, sample=replace(config.sample, cfg=scale, **given))
        try:
            check(config)
        except UserError as error:  # under the flags' names here
            raise UserError(str(error).replace("--sample.", "--")) from None
    classes = None if args.classes is None else class_numbers(args.classes, run.manifest())
    request = Request(**{f.name: getattr(args, f.name) for f in fields(Request)} | {"classes": classes})
    files = sample_run(run, config, request, scales, args.out, args.checkpoint, args.device)
    for file in files if rank() == 0 else ():
        print(file)


def import_(argv: Args) -> None:
    """make a run of SiT, REPA, LSEP, DiT or diffusers weights: lsep import FILE --out RUN [--form sit]"""
    from lsep.weights.commands import import_weights

    import_weights(argv)


def export(argv: Args) -> None:
    """write a run's weights for others: lsep export RUN --out DIR [--format safetensors|sit|diffusers]"""
    from lsep.weights.commands import export_weights

    export_weights(argv)


def evaluate(argv: Args) -> None:
    """FID, sFID, IS, precision, recall, KID: lsep evaluate SAMPLES --reference REF; lsep evaluate reference SOURCE"""
    from lsep.evaluate.commands import main as evaluate_main

    evaluate_main(argv)


def probe(argv: Args) -> None:
    """linear separability of a run's features by depth and t: lsep probe RUN [RUN ...] [--times 0.1 0.5] [--out DIR]"""
    from lsep.separability.commands import main as probe_main

    probe_main(argv)


def report(argv: Args) -> None:
    """write a run's report.html again from its files: lsep report RUN"""
    (path,), argv = first_arguments("report", ("RUN",), argv)
    no_flags("report RUN", "Write RUN/report.html from the run's files.\n\nExample: lsep report runs/quickstart", argv)
    from lsep.report import render
    from lsep.run import Run

    print(render(Run.existing(path)))


def presets(argv: Args) -> None:
    """list the presets with their sizes and settings"""
    no_flags("presets", "List the presets.\n\nExample: lsep presets", argv)
    from lsep.presets import PRESETS

    columns = "".join(f"{name:>7}" for name in ("model", "depth", "width", "heads", "patch", "input", "batch"))
    print(f"{'preset':22}{columns}{'steps':>10}  probe")
    for name, c in PRESETS.items():
        m = c.model
        side = "data" if m.input_size is None else str(m.input_size)
        probe = f"depth {c.probe.depth}, lr {c.optim.probe_lr:g}"
        print(
            f"{name:22}{m.backbone:>7}{m.depth:7}{m.hidden_size:7}{m.num_heads:7}{m.patch_size:7}{side:>7}"
            f"{c.train.batch_size:7}{c.train.steps:10,}  {probe}"
        )


def doctor(argv: Args) -> None:
    """show what is active on this machine, and why the rest is not"""
    no_flags("doctor", "Show what is active here.\n\nExample: lsep doctor", argv)
    from lsep.doctor import describe

    print(describe())


def ema(argv: Args) -> None:
    """list a run's averages, or make another one of them (EDM2): lsep ema --help"""
    from lsep.ema_commands import main as ema_main

    ema_main(argv)


def data(argv: Args) -> None:
    """pack, encode, index, check, show or stage a data set: lsep data --help"""
    from lsep.data.commands import main as data_main

    data_main(argv)


def checkpoint(argv: Args) -> None:
    """verify, list or consolidate a run's checkpoints: lsep checkpoint --help"""
    from lsep.checkpoint_commands import main as checkpoint_main

    checkpoint_main(argv)


COMMANDS: dict[str, Callable[[Args], None]] = {
    c.__name__.rstrip("_"): c
    for c in (
        train,
        plan,
        sample,
        evaluate,
        probe,
        report,
        import_,
        export,
        checkpoint,
        ema,
        data,
        presets,
        profile,
        doctor,
    )
}


def _usage() -> str:
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    return (
        "usage: lsep COMMAND ...\n\n"
        "Fast training of flow transformers whose features are linearly separable (LSEP).\n\n"
        + "\n".join(lines)
        + "\n\n`lsep COMMAND --help` shows its flags; every command takes --quiet and --log-level info|warning|error."
        "\nStart with: lsep train quickstart\n"
    )


def main(argv: Args | None = None) -> int:
    """Run one command; returns the exit code, 141 (as of SIGPIPE) where the reader of its output has gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files and classes that the locale has no letters for
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return run_command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141


def run_command(argv: Args) -> int:
    """As `main`, with its output as it is."""
    try:
        argv = take_flags(argv)
    except UserError as error:
        print(f"lsep: error: {error}", file=sys.stderr)
        return 2
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0
    if argv[0] == "--version":
        from lsep import __version__

        print(f"lsep {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"command {argv[0]!r} is unknown{nearest(argv[0], list(COMMANDS))}")
        COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"lsep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # A file where a folder is wanted, a name too long, and the like; without a name it is nothing of the user's.
        if error.errno not in DISK and error.filename is None:
            raise
        print(f"lsep: error: {error.filename or 'writing a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        clause = out_of_memory(error)
        if clause is None:
            raise
        print(f"lsep: error: {clause}: use a smaller batch size, see lsep {argv[0]} --help", file=sys.stderr)
        return 2
    return 0
