"""Which implementation computes what: chosen from the configuration and the device, here and nowhere else."""

import importlib.util
import os
import shutil
from typing import NamedTuple

import torch

from lsep.config import Config
from lsep.errors import UserError
from lsep_kernels import adamw_ema, libraries, ops
from lsep_kernels.limits import Card, Device

APEX_INSTALL = (
    "git clone https://github.com/NVIDIA/apex && pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" ./apex'
)
ON_DEVICE = ("csrc", "reference")
"""Optimizers that are one operation, with rates and counters on the device."""


class Choice(NamedTuple):
    """What was chosen, by name: all that decides over a step's memory and time beside the configuration."""

    kernels: str
    attention_by: str
    mlp_by: str
    """torch, triton, cublaslt or fp8."""
    optimizer: str
    bf16_weights: bool
    joint_modulation: bool
    compile: str
    graphs: bool
    """As in `Backends`."""


class Backends(NamedTuple):
    """What was chosen."""

    ops: ops.Ops
    optimizer: str
    bf16_weights: bool
    """The model runs on bf16 copies of its weights."""
    joint_modulation: bool
    """One matrix product gives every block's modulation."""
    compile: str
    """off, block or model."""
    graphs: bool
    """A step is a CUDA graph."""

    def named(self) -> dict[str, str | bool]:
        """Which program a step is, in words for logs and reports."""
        return {
            "kernels": self.ops.kernels, "attention": self.ops.attention_by, "mlp": self.ops.mlp_by,
            "optimizer": self.optimizer, "bf16 weights": self.bf16_weights,
            "joint modulation": self.joint_modulation, "compile": self.compile, "graphs": self.graphs,
        }  # fmt: skip


def decide(config: Config, device: Device, processes: int = 1) -> Choice:
    """The names of what `choose` takes, also for a `Card` that is not here; raises UserError as that does."""
    sharded = processes > 1 and config.dist.mode != "ddp"
    dtype, wanted = _dtype(config), config.backend
    head_dim = config.model.hidden_size // config.model.num_heads
    try:
        names = ops.decide(
            wanted.kernels, wanted.attention, device, dtype, config.grid**2, head_dim, mlp=wanted.mlp
        )  # fmt: skip
    except ops.Unavailable as error:
        raise UserError(f"--backend.{error}") from None
    problem = missing_optimizer(wanted.optimizer, device)
    if problem:
        raise UserError(f"--backend.optimizer is {wanted.optimizer!r}, but {problem}")
    if config.train.fp8:
        problem = missing_fp8(config, names.kernels, device)
        if problem:
            raise UserError(f"--train.fp8 is True, but {problem}")
        names = names._replace(mlp_by="fp8")
    optimizer = wanted.optimizer if wanted.optimizer != "auto" else best_optimizer(device)
    copies = not sharded and _bf16_weights(config, optimizer)  # fsdp gathers its shards in bf16 by itself
    if wanted.modulation == "joint" and not copies:
        raise UserError("--backend.modulation is 'joint', but the weights are float32, expected --train.weights bf16")
    # Its gradients, a third of all, come at the end of the backward, where no exchange between processes is hidden.
    joint = (
        config.model.backbone == "sit"
        and copies
        and wanted.modulation != "block"
        and (processes == 1 or wanted.modulation == "joint")
    )
    return Choice(
        *names,
        optimizer,
        copies,
        joint,
        _compile(config, device, sharded),
        _graphs(config, optimizer, device, processes),
    )


def choose(config: Config, device: torch.device, processes: int = 1) -> Backends:
    """The implementations of a training run with a resolved `config`; raises UserError for one that cannot run."""
    chosen = decide(config, device, processes)
    dtype, wanted = _dtype(config), config.backend
    head_dim = config.model.hidden_size // config.model.num_heads
    found = ops.choose(wanted.kernels, wanted.attention, device, dtype, config.grid**2, head_dim, mlp=wanted.mlp)
    return Backends(ops.in_fp8(found) if config.train.fp8 else found, *chosen[3:])


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def substitutes(config: Config, device: torch.device) -> list[str]:
    """A sentence for each `auto` that lacks a part of a full installation on a GPU, so that another program runs.

    Each names the part, what runs instead, and what would bring it. On a CPU nothing is missing: the plain program is
    the choice there.
    """
    if device.type != "cuda":
        return []
    found, triton = [], missing_compiler(device)
    if triton and config.backend.kernels == "auto":
        found.append(f"the Triton kernels are replaced by plain PyTorch: they need {triton}")
    if triton and config.train.compile == "auto":
        found.append(f"nothing is compiled: torch.compile needs {triton}")
    csrc = adamw_ema.why_missing(device.type)
    if csrc and config.backend.optimizer == "auto":
        found.append(
            "torch's AdamW replaces csrc's optimizer, and with that one go bf16 weights, the joint modulation and CUDA "
            f"graphs: {csrc} (LSEP_BUILD_CUDA=1 pip install -e . says what a build lacks)"
        )
    return found


def missing_fp8(config: Config, kernels: str, device: Device) -> str | None:
    """Why the matrix products of `config` cannot run in fp8 on `device`; None when they can."""
    hidden = int(config.model.hidden_size * config.model.mlp_ratio)
    for name, width in (("model.hidden_size", config.model.hidden_size), ("the MLP's hidden width", hidden)):
        if width % 16:
            return f"{name} is {width}, expected a multiple of 16"
    if config.train.precision != "bf16":
        return f"--train.precision is {config.train.precision!r}, expected 'bf16'"
    if config.backend.mlp != "auto":
        return f"--backend.mlp is {config.backend.mlp!r}, expected 'auto': fp8 has an MLP of its own"
    return ops.missing_fp8(kernels, device)


def _bf16_weights(config: Config, optimizer: str) -> bool:
    problem = None
    if config.train.precision != "bf16":
        problem = f"--train.precision is {config.train.precision!r}, expected 'bf16'"
    elif optimizer not in ON_DEVICE:
        problem = f"the optimizer is {optimizer!r}, expected 'csrc' or 'reference', which write them"
    elif config.optim.accumulate > 1:
        problem = f"--optim.accumulate is {config.optim.accumulate}, and gradients would be summed in bf16, expected 1"
    if problem and config.train.weights == "bf16":
        raise UserError(f"--train.weights is 'bf16', but {problem}")
    return problem is None and config.train.weights != "fp32"


def _compile(config: Config, device: Device, sharded: bool) -> str:
    wanted, problem = config.train.compile, missing_compiler(device)
    if wanted == "auto":
        return "block" if device.type == "cuda" and problem is None and not sharded else "off"
    if wanted != "off" and sharded:
        raise UserError(
            f"--train.compile is {wanted!r}, but --dist.mode is {config.dist.mode!r}, whose gathering of weights is no "
            "part of one graph: expected 'off' or 'auto', or --dist.mode ddp"
        )
    if wanted != "off" and problem:
        raise UserError(f"--train.compile is {wanted!r}, but on {device.type} it needs {problem}")
    return wanted


def _graphs(config: Config, optimizer: str, device: Device, processes: int) -> bool:
    problem = None
    if processes > 1:
        problem = f"there are {processes} processes, and a graph holds one GPU's work without its exchange with others"
    elif device.type != "cuda":
        problem = f"a CUDA graph needs a GPU, and the device is {device.type}"
    elif optimizer not in ON_DEVICE:
        problem = f"the optimizer is {optimizer!r}, expected 'csrc' or 'reference', whose rates are on the device"
    if problem and config.train.graphs == "on":
        raise UserError(f"--train.graphs is 'on', but {problem}")
    return problem is None and config.train.graphs != "off"


def missing_compiler(device: Device) -> str | None:
    """What torch.compile lacks on this machine and what would bring it; None when it has all."""
    if device.type == "cuda":
        if not isinstance(device, Card) and importlib.util.find_spec("triton") is None:
            return "the package triton, which is not installed: pip install triton"
        return None
    if os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "a C++ compiler, and none is found: apt install g++"


def best_optimizer(device: Device) -> str:
    """What `auto` means: csrc on a GPU where it is built; on a CPU torch's threads beat its single one."""
    return "csrc" if device.type == "cuda" and missing_optimizer("csrc", device) is None else "torch"


def missing_optimizer(name: str, device: Device) -> str | None:
    """Why the optimizer `name` cannot run on `device`, with what would bring it; None when it can."""
    if isinstance(device, Card):
        return None
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
