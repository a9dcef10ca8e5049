"""Which program a timed configuration is: what `auto` chose, what is not built, what does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lsep import backends
from lsep.config import Config, override
from lsep_kernels.adamw_ema import why_missing

BUILD = "cmake -B build -DLSEP_CUDA=ON && cmake --build build"
"""Builds csrc's libraries into kernels/, in the tree."""


def program(config: Config, device: torch.device) -> dict[str, str]:
    """The implementations of a resolved `config`, by what they compute."""
    chosen = backends.choose(config, device)
    by = chosen.ops
    return {
        "kernels": by.kernels, "attention": by.attention_by, "MLP": "fp8" if config.train.fp8 else by.mlp_by,
        "optimizer": chosen.optimizer, "bf16 weights": _yes(chosen.bf16_weights),
        "joint modulation": _yes(chosen.joint_modulation), "compile": chosen.compile, "graphs": _yes(chosen.graphs),
        "memory": config.train.memory, "micro-batches": str(config.optim.accumulate),
    }  # fmt: skip


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def unbuilt(device: torch.device) -> str | None:
    """Why csrc's optimizer, which `auto` is meant to be on a GPU, cannot run there, and the command that builds it."""
    problem = why_missing("cuda") if device.type == "cuda" else None
    return None if problem is None else f"{problem}; in a tree that is not installed, run {BUILD}"


def another_program(config: Config, device: torch.device) -> str | None:
    """Why `config` would be timed as another program than the one that is meant; None where it would not."""
    problem = unbuilt(device) if config.backend.optimizer in ("auto", "csrc") else None
    if problem is None:
        return None
    return f"{problem} (for torch's optimizer, add +backend.optimizer=torch to the variant's name)"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, is that the GPU's memory is too small."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def smaller(config: Config) -> Config | None:
    """`config` with its batch in at least twice as many micro-batches; None where they are of one image."""
    batch, now = config.train.batch_size, config.optim.accumulate
    more = next((n for n in range(2 * now, batch + 1) if batch % n == 0), None)
    return None if more is None else override(config, {"optim.accumulate": more})


@contextmanager
def only_own_weights() -> Iterator[None]:
    """Linear layers are not filled when they are made: `setup` fills them anyway, and this takes 18 s for SiT-XL/2."""
    before = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = before  # type: ignore[method-assign]
