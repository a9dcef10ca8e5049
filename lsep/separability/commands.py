"""`lsep probe RUN [RUN ...]`: flags, checks before anything is computed, the table, `probe.json` and the page."""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lsep.arguments import Args, first_arguments, parse
from lsep.errors import UserError, shown

if TYPE_CHECKING:
    from lsep.config import Config
    from lsep.data.manifest import Manifest, Source
    from lsep.run import Run
    from lsep.separability.encoder import Encode
    from lsep.separability.measure import Settings
    from lsep.separability.page import Measured

LEAST_TESTS = 12
"""Images that test a probe, at least: CKNNA needs more than its ten neighbours."""


@dataclass(frozen=True)
class ProbeArgs:
    """Flags of `lsep probe`."""

    depths: tuple[int, ...] | None = None
    """Blocks whose output is probed, counted from 1; all when not given. 1 for a U-Net, whose mid-block it is."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times t, from 0 (data) to 1 (noise)."""
    num: int = 10_000
    """Images of a seed, a third of them for testing; all where there are fewer."""
    seeds: int = 3
    """Seeds 0, 1, ... of split, noise, windows and tokens; mean and spread are over them."""
    test_data: str | None = None
    """A store to test on, or `digits`; without it a part of the run's data is held out from the probes alone: the
    denoiser has seen it in training."""
    data: str | None = None
    """The run's data, where it has moved."""
    tokens: int = 20_000
    """Tokens that train a per-token probe, at most."""
    l2: tuple[float, ...] = (1e-4,)
    """Weight of the squared weights in the classifier's loss, on features of variance 1; of several, each probe takes
    the one that does best on a fifth of its training images."""
    encoder: str | None = None
    """Encoder to compare with by CKA and CKNNA, module:function or path/file.py:function: uint8 images (N, H, W, C) to
    features (N, E)."""
    encoder_features: Path | None = None
    """The same from a file: arr_0 (rows, E) of an .npz, one row for each of the data that tests."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest when not given."""
    batch_size: int = 64
    """Images whose features are extracted at once."""
    memory: float = 8.0
    """Most gigabytes of features to keep; what needs more is refused before anything is computed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one."""
    out: Path | None = None
    """Folder of probe.json, probe.html and the figures; RUN/probe when not given, needed for several runs."""
    json: bool = False
    """Print probe.json instead of the table."""


def main(argv: Args) -> None:
    """Probe the runs that stand before the flags."""
    count = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    paths, argv = first_arguments("probe", ("RUN",) * max(count, 1), argv)
    text = (
        "Linear separability of trained models' features by depth and t: accuracy of linear probes on the pooled "
        "tokens, on a random window and on every token, without a label in the conditioning.\n\n"
        "Example: lsep probe runs/quickstart --times 0.1 0.5 0.9 --seeds 3"
    )
    args: ProbeArgs = parse(ProbeArgs, argv, "lsep probe RUN [RUN ...]", text)
    _check(args)

    from lsep.run import Run, write_atomic
    from lsep.separability import page
    from lsep.step import pick_device

    device = pick_device(args.device)
    runs = [Run.existing(path) for path in paths]
    out = _out(args, runs)
    sources, test_source = _open_data(args, runs)
    encode = _encoder(args, test_source or sources[0], device)
    settings = [_settings(args, run, source, test_source, encode) for run, source in zip(runs, sources, strict=True)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be a folder ({error.strerror}), expected one") from None
    measured = [
        _measure(args, name, run, source, test_source, setting, encode)
        for name, run, source, setting in zip(_names(runs), runs, sources, settings, strict=True)
    ]
    values = json.dumps(_as_json(args, measured, runs), indent=1)
    write_atomic(out / "probe.json", values + "\n")
    written = page.write(measured, out)
    print(values if args.json else "\n\n".join([*map(_table, measured), f"page: {written[0]}"]))


def _check(args: ProbeArgs) -> None:
    """Raise UserError for flags that cannot be meant."""

    def require(ok: bool, flag: str, wanted: str) -> None:
        if not ok:
            value = getattr(args, flag.replace("-", "_"))
            raise UserError(f"--{flag} is {shown(value)}, expected {wanted}")

    require(bool(args.times) and all(0 <= t <= 1 for t in args.times), "times", "numbers from 0 to 1")
    for flag, least in (("num", 3 * LEAST_TESTS), ("seeds", 1), ("tokens", 100), ("batch-size", 1)):
        require(least <= getattr(args, flag.replace("-", "_")) < 2**31, flag, f"at least {least}")
    # At 0 separable features have no optimum.
    require(bool(args.l2) and all(0 < value < 1e6 for value in args.l2), "l2", "numbers above 0")
    require(0 < args.memory < 1e9, "memory", "gigabytes above 0")
    for flag in ("times", "depths"):
        values = getattr(args, flag) or ()
        require(len(set(values)) == len(values), flag, "each value once")
    require(args.encoder is None or args.encoder_features is None, "encoder", "no --encoder-features beside it")


def _out(args: ProbeArgs, runs: list["Run"]) -> Path:
    if args.out is None and len(runs) > 1:
        raise UserError(f"--out is missing, expected a folder for the page of {len(runs)} runs")
    return args.out or runs[0].path / "probe"


def _names(runs: list["Run"]) -> list[str]:
    """The runs' folder names, or, where two are alike, their whole paths; numbered where these are alike too."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    many = Counter(names)
    return [name if many[name] == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


_SAME = ("kind", "shape", "num_classes", "probe_classes", "scale", "shift")


def _differences(a: "Manifest", b: "Manifest", fields: tuple[str, ...]) -> list[str]:
    return [f"{k} {shown(getattr(a, k))} and {shown(getattr(b, k))}" for k in fields if getattr(a, k) != getattr(b, k)]


def _open_data(args: ProbeArgs, runs: list["Run"]) -> tuple[list["Source"], "Source | None"]:
    """The data of each run, and that of --test-data; all runs must have seen the same."""
    manifests = [run.manifest() for run in runs]
    for run, manifest in zip(runs[1:], manifests[1:], strict=True):
        changed = _differences(manifests[0], manifest, (*_SAME, "rows"))
        if changed:
            raise UserError(
                f"{runs[0].path} and {run.path} have different data ({'; '.join(changed)}), expected the same"
            )
    sources = [_open_own(args.data, run, manifest) for run, manifest in zip(runs, manifests, strict=True)]
    if args.test_data is None:
        return sources, None
    test = _open("--test-data", args.test_data, runs[0].config())
    changed = _differences(manifests[0], test.manifest, _SAME)
    if changed:
        raise UserError(f"--test-data {args.test_data}: other data than the run's ({'; '.join(changed)})")
    if test.manifest.source in {manifest.source for manifest in (*manifests, *(s.manifest for s in sources))}:
        raise UserError(f"--test-data {args.test_data} is what the run was trained on, expected a set that it was not")
    return sources, test


def _open_own(moved: str | None, run: "Run", manifest: "Manifest") -> "Source":
    config = run.config()
    if moved is not None:
        source = _open("--data", moved, config)
    else:
        # The manifest has the whole path, the configuration what was typed.
        path = "digits" if config.data.path == "digits" else manifest.source
        if path != "digits" and not Path(path, "manifest.json").is_file():
            raise UserError(f"{run.path}: its data is not at {path} any more, expected --data with its place now")
        source = _open(str(run.path), path, config)
    changed = _differences(manifest, source.manifest, (*_SAME, "rows"))
    if changed:
        raise UserError(f"{source.manifest.source} is not the data of {run.path} ({'; '.join(changed)})")
    return source


def _open(where: str, path: str, config: "Config") -> "Source":
    from lsep.data.loader import open_source

    try:
        source = open_source(replace(config.data, path=path))
        if not source.manifest.labelled:
            raise UserError(f"{path} has no labels, expected data with classes")
        return source
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--data.path ')}") from None


def _encoder(args: ProbeArgs, source: "Source", device: Any) -> "Encode | None":
    from lsep.separability import encoder

    if args.encoder is not None:
        return encoder.from_function(args.encoder, source, device, args.batch_size)
    if args.encoder_features is not None:
        return encoder.from_file(args.encoder_features, source, device)
    return None


def _settings(
    args: ProbeArgs, run: "Run", source: "Source", test_source: "Source | None", encode: "Encode | None"
) -> "Settings":
    """What is measured on a run; raises UserError where that is not possible or takes more memory than --memory."""
    from lsep.backbone import require
    from lsep.checkpoint import find
    from lsep.separability.features import split
    from lsep.separability.measure import Settings, cached_bytes

    config = run.config()
    require(config)
    find(run.checkpoints, args.checkpoint)
    last = config.probe_depths
    depths = args.depths or tuple(range(1, last + 1))
    for depth in depths:
        if not 1 <= depth <= last:
            has = f"{last} blocks, expected from 1 to {last}"
            if config.model.backbone == "unet":
                has = "features in its mid-block alone, expected 1"
            raise UserError(f"--depths holds {depth}, but {run.path} has {has}")
    settings = Settings(
        tuple(sorted(depths)), tuple(sorted(args.times)), args.num, args.seeds, args.tokens, args.l2, args.batch_size
    )
    train, test = (len(part.ids) for part in split(source, args.num, 0, test_source))
    if test < LEAST_TESTS:
        where = (test_source or source).manifest.source
        raise UserError(f"{where}: leaves {test} images to test a probe, expected at least {LEAST_TESTS}")
    needed = cached_bytes(config, settings, train, test, encode is not None) / 1e9
    if needed > args.memory:
        raise UserError(
            f"--memory is {args.memory:g} GB, but the features of {run.path} take {needed:.3g}: expected that much, "
            "fewer --depths, or smaller --num and --tokens"
        )
    print(
        f"{run.path}: {len(depths)} depths, {len(args.times)} times, {train} + {test} images of each seed "
        f"(--seeds {args.seeds}), {needed * 1e3:,.0f} MB of features",
        file=sys.stderr,
    )
    return settings


def _measure(
    args: ProbeArgs, name: str, run: "Run", source: "Source", test_source: "Source | None", settings: "Settings",
    encode: "Encode | None",
) -> "Measured":  # fmt: skip
    from tqdm import tqdm

    from lsep.sample import load_ema
    from lsep.separability.features import split
    from lsep.separability.measure import Subject, measure
    from lsep.separability.page import Measured
    from lsep.step import pick_device

    device = pick_device(args.device)
    model, config, _, step = load_ema(run, args.checkpoint, device.type)
    images = sum(len(part.ids) for part in split(source, args.num, 0, test_source)) * args.seeds * len(args.times)
    with tqdm(total=images, unit="image", desc=name, disable=not sys.stderr.isatty()) as bar:
        subject = Subject(f"{run.path} at step {step}", model, config, source, test_source, device, encode)
        figures = measure(subject, settings, bar.update)
    depth = config.probe.depth if config.probe.enabled else None
    return Measured(name, step, depth, test_source is None, figures)


def _table(m: "Measured") -> str:
    """Percent, mean and standard deviation over seeds: a row for each kind and depth, a column for each t."""
    f = m.figures
    lines = [f"{m.name}: {m.about}"]
    if f.not_converged:
        lines.append(f"{f.not_converged} probes did not reach their optimum: try a larger --l2")
    for kind, values in (f.accuracy | f.alike).items():
        percent = kind in f.accuracy
        lines.append(f"{kind + (', %' if percent else ''):14}" + "".join(f"{f't={t:g}':>13}" for t in f.times))
        for depth, row in zip(f.depths, values.transpose(1, 2, 0), strict=True):
            lines.append(f"  depth {depth:<6}" + "".join(f"{_mean_and_spread(v, percent):>13}" for v in row))
    return "\n".join(lines)


def _mean_and_spread(values: Any, percent: bool) -> str:
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{values.mean() * factor:.{digits}f}"
    return text if len(values) == 1 else f"{text} ±{values.std(ddof=1) * factor:.{digits}f}"


def _as_json(args: ProbeArgs, measured: list["Measured"], runs: list["Run"]) -> dict[str, Any]:
    """All figures; arrays are (seeds, depths, times), the token map (depths, times, rows, columns)."""

    def described(m: "Measured", run: "Run") -> dict[str, Any]:
        f = m.figures
        return {
            "run": str(run.path), "name": m.name, "step": m.step, "lsep_depth": m.probe_depth,
            "depths": f.depths, "times": f.times, "train_images": f.rows[0], "test_images": f.rows[1],
            "train_tokens": f.tokens, "test_images_seen_in_training": m.seen, "most_common_class": f.chance,
            "not_converged": f.not_converged, "accuracy": {k: v.tolist() for k, v in f.accuracy.items()},
            "token_map": f.token_map.tolist(), "l2": {k: v.tolist() for k, v in f.l2.items()},
            **{k: v.tolist() for k, v in f.alike.items()},
        }  # fmt: skip

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items() if k not in ("json", "out")}
    return {"settings": settings, "runs": [described(m, run) for m, run in zip(measured, runs, strict=True)]}
