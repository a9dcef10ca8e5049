"""Checks of a configuration: nonsense ends here, in one sentence, before anything is written.

`check` looks at the configuration alone; `resolve` fills in what the data knows (shape, classes) and checks the two
against each other.
"""

import math
from dataclasses import replace

from lsep.config import Config, ModelConfig, flat
from lsep.data.manifest import Manifest
from lsep.errors import UserError, shown
from lsep.power import NARROWEST, WIDEST

_AT_LEAST_ONE = (
    "model.depth model.hidden_size model.num_heads model.layers_per_level model.patch_size probe.depth "
    "probe.window_min probe.weight_bins probe.decay_epochs optim.accumulate data.prefetch data.threads train.steps "
    "train.batch_size train.log_every train.checkpoint_every train.max_skipped sample.steps sample.num "
    "sample.batch_size evaluate.num align.depth align.projector_dim"
).split()
_AT_LEAST_ZERO = (
    "probe.weight_start probe.weight_end optim.lr optim.probe_lr optim.weight_decay optim.warmup_steps train.seed "
    "optim.ema_snapshot_every train.keep_last train.keep_every train.sample_every train.eval_every "
    "train.overhead_rounds sample.cfg align.weight"
).split()
_PROBABILITY = "model.class_dropout_prob probe.rho sample.guidance_low sample.guidance_high".split()
_BELOW_ONE = "probe.label_smoothing optim.beta1 optim.beta2 optim.ema_decay".split()
_ABOVE_ZERO = "model.mlp_ratio interpolant.time_std optim.eps optim.clip dist.timeout".split()
_LARGEST = 2**63 - 1
_AT_MOST = {
    "model.depth": 4096, "model.hidden_size": 2**20, "model.layers_per_level": 1024, "model.mlp_ratio": 2**16,
    "model.patch_size": 2**16, "model.input_size": 2**16, "model.in_channels": 2**16, "model.num_classes": 2**31,
    "probe.weight_bins": 10**6, "align.projector_dim": 2**20, "align.width": 2**20, "align.image_size": 2**16,
    "data.threads": 4096, "data.prefetch": 10**6, "train.overhead_rounds": 10**6, "sample.steps": 10**6,
    "sample.num": 10**8, "sample.batch_size": 10**6, "evaluate.num": 10**8,
}  # fmt: skip
"""What more of would only fail later, for want of memory or time; all other numbers fit 64 bits."""
_OF_SIT = (
    "model.mlp_ratio model.qk_norm probe.pool_before_fc2 train.fp32_residual train.fp8 train.memory backend.attention "
    "backend.modulation backend.mlp"
).split()
"""What only a SiT has; a U-Net is refused with other values than the defaults."""
_LEVELS = 16
"""Levels of a U-Net, at most."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(config: Config) -> None:
    """Raise UserError on the first value, or combination of values, that cannot be meant."""
    values = flat(config)
    for name, value in values.items():
        if isinstance(value, int | float):
            most = _AT_MOST.get(name, _LARGEST)
            _require(value == value and abs(value) != math.inf, f"{_flag(name)} is {value}, expected a finite number")
            _require(abs(value) <= most, f"{_flag(name)} is {shown(value)}, expected at most {most:,}")
    for names, fits, wanted in (
        (_AT_LEAST_ONE, lambda v: v >= 1, "at least 1"),
        (_AT_LEAST_ZERO, lambda v: v >= 0, "at least 0"),
        (_PROBABILITY, lambda v: 0 <= v <= 1, "from 0 to 1"),
        (_BELOW_ONE, lambda v: 0 <= v < 1, "from 0 to below 1"),
        (_ABOVE_ZERO, lambda v: v > 0, "above 0"),
    ):
        for name in names:
            _require(fits(values[name]), f"{_flag(name)} is {values[name]}, expected {wanted}")
    m, train = config.model, config.train
    _require(
        m.hidden_size % m.num_heads == 0,
        f"--model.num-heads is {m.num_heads}, expected a divisor of --model.hidden-size {m.hidden_size}",
    )
    if m.backbone == "unet":
        _check_unet(config)
    else:
        _check_sit(config)
    _require(
        train.batch_size % config.optim.accumulate == 0,
        f"--train.batch-size {train.batch_size} is not divisible by --optim.accumulate {config.optim.accumulate}",
    )
    replicate = config.dist.replicate
    _require(replicate is None or replicate >= 1, f"--dist.replicate is {replicate}, expected None or at least 1")
    _require(train.spike_factor > 1, f"--train.spike-factor is {train.spike_factor}, expected above 1")
    _require(
        config.sample.guidance_low <= config.sample.guidance_high,
        f"--sample.guidance-low is {config.sample.guidance_low}, expected at most --sample.guidance-high "
        f"{config.sample.guidance_high}",
    )
    _check_draws(config)
    _check_averages(config)
    if config.probe.enabled:
        _check_probe(config)
    _check_align(config)


def _check_draws(config: Config) -> None:
    """How times are drawn, and what guidance acts on."""
    channels, of = config.sample.cfg_channels, config.model.in_channels
    _require(
        channels is None or 1 <= channels <= (of or channels),
        f"--sample.cfg-channels is {channels}, expected None or {f'from 1 to {of}' if of else 'at least 1'}, as the "
        "model's channels",
    )
    _require(
        config.interpolant.time != "lognormal" or config.interpolant.path != "vp",
        "--interpolant.time is 'lognormal' with --interpolant.path vp, whose noise over data has an end, expected "
        "'uniform' or 'logit-normal'",
    )


def _check_averages(config: Config) -> None:
    optim = config.optim
    for flag, values, fits, wanted in (
        ("--optim.ema-extra", optim.ema_extra, lambda v: 0 <= v < 1, "from 0 to below 1"),
        (
            "--optim.ema-profiles",
            optim.ema_profiles,
            lambda v: NARROWEST <= v <= WIDEST,
            f"from {NARROWEST} to {WIDEST}",
        ),
    ):
        for value in values:
            _require(fits(value), f"{flag} holds {value}, expected numbers {wanted}")
            _require(values.count(value) == 1, f"{flag} holds {value} {values.count(value)} times, expected once")
    _require(
        optim.ema_snapshot_every == 0 or len(optim.ema_profiles) > 0,
        f"--optim.ema-snapshot-every is {optim.ema_snapshot_every} without --optim.ema-profiles, which it copies",
    )


def _check_align(config: Config) -> None:
    a = config.align
    _require(
        a.encoder is None or a.features is None,
        f"--align.encoder is {shown(a.encoder)} and --align.features {shown(a.features)}, expected one of them",
    )
    for name in ("images", "image_size"):
        value = getattr(a, name)
        _require(
            value is None or a.encoder is not None,
            f"{_flag('align.' + name)} is {shown(value)} without --align.encoder, which it is for",
        )
    _require(
        a.image_size is None or a.images is not None,
        f"--align.image-size is {a.image_size} without --align.images, which it is for",
    )
    for name in ("image_size", "width"):
        value = getattr(a, name)
        _require(value is None or value >= 1, f"{_flag('align.' + name)} is {value}, expected None or at least 1")
    if a.enabled:
        _check_depth(config, "--align.depth", a.depth, "what is aligned of a U-Net is its mid-block")


def _check_depth(config: Config, flag: str, depth: int, why: str) -> None:
    """`why` is said of a U-Net, which has features at one depth only."""
    if config.model.backbone == "unet":
        _require(depth == 1, f"{flag} is {depth}, expected 1: {why}")
    never = ", which is its default" if depth == flat(Config())[flag.removeprefix("--")] else ""
    _require(
        depth <= config.probe_depths,
        f"{flag} is {depth}{never}, expected at most the model's {config.model.depth} blocks",
    )


def _check_sit(config: Config) -> None:
    m, levels = config.model, ModelConfig().layers_per_level
    _require(
        m.hidden_size % 4 == 0,
        f"--model.hidden-size is {m.hidden_size}, expected a multiple of 4 (2-D sine and cosine positions)",
    )
    _require(
        int(m.hidden_size * m.mlp_ratio) >= 1,
        f"--model.mlp-ratio is {m.mlp_ratio}, which leaves the MLP no hidden width, expected at least 1 / "
        f"--model.hidden-size = {1 / m.hidden_size:.3g}",
    )
    _require(
        m.layers_per_level == levels,
        f"--model.layers-per-level is {m.layers_per_level}, expected its default {levels}: --model.backbone is "
        f"{m.backbone!r}, and only a U-Net has levels",
    )


def _check_unet(config: Config) -> None:
    m, values, defaults = config.model, flat(config), flat(Config())
    for name in _OF_SIT:
        # A run that goes on has what the default, auto, was for it.
        same = values[name] == defaults[name] or (name, values[name]) == ("train.memory", "keep")
        _require(
            same,
            f"{_flag(name)} is {values[name]!r}, expected its default {defaults[name]!r} with --model.backbone unet",
        )
    _require(m.patch_size == 1, f"--model.patch-size is {m.patch_size}, expected 1: a U-Net has no patches")
    _require(m.depth <= _LEVELS, f"--model.depth is {m.depth}, expected at most {_LEVELS} levels of a U-Net")
    # Groups of its norms: 32, or of 4 channels where the first level, a whole part of all others, has fewer than 128.
    shrink = 2 ** (m.depth - 1)
    unit = shrink * (4 if m.hidden_size < 128 * shrink else 32)
    _require(
        m.hidden_size % unit == 0,
        f"--model.hidden-size is {m.hidden_size}, expected a multiple of {unit} for the norms of a U-Net of {m.depth} "
        "levels",
    )
    _require(
        config.dist.mode == "ddp",
        f"--dist.mode is {config.dist.mode!r}, expected 'ddp': the weights of a U-Net are not sharded",
    )


def _check_probe(config: Config) -> None:
    p, drop = config.probe, config.model.class_dropout_prob
    _check_depth(config, "--probe.depth", p.depth, "the probe of a U-Net reads its mid-block")
    _require(
        p.weight_bins > 1 or p.weight_start == p.weight_end,
        f"--probe.weight-bins is 1, so the weight is constant, but --probe.weight-start is {p.weight_start} and "
        f"--probe.weight-end {p.weight_end}",
    )
    _require(p.end_step is None or p.end_step >= 0, f"--probe.end-step is {p.end_step}, expected None or at least 0")
    _require(
        p.decay_start_epoch is None or p.decay_start_epoch >= 0,
        f"--probe.decay-start-epoch is {p.decay_start_epoch}, expected None or at least 0",
    )
    if p.branch == "paper":
        _require(
            p.extra_fraction is None,
            f"--probe.extra-fraction is {p.extra_fraction}, expected None with --probe.branch paper",
        )
        return
    if config.model.conditional:
        _require(
            p.rho >= drop,
            f"--probe.rho is {p.rho}, expected at least --model.class-dropout-prob {drop} with --probe.branch shared "
            f"(use --probe.branch paper for less)",
        )
    e = p.extra_fraction
    _require(
        # 1e-9: 0.9 - 0.1 is not 0.8 in floating point
        e is None or 0 <= e <= p.rho - drop + 1e-9,
        f"--probe.extra-fraction is {e}, expected from 0 to rho - p = {p.rho - drop:.6g}",
    )


def resolve(config: Config, manifest: Manifest) -> Config:
    """Fill the model's shape and classes from the data, check one against the other; returns the whole."""
    if not manifest.labelled:  # nothing to condition on, and nothing for a probe to find
        config = replace(
            config, model=replace(config.model, conditional=False), probe=replace(config.probe, enabled=False)
        )
    check(config)
    channels, height, width = manifest.shape
    _require(height == width, f"{manifest.source}: images are {height} x {width}, expected squares")
    found = {"input_size": height, "in_channels": channels, "num_classes": manifest.num_classes}
    for name, value in found.items():
        wanted = getattr(config.model, name)
        _require(
            wanted is None or wanted == value,
            f"{_flag('model.' + name)} is {wanted}, but the data at {manifest.source} has {value}",
        )
    config = replace(
        config, model=replace(config.model, input_size=height, in_channels=channels, num_classes=manifest.num_classes)
    )
    _require(
        height % config.model.patch_size == 0,
        f"--model.patch-size is {config.model.patch_size}, expected a divisor of the data's side {height}",
    )
    _check_draws(config)
    if config.model.backbone == "unet":
        depth, unit = config.model.depth, 2 ** (config.model.depth - 1)
        _require(
            height % unit == 0,
            f"--model.depth is {depth}, whose levels halve a side {depth - 1} times, but the data's is {height}, "
            f"expected a multiple of {unit}",
        )
    _require(
        manifest.rows >= config.train.batch_size,
        f"--train.batch-size is {config.train.batch_size}, but {manifest.source} has only {manifest.rows} images",
    )
    if config.probe.enabled:
        p, grid = config.probe, config.grid
        largest = grid if p.window_max is None else p.window_max
        side = "mid-block's side" if config.model.backbone == "unet" else "token grid's side"
        name = "window-min" if p.window_min > grid else "window-max"
        _require(
            max(p.window_min, largest) <= grid,
            f"--probe.{name} is {max(p.window_min, largest)}, expected at most the {side} {grid}",
        )
        _require(
            p.window_min <= largest, f"--probe.window-max is {largest}, expected at least window-min {p.window_min}"
        )
        config = replace(config, probe=replace(p, window_max=largest))
    return config


def require_classes(config: Config, manifest: Manifest) -> None:
    """Raise UserError where a run that begins has a probe and nothing to tell apart."""
    _require(
        not config.probe.enabled or manifest.probe_classes > 1,
        f"--probe.enabled is True, but {manifest.source} has one class, of which a probe's loss is always 0, at half "
        "again the time: expected --probe.no-enabled, or data of several classes",
    )


def resolve_align(config: Config, tokens: tuple[int, int] | None) -> Config:
    """Fill the width of an encoder's tokens; `tokens` is their width and number, None without alignment."""
    if tokens is None:
        return config
    width, count = tokens
    a = config.align
    _require(a.width in (None, width), f"--align.width is {a.width}, but the encoder's tokens have {width}")
    _require(
        count == config.grid**2,
        f"--align.features has {count} tokens an image, expected {config.grid**2} as the model",
    )
    return replace(config, align=replace(a, width=width))
