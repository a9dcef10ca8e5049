"""What the tests share: a small configuration, small random data, and how errors are measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsep.config import Config, ModelConfig, OptimConfig, ProbeConfig, TrainConfig, override
from lsep.data.loader import Batch
from lsep.data.manifest import Manifest
from lsep.data.writer import write_store
from lsep.objective import Objective

TINY = Config(
    model=ModelConfig(depth=3, hidden_size=32, num_heads=2),
    probe=ProbeConfig(depth=2, window_min=2),
    optim=OptimConfig(lr=1e-3, probe_lr=1e-2, ema_decay=0.9),
    train=TrainConfig(steps=8, batch_size=10, log_every=2, checkpoint_every=4, sample_every=0, device="cpu"),
)
"""Three blocks of width 32; over `store` it sees 4 x 4 tokens."""


def tiny(**changes: Any) -> Config:
    """TINY with `section__field=value` changes."""
    return override(TINY, {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 43 moments (2 x 3 channels, 8 x 8) in shards of 16, five classes, and seven of the probe's own."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(43, 3, 8, 8)), rng.uniform(0.1, 0.5, size=(43, 3, 8, 8))
    write_store(
        tmp_path / "store",
        kind="moments",
        x=np.concatenate([mean, std], axis=1).astype(np.float32),
        y=rng.integers(5, size=43),
        num_classes=5,
        probe_y=rng.integers(7, size=43),
        probe_classes=7,
        scale=0.5,
        shard_rows=16,
    )
    return tmp_path / "store"


MANIFEST = Manifest("test", "samples", (3, 8, 8), rows=1000, num_classes=5, probe_classes=7)


def lively(objective: Objective, seed: int = 0) -> Objective:
    """Give every weight a value: the zero gates of the initialisation would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in objective.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.15)
    return objective


def random_batch(size: int, seed: int = 0) -> Batch:
    """Random samples of MANIFEST's shape with labels for both branches."""
    g = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, 3, 8, 8, generator=g),
        torch.randint(5, (size,), generator=g),
        torch.randint(7, (size,), generator=g),
        torch.arange(size) + 1000 * seed,
    )


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation as a share of the truth's largest entry."""
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
