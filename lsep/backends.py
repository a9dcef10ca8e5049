"""Which implementation computes what: chosen from the configuration and the device, here and nowhere else."""

from typing import NamedTuple

import torch

from lsep.config import Config
from lsep.errors import UserError
from lsep_kernels import adamw_ema, libraries, ops

APEX_INSTALL = (
    "git clone https://github.com/NVIDIA/apex && pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" ./apex'
)


class Backends(NamedTuple):
    """What was chosen."""

    ops: ops.Ops
    optimizer: str


def choose(config: Config, device: torch.device) -> Backends:
    """The implementations of a training run with a resolved `config`; raises UserError for one that cannot run."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    head_dim = config.model.hidden_size // config.model.num_heads
    wanted = config.backend
    try:
        chosen = ops.choose(wanted.kernels, wanted.attention, device, dtype, config.grid**2, head_dim)
    except ops.Unavailable as error:
        raise UserError(f"--backend.{error}") from None
    problem = missing_optimizer(wanted.optimizer, device)
    if problem:
        raise UserError(f"--backend.optimizer is {wanted.optimizer!r}, but {problem}")
    if config.train.fp8:
        problem = missing_fp8(config, chosen, device)
        if problem:
            raise UserError(f"--train.fp8 is True, but {problem}")
        chosen = ops.in_fp8(chosen)
    return Backends(chosen, wanted.optimizer if wanted.optimizer != "auto" else best_optimizer(device))


def missing_fp8(config: Config, chosen: ops.Ops, device: torch.device) -> str | None:
    """Why the matrix products of `config` cannot run in fp8 on `device`; None when they can."""
    hidden = int(config.model.hidden_size * config.model.mlp_ratio)
    for name, width in (("model.hidden_size", config.model.hidden_size), ("the MLP's hidden width", hidden)):
        if width % 16:
            return f"{name} is {width}, expected a multiple of 16"
    if config.train.precision != "bf16":
        return f"--train.precision is {config.train.precision!r}, expected 'bf16'"
    return ops.missing_fp8(chosen.kernels, device)


def bf16_weights(config: Config, optimizer: str) -> bool:
    """Whether the model runs on bf16 copies of its weights; raises UserError where they are asked for and cannot be."""
    problem = None
    if config.train.precision != "bf16":
        problem = f"--train.precision is {config.train.precision!r}, expected 'bf16'"
    elif optimizer not in ("csrc", "reference"):
        problem = f"the optimizer is {optimizer!r}, expected 'csrc' or 'reference', which write them"
    elif config.optim.accumulate > 1:
        problem = f"--optim.accumulate is {config.optim.accumulate}, and gradients would be summed in bf16, expected 1"
    if problem and config.train.weights == "bf16":
        raise UserError(f"--train.weights is 'bf16', but {problem}")
    return problem is None and config.train.weights != "fp32"


def best_optimizer(device: torch.device) -> str:
    """What `auto` means: csrc on a GPU where it is built; on a CPU torch's threads beat its single one."""
    return "csrc" if device.type == "cuda" and adamw_ema.why_missing() is None else "torch"


def missing_optimizer(name: str, device: torch.device) -> str | None:
    """Why the optimizer `name` cannot run on `device`, with what would bring it; None when it can."""
    if name == "csrc":
        return adamw_ema.why_missing(device.type)
    if name == "apex":
        if device.type != "cuda":
            return f"apex needs a GPU, and the device is {device.type}"
        for module in ("apex.optimizers", "amp_C"):  # the package index holds an unrelated apex, without either
            problem = libraries.cannot_import(module)
            if problem:
                return f"{problem} (NVIDIA's apex with its CUDA extensions is expected): {APEX_INSTALL}"
    return None
