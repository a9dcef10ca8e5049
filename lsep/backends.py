"""Which implementation computes what: chosen from the configuration and the device, here and nowhere else."""

import importlib.util
from typing import NamedTuple

import torch

from lsep.config import Config
from lsep.errors import UserError
from lsep_kernels import adamw_ema, ops

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
    return Backends(chosen, wanted.optimizer if wanted.optimizer != "auto" else best_optimizer(device))


def best_optimizer(device: torch.device) -> str:
    """What `auto` means: csrc on a GPU where it is built; on a CPU torch's threads beat its single one."""
    return "csrc" if device.type == "cuda" and adamw_ema.cuda_library() is not None else "torch"


def missing_optimizer(name: str, device: torch.device) -> str | None:
    """Why the optimizer `name` cannot run on `device`, with what would bring it; None when it can."""
    if name == "csrc":
        return adamw_ema.why_missing(device.type)
    if name == "apex":
        if device.type != "cuda":
            return f"apex needs a GPU, and the device is {device.type}"
        # The package index holds an unrelated package of that name.
        if importlib.util.find_spec("apex") is None or importlib.util.find_spec("apex.optimizers") is None:
            return f"NVIDIA's apex is not installed: {APEX_INSTALL}"
        if importlib.util.find_spec("amp_C") is None:
            return f"apex was installed without its CUDA extensions: {APEX_INSTALL}"
    return None
