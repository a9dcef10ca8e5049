"""What is active on this machine, and for each optional part that is not: why, and what would install it."""

import importlib.util
import platform
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """One part: its version or None, what it is for or why it is missing, and the command that would bring it."""

    name: str
    version: str | None
    note: str
    install: str = ""


def parts() -> list[Part]:
    """Every part the program can use, in the order in which it matters."""
    import torch

    found = [Part("python", platform.python_version(), platform.platform()), Part("torch", torch.__version__, "")]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found.append(Part("GPU", torch.cuda.get_device_name(), f"sm_{major}{minor}, {memory:.0f} GiB; trains in bf16"))
    else:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no GPU is visible to torch"
        found.append(Part("GPU", None, f"{why}; trains on the CPU in fp32"))
    from lsep.data.native import library

    native = library() is not None
    why = "rows are read and checked in C" if native else "not built; rows are read in Python, at half the speed"
    found.append(Part("csrc/rows.c", "built" if native else None, why, "apt install gcc && pip install -e ."))
    from lsep_kernels import adamw_ema

    for name, device in (("csrc/adamw_ema.cpp", "cpu"), ("csrc/adamw_ema.cu", "cuda")):
        reason = adamw_ema.why_missing(device)
        found.append(Part(name, None if reason else "built", reason or f"--backend.optimizer csrc on {device}"))
    from lsep import backends

    missing = backends.missing_compiler(torch.device("cpu"))
    found.append(Part("compile, CPU", None if missing else "ready", missing or "--train.compile block"))
    found.append(_package("triton", "triton", "kernels, and torch.compile on a GPU", "pip install triton"))
    found += _backends(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found.append(_package("tensorboard", "tensorboard", "event files of a run", "pip install tensorboard"))
    purpose = "--model.backbone unet, --vae, lsep data encode"
    found.append(_package("diffusers", "diffusers", purpose, 'pip install "diffusers>=0.32"'))
    install = "pip install --no-deps torch-fidelity==0.4.0"
    found.append(_package("torch-fidelity", "torch_fidelity", "lsep evaluate --features inception", install))
    found.append(_package("wandb", "wandb", "--train.wandb PROJECT", "pip install wandb"))
    return found


def _backends(device: "torch.device") -> list[Part]:
    """Every choice of `--backend` and fp8, for SiT-XL/2 at 256 px, and which `auto` takes on this machine."""
    import torch

    from lsep import backends
    from lsep_kernels import ops

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = ops.choose("auto", "auto", device, dtype, tokens=256, head_dim=72)
    names = {
        "kernels": ("triton", "reference"),
        "attention": ("triton", "cudnn", "flash", "sdpa", "reference"),
        "mlp": ("torch", "triton", "cublaslt"),
        "modulation": ("joint", "block"),
        "optimizer": ("csrc", "torch", "apex", "reference"),
    }
    optimizer = backends.best_optimizer(device)
    auto = {
        "kernels": chosen.kernels,
        "attention": chosen.attention_by,
        "mlp": chosen.mlp_by,
        "modulation": "joint" if device.type == "cuda" and optimizer in backends.ON_DEVICE else "block",
        "optimizer": optimizer,
    }
    found = []
    for kind, choices in names.items():
        for name in choices:
            why = None
            if kind == "optimizer":
                why = backends.missing_optimizer(name, device)
            elif kind == "attention":
                why = ops.missing_attention(name, device, dtype, tokens=256, head_dim=72)
            elif kind == "mlp":
                why = ops.missing_mlp(name, device, dtype)
            elif name == "triton":
                why = ops.missing_triton(device)
            state = "auto" if name == auto[kind] else "ready"
            found.append(Part(f"{kind} {name}", None if why else state, why or f"--backend.{kind} {name}"))
    why = ops.missing_fp8(chosen.kernels, device)
    found.append(Part("fp8", None if why else "ready", why or "--train.fp8"))
    return found


def _package(name: str, module: str, purpose: str, install: str) -> Part:
    if importlib.util.find_spec(module) is None:
        return Part(name, None, f"not installed; {purpose}", install)
    return Part(name, metadata.version(name), purpose)


def describe() -> str:
    """The table `lsep doctor` prints."""
    lines = []
    for part in parts():
        state = part.version or "missing"
        install = f"  ({part.install})" if part.install and part.version is None else ""
        lines.append(f"{'yes' if part.version else 'no':4}{part.name:22}{state:20}  {part.note}{install}".rstrip())
    return "\n".join(lines)
