"""The command `lsep probe`; heavy imports inside."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lsep.arguments import Args, parse, wants_help
from lsep.errors import UserError

if TYPE_CHECKING:
    from lsep.separability.measure import Encoder


@dataclass(frozen=True)
class ProbeArgs:
    """Flags of `lsep probe`."""

    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times from 0 (data) to 1 (noise) at which features are taken."""
    depths: tuple[int, ...] | None = None
    """Blocks, counted from 1; all when not given."""
    seeds: int = 3
    """Repetitions with other noise, windows and parts of the data."""
    num: int = 10_000
    """Images, for fitting and judging together."""
    test_share: float = 0.2
    """Share of them that probes are judged on."""
    data: Path | None = None
    """A store to take the images from; the run's own data when not given."""
    test_data: Path | None = None
    """A store of held-out images to judge on; otherwise a part of the run's data, which the denoiser has seen."""
    encoder: str | None = None
    """An extractor of images (MODULE:FUNCTION or FILE.py:FUNCTION) whose features are compared by CKA and CKNNA."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest when not given."""
    batch_size: int = 256
    """Images whose features are taken at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where features are taken; auto takes a GPU when there is one."""
    out: Path | None = None
    """Folder of probe.json, pictures and page; the first RUN's `probe` when not given."""


def main(argv: Args) -> None:
    """Probe the runs that come first in `argv`."""
    count = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    paths, flags = argv[:count], argv[count:]
    if not paths and not wants_help(argv):
        raise UserError("lsep probe: expected RUN ... first, then flags; found nothing")
    text = (
        "Fit linear probes to a run's features, by depth and time.\n\n"
        "Example: lsep probe runs/quickstart runs/plain --times 0.2 0.5 --seeds 2"
    )
    args: ProbeArgs = parse(ProbeArgs, flags, "lsep probe RUN ...", text)
    _check(args)

    from lsep.run import Run
    from lsep.sample import load_ema
    from lsep.separability import page
    from lsep.separability.measure import Settings, measure
    from lsep.step import pick_device

    device = pick_device(args.device).type
    settings = Settings(args.times, args.depths, args.seeds, args.num, args.test_share, args.batch_size)
    runs = [Run.existing(path) for path in paths]
    kinds = {(m.kind, m.shape, m.probe_classes) for m in (run.manifest() for run in runs)}
    if len(kinds) > 1:
        raise UserError(f"{runs[0].path} and {runs[-1].path} have other data, expected runs of one kind side by side")
    depths = {run.config().model.depth for run in runs}
    if len(depths) > 1 and args.depths is None:
        raise UserError(f"the runs have {min(depths)} and {max(depths)} blocks, expected --depths, which all have")
    found = []
    for run, name in zip(runs, _names(runs), strict=True):
        model, config, manifest, step = load_ema(run, args.checkpoint, device)
        source = _source(args.data or config.data.path, manifest, run)
        test = None if args.test_data is None else _source(args.test_data, manifest, run)
        encoder = None if args.encoder is None else _encoder(args.encoder, manifest, device)
        found.append(measure(name, model, config, manifest, step, source, test, settings, encoder))
    print(page.table(found))
    for file in page.write(found, args.out or runs[0].path / "probe"):
        print(file)


def _check(args: ProbeArgs) -> None:
    for name in ("seeds", "num", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    for t in args.times:
        if not 0 <= t <= 1:
            raise UserError(f"--times holds {t}, expected from 0 to 1")
    if not 0 < args.test_share < 1:
        raise UserError(f"--test-share is {args.test_share}, expected above 0 and below 1")


def _names(runs: list[Any]) -> list[str]:
    """The runs' folders, with what comes before where two are alike."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _source(path: Path | str | None, manifest: Any, run: Any) -> Any:
    """The data at `path`, which must be of the kind that the run was trained on."""
    from lsep.config import DataConfig
    from lsep.data.loader import open_source

    if path is None:
        raise UserError(f"{run.path}: its data is not known, expected --data with a store")
    source = open_source(DataConfig(path=str(path)))
    for name in ("kind", "shape", "probe_classes", "scale", "shift"):
        own, there = getattr(manifest, name), getattr(source.manifest, name)
        if own != there:
            raise UserError(f"{path}: {name} is {there}, and {run.path} was trained on {own}")
    return source


def _encoder(name: str, manifest: Any, device: str) -> "Encoder":
    """The extractor `name` over images of a data set."""
    import numpy as np
    import torch

    from lsep.evaluate.features import open_extractor

    if manifest.kind != "pixels":
        raise UserError(f"--encoder {name} takes images, but the data holds {manifest.kind}")
    extractor = open_extractor(name, None, "fp32", torch.device(device))

    def features(source: Any, ids: Any) -> torch.Tensor:
        images = np.ascontiguousarray(source.read(ids).x.transpose(0, 2, 3, 1))
        return torch.cat([extractor(images[i : i + 256]).features.cpu() for i in range(0, len(images), 256)])

    return features
