"""What `lsep plan` prints: memory, time and price of a run, on cards that need not be here. All of it is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lsep import backends
from lsep.backends import Choice
from lsep.checks import check, resolve
from lsep.config import Config
from lsep.cost.cards import Known
from lsep.cost.cluster import MODES, Cluster, Work, late_parameters
from lsep.cost.fit import POLICIES, Fit, fit, free_of, needed, own_part
from lsep.cost.memory import step_memory, unmodelled
from lsep.cost.parameters import parameters
from lsep.cost.step import Part, seconds, split, step_time
from lsep.data.manifest import Manifest
from lsep.errors import UserError

IMAGENET = Manifest("ImageNet's latents, assumed", "moments", (4, 32, 32), 1_281_167, 1000, 1000)
"""What a configuration without data is planned for."""

SHOWN = 20_000_000
"""Bytes of a part that has a line of its own."""


@dataclass(frozen=True)
class Request:
    """What is planned."""

    preset: str
    config: Config
    known: Known
    gpus: int = 1
    hour: float | None = None
    """Price of a GPU for an hour."""


def sheet(request: Request) -> str:
    """The page, or one sentence on what is not modelled; raises UserError for what cannot run."""
    config, classes = _resolved(request.config)
    if request.gpus < 1 or config.train.batch_size % (config.optim.accumulate * request.gpus):
        raise UserError(
            f"--gpus is {request.gpus}, expected a number that divides --train.batch-size {config.train.batch_size} "
            f"with --optim.accumulate {config.optim.accumulate}"
        )
    if request.hour is not None and not 0 <= request.hour < math.inf:
        raise UserError(f"--hours-price is {request.hour:g}, expected a price of at least 0")
    why = unmodelled(config, request.known.card, request.gpus)
    if why is not None:
        return f"{request.preset}: {why}\n"
    found = fit(config, request.known.card, classes, free_of(request.known.memory), request.gpus)
    asked = config if config.train.memory in POLICIES else replace(config, train=replace(config.train, memory="keep"))
    free = free_of(request.known.memory)
    lines = [f"lsep plan {request.preset}: every number is computed, none was measured", ""]
    lines += [*_memory(request, asked, classes, free), "", *_fits(found, asked, free)]
    runs = asked
    if not _as_asked(found, asked):
        if found.chosen is None:
            return "\n".join([*lines, ""])
        runs = found.chosen.applied(config)
        lines += ["", _described(request, runs, backends.decide(runs, request.known.card, request.gpus))]
    return "\n".join([*lines, "", *_time(request, runs, classes), ""])


def _resolved(config: Config) -> tuple[Config, int]:
    """The configuration with what its data says, or ImageNet's latents; and the classes of the probe."""
    check(config)
    if config.data.path is not None:
        from lsep.data.loader import open_source

        manifest = open_source(config.data).manifest
    else:
        m = config.model
        shape = (m.in_channels or IMAGENET.shape[0], *(m.input_size or 32,) * 2)
        classes = m.num_classes or IMAGENET.num_classes
        manifest = replace(IMAGENET, shape=shape, num_classes=classes, probe_classes=classes)
    config = resolve(config, manifest)
    if config.train.precision == "auto":
        config = replace(config, train=replace(config.train, precision="bf16"))
    if config.align.enabled and config.align.width is None:
        raise UserError("--align.width is None, and a plan opens no encoder: expected the width of its tokens")
    return config, manifest.probe_classes


def _as_asked(found: Fit, asked: Config) -> bool:
    """The setting of `asked` is one that fits."""
    return any(s.accumulate == asked.optim.accumulate and s.memory == asked.train.memory for s in found.fitting)


def _probe(config: Config) -> bool:
    return config.probe.enabled and config.probe.end_step != 0


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as text: the first column to the left, the others to the right."""
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for first, *numbers in rows:
        cells = [first.ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(numbers, sizes[1:], strict=True))]
        out.append(("  " + "  ".join(cells)).rstrip())
    return out


def _described(request: Request, config: Config, choice: Choice) -> str:
    images, parts = config.train.batch_size // request.gpus, config.optim.accumulate
    batches = f"{parts} micro-batches of {images // parts}" if parts > 1 else "one batch"
    names = [
        f"kernels {choice.kernels}", f"attention {choice.attention_by}", f"MLP {choice.mlp_by}",
        f"optimizer {choice.optimizer}", "bf16 weights" if choice.bf16_weights else "float32 weights",
        f"compile {choice.compile}", f"graphs {'on' if choice.graphs else 'off'}", config.train.memory,
    ]  # fmt: skip
    return f"{request.gpus} x {request.known.title}, {images} images a GPU in {batches}; {', '.join(names)}"


def _memory(request: Request, config: Config, classes: int, free: int) -> list[str]:
    choice = backends.decide(config, request.known.card, request.gpus)
    found = step_memory(config, choice, classes, _probe(config), request.gpus)
    peak = sum(found.values())
    total = needed(config, choice, classes, peak)
    rows = [(name, f"{size / 1e9:.2f}") for name, size in sorted(found.items(), key=lambda i: -i[1]) if size >= SHOWN]
    rows.append(("all else", f"{sum(size for size in found.values() if size < SHOWN) / 1e9:.2f}"))
    rows += [
        ("peak of the step", f"{peak / 1e9:.2f}"), ("with what the allocator reserves beyond it", f"{total / 1e9:.2f}"),
        (f"free on the card, of {request.known.memory / 1e9:.1f}", f"{free / 1e9:.2f}"),
    ]  # fmt: skip
    return [
        _described(request, config, choice),
        "",
        "memory at the peak of a step, GB (10^9 bytes), computed",
        *_columns(rows),
    ]


def _fits(found: Fit, asked: Config, free: int) -> list[str]:
    if _as_asked(found, asked):
        return ["it fits, computed"]
    if found.chosen is None:
        least = found.least
        return [
            f"nothing fits: {least.flags} needs least, {least.needed / 1e9:.2f} GB of {free / 1e9:.2f}, computed"
        ]  # fmt: skip
    rows = [(s.flags, f"{s.needed / 1e9:.2f} GB", f"{1e3 * s.seconds:.0f} ms") for s in found.different]
    return ["it does not fit; what does, the cheapest first, with GB and ms a step, computed", *_columns(rows)]


def _time(request: Request, config: Config, classes: int) -> list[str]:
    own, choice = own_part(config, request.gpus), backends.decide(config, request.known.card, request.gpus)
    parts = step_time(own, choice, classes, request.known, _probe(config))
    exchange = _exchange(request, config, classes, parts)
    if exchange is not None:
        parts.append(exchange)
    notes = list(dict.fromkeys(p.rests_on for p in parts))
    rows = [("", "floor", "ms", "rests on")]
    rows += [
        (p.name, f"{1e3 * p.floor:.2f}", f"{1e3 * p.seconds:.2f}", f"[{notes.index(p.rests_on) + 1}]") for p in parts
    ]
    rows.append(("step", f"{1e3 * sum(p.floor for p in parts):.2f}", f"{1e3 * seconds(parts):.2f}", ""))
    table = [*_columns(rows), *(f"  [{i}] {note}" for i, note in enumerate(notes, 1))]
    title = ["milliseconds of a step by part, computed, its floor and what it rests on"]
    return [*title, *table, "", *_run(request, config, classes, parts)]


def _exchange(request: Request, config: Config, classes: int, parts: list[Part]) -> Part | None:
    """What the average of the gradients takes beyond the backward."""
    if request.gpus == 1:
        return None
    count, (forward, backward) = parameters(config, classes).total, split(parts)
    late = late_parameters(config) if config.backend.modulation == "joint" else 0
    reduce = 2 if backends.decide(config, request.known.card, request.gpus).bf16_weights else 4
    reduce = {"bf16": 2, "fp32": 4}.get(config.dist.reduce, reduce)
    cluster = Cluster(reduce=reduce)
    hidden, _ = MODES[config.dist.mode](
        cluster, Work(forward, backward, count, late, config.model.depth + 1), request.gpus
    )
    rests_on = (
        f"assumed: {cluster.nvlink / 1e9:.0f} GB/s in a node of {cluster.per_node}, "
        f"{cluster.network / 1e9:.0f} GB/s a GPU between nodes"
    )
    return Part("exchange of gradients, not hidden", 0.0, hidden, rests_on)


def _run(request: Request, config: Config, classes: int, parts: list[Part]) -> list[str]:
    """Throughput, hours and price of the whole run."""
    train, end = config.train, config.probe.end_step
    with_probe = min(end, train.steps) if config.probe.enabled and end else train.steps
    step = seconds(parts)
    after = step
    if with_probe < train.steps:
        own, choice = own_part(config, request.gpus), backends.decide(config, request.known.card, request.gpus)
        exchange = sum(p.seconds for p in parts if p.name.startswith("exchange"))
        after = seconds(step_time(own, choice, classes, request.known, probe=False)) + exchange
    # Weights, average and moments in float32 go to the host at each checkpoint; the disk is behind the training's back.
    staging = 16 * parameters(config, classes).total / Cluster().host_copy / train.checkpoint_every
    hours = (with_probe * step + (train.steps - with_probe) * after + train.steps * staging) / 3600
    rate = train.batch_size / step
    lines = [
        f"{rate:,.0f} images/s, {rate / request.gpus:,.0f} a GPU, computed; loader and host are taken to keep up",
        f"{train.steps:,} steps: {hours:,.1f} hours on {request.gpus} x {request.known.title}, computed; without "
        "samples and evaluation",
    ]
    if with_probe < train.steps:
        lines.append(f"the probe ends after {with_probe:,} steps, from there {1e3 * after:.2f} ms a step, computed")
    if request.hour is not None:
        price = hours * request.gpus * request.hour
        lines.append(f"{price:,.0f} at {request.hour:g} a GPU and hour, computed")
    return lines
