"""The presets: the quickstart, and the paper's SiTs on ImageNet. Nothing here imports torch."""

from dataclasses import replace

from lsep.config import Config, DataConfig, ModelConfig, OptimConfig, ProbeConfig, SampleConfig, TrainConfig
from lsep.errors import UserError, nearest

# depth, width, heads and probe depth. The paper gives the probe's depth for XL; the others keep about its share.
_SIZES = {"s": (12, 384, 6, 4), "b": (12, 768, 12, 4), "l": (24, 1024, 16, 8), "xl": (28, 1152, 16, 8)}
_IMAGENET_EPOCH = 1_281_167 // 256  # steps


def _sit(size: str, patch: int, pixels: int) -> Config:
    """SiT-size/patch on VAE latents of ImageNet at `pixels`, as in the paper's reported runs."""
    depth, width, heads, probe_depth = _SIZES[size]
    input_size = pixels // 8
    grid = input_size // patch
    epochs = {("xl", 256): 800, ("xl", 512): 240}.get((size, pixels), 80)
    return Config(
        model=ModelConfig(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch, input_size=input_size),
        probe=ProbeConfig(depth=probe_depth, window_min=grid * 3 // 4),
        optim=OptimConfig(probe_lr=3e-2 if size == "b" else 1e-4),
        train=TrainConfig(steps=epochs * _IMAGENET_EPOCH, checkpoint_every=10_000, keep_every=100_000),
        sample=SampleConfig(sampler="sde", steps=250),
    )


def _sit_1(size: str) -> Config:
    """SiT-size/1 on latents of 16 x 16 x 32 (VA-VAE f16d32 at 256 pixels): as many tokens as patch 2 on 32 x 32."""
    like = _sit(size, 2, 256)
    return replace(like, model=replace(like.model, patch_size=1, input_size=16, in_channels=32))


def _finetune(config: Config, epochs: int = 100) -> Config:
    """The paper's fine-tuning with LSEP of a plain SiT; the run it starts from comes as --train.init."""
    return replace(config, train=replace(config.train, steps=epochs * _IMAGENET_EPOCH))


PRESETS: dict[str, Config] = {
    "quickstart": Config(
        model=ModelConfig(depth=4, hidden_size=96, num_heads=4),
        probe=ProbeConfig(depth=2, window_min=3),
        optim=OptimConfig(lr=5e-3, probe_lr=1e-2, schedule="cosine", warmup_steps=30, ema_decay=0.99),
        data=DataConfig(path="digits"),
        train=TrainConfig(steps=600, batch_size=128, log_every=20, checkpoint_every=200, sample_every=200),
        sample=SampleConfig(sampler="heun", steps=25, cfg=1.5, num=100, batch_size=200),
    ),
    "quickstart-unet": Config(
        model=ModelConfig(backbone="unet", depth=2, hidden_size=64, num_heads=4, layers_per_level=1, patch_size=1),
        probe=ProbeConfig(depth=1, window_min=3),
        optim=OptimConfig(lr=3e-3, probe_lr=1e-2, schedule="cosine", warmup_steps=30, ema_decay=0.99),
        data=DataConfig(path="digits"),
        train=TrainConfig(steps=300, batch_size=128, log_every=20, checkpoint_every=100, sample_every=100),
        sample=SampleConfig(sampler="heun", steps=25, cfg=1.5, num=100, batch_size=200),
    ),
    **{f"sit-{s}-{p}-256": _sit(s, p, 256) for s in _SIZES for p in (2, 4, 8)},
    **{f"sit-{s}-2-512": _sit(s, 2, 512) for s in ("b", "l", "xl")},
    **{f"sit-{s}-1-f16d32": _sit_1(s) for s in _SIZES},
    "sit-xl-2-512-finetune": _finetune(_sit("xl", 2, 512)),
}


def preset(name: str) -> Config:
    """The preset called `name`; raises UserError with the nearest names."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown{nearest(name, list(PRESETS))}")
    return PRESETS[name]
