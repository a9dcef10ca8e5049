"""What the sections of `bench.chaos` share: their folder, and a training that takes a second."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsep.config import Config, ModelConfig, OptimConfig, ProbeConfig, TrainConfig, flat, override
from lsep.data.writer import write_store
from lsep.step import State, open_loader, train_step


@dataclass(frozen=True)
class Trial:
    """What all sections get."""

    folder: Path
    """Empty, and removed afterwards."""
    quick: bool
    seed: int = 0
    minutes: float = 30.0
    """Of `soak`."""


SMALL = Config(
    model=ModelConfig(depth=3, hidden_size=32, num_heads=2),
    probe=ProbeConfig(depth=2, window_min=2),
    optim=OptimConfig(lr=1e-3, probe_lr=1e-2, ema_decay=0.9),
    train=TrainConfig(
        steps=8, batch_size=10, log_every=2, checkpoint_every=2, sample_every=0, device="cpu", overhead_rounds=0
    ),
)


def small(folder: Path, **changes: object) -> Config:
    """A configuration that trains in a second, over a store written into `folder` at the first call."""
    store = folder / "store"
    if not store.exists():
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 3, 8, 8)).astype(np.float32)
        write_store(store, kind="samples", x=x, y=rng.integers(5, size=40), num_classes=5, scale=1.0)
    return override(SMALL, {"data.path": str(store), **{k.replace("__", "."): v for k, v in changes.items()}})


def flags(config: Config) -> list[str]:
    """The command line that gives `config` from the quickstart preset."""
    args = []
    for name, value in flat(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            section, field = flag[2:].split(".")
            args.append(flag if value else f"--{section}.no-{field}")
        elif isinstance(value, tuple):
            args += [flag, *map(str, value)]
        else:
            args += [flag, str(value)]
    return args


def train_one_step(state: State, step: int) -> None:
    for batches in open_loader(state, step, step + 1):
        train_step(state, step, batches)
