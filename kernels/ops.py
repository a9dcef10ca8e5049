"""The operations of a training step, each by one implementation, chosen here and nowhere else.

    from lsep_kernels.ops import choose
    ops = choose("auto", "auto", torch.device("cuda"), torch.bfloat16, tokens=256, head_dim=72)
    h = ops.norm_modulate(x, shift, scale)

`reference` computes everything in plain PyTorch; `triton` are the kernels of this package. Attention and the MLP are
chosen on their own, since libraries compete there. `in_fp8` turns a choice into one whose matrix products run in fp8.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lsep_kernels import cublaslt, libraries, reference
from lsep_kernels.limits import Card, Device, capability, missing_attention_kernels
from lsep_kernels.reference import Activation

Kernels = Literal["auto", "triton", "reference"]
Attention = Literal["auto", "triton", "cudnn", "flash", "sdpa", "reference"]
Mlp = Literal["auto", "torch", "triton", "cublaslt"]


class Unavailable(ValueError):
    """An implementation that was asked for cannot run here; the message says why and what would bring it."""


class Names(NamedTuple):
    """What was chosen; as in `Ops`."""

    kernels: str
    attention_by: str
    mlp_by: str


@dataclass(frozen=True)
class Ops:
    """Functions with the signatures of `reference`, and the names of what was chosen."""

    kernels: str
    attention_by: str
    mlp_by: str
    norm_modulate: Callable[..., Activation]
    gate_residual_norm_modulate: Callable[..., tuple[Tensor, Activation]]
    attention: Callable[[Tensor, int], Tensor]
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    pool: Callable[[Tensor, Tensor], Tensor]
    gelu_pool: Callable[[Tensor, Tensor], Tensor]
    probe_head: Callable[..., tuple[Tensor, Tensor]]
    interpolate: Callable[..., tuple[Tensor, Tensor]]
    velocity_loss: Callable[..., Tensor]
    uniform: Callable[..., Tensor]
    normal: Callable[..., Tensor]
    windows: Callable[..., Tensor]


REFERENCE = Ops(
    kernels="reference",
    attention_by="reference",
    mlp_by="torch",
    norm_modulate=reference.norm_modulate,
    gate_residual_norm_modulate=reference.gate_residual_norm_modulate,
    attention=reference.attention,
    linear=reference.linear,
    mlp=reference.mlp,
    pool=reference.pool,
    gelu_pool=reference.gelu_pool,
    probe_head=reference.probe_head,
    interpolate=reference.interpolate,
    velocity_loss=reference.velocity_loss,
    uniform=reference.uniform,
    normal=reference.normal,
    windows=reference.windows,
)


def missing_triton(device: Device) -> str | None:
    """Why the Triton kernels cannot run on `device`, with what would change it; None when they can."""
    if not isinstance(device, Card) and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda":
        major, minor = capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor}, expected 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton needs a GPU, and the device is {device.type} (TRITON_INTERPRET=1 interprets the kernels, slowly)"


def missing_attention(name: str, device: Device, dtype: torch.dtype, tokens: int, head_dim: int) -> str | None:
    """Why attention by `name` cannot run for this device, type and shape; None when it can."""
    if name == "triton":
        return missing_triton(device) or missing_attention_kernels(tokens, head_dim, dtype, device)
    if name == "cudnn":
        return libraries.missing_cudnn(device, head_dim, dtype)
    if name == "flash":
        chosen = libraries.choose_flash(device, head_dim, dtype)
        return chosen if isinstance(chosen, str) else None
    return None


def missing_mlp(name: str, device: Device, dtype: torch.dtype) -> str | None:
    """Why the MLP by `name` cannot run for this device and type; None when it can."""
    if name == "torch":
        return None
    problem = cublaslt.missing(device, dtype) if name == "cublaslt" else None
    return problem or missing_triton(device)  # a kernel computes GELU again behind cuBLASLt as well


def decide(
    kernels: Kernels, attention: Attention, device: Device, dtype: torch.dtype, tokens: int, head_dim: int,
    mlp: Mlp = "auto",
) -> Names:  # fmt: skip
    """Which implementations take activations of `dtype` on `device`; raises Unavailable for a choice that cannot run.

    auto: Triton on a GPU, plain PyTorch on a CPU; attention by Triton where its kernels take the shape, then cuDNN on
    sm_90 and newer, then SDPA; the MLP as the other kernels.
    """
    problem = missing_triton(device)
    if kernels == "triton" and problem:
        raise Unavailable(f"kernels is 'triton', but {problem}")
    if kernels == "auto":
        kernels = "triton" if device.type == "cuda" and problem is None else "reference"
    if attention == "auto":
        attention = _best_attention(kernels, device, dtype, tokens, head_dim)
    problem = missing_attention(attention, device, dtype, tokens, head_dim)
    if problem:
        raise Unavailable(f"attention is {attention!r}, but {problem}")
    if mlp == "auto":  # until a GPU has said which is fastest: the one that keeps least in memory
        mlp = "triton" if kernels == "triton" else "torch"
    problem = missing_mlp(mlp, device, dtype)
    if problem:
        raise Unavailable(f"mlp is {mlp!r}, but {problem}")
    return Names(kernels, attention, mlp)


def choose(
    kernels: Kernels, attention: Attention, device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int,
    mlp: Mlp = "auto",
) -> Ops:  # fmt: skip
    """The implementations that `decide` names."""
    names = decide(kernels, attention, device, dtype, tokens, head_dim, mlp)
    return replace(
        _triton() if names.kernels == "triton" else REFERENCE,
        attention_by=names.attention_by, attention=_attention(names.attention_by, device, dtype, head_dim),
        mlp_by=names.mlp_by, mlp=_mlp(names.mlp_by, device),
    )  # fmt: skip


def missing_fp8(kernels: str, device: Device) -> str | None:
    """Why the matrix products cannot run in fp8 beside `kernels`, as chosen, on `device`; None when they can."""
    if kernels != "triton":
        return f"kernels is {kernels!r}, expected 'triton', which writes the operands"
    if device.type == "cuda":
        major, minor = capability(device)
        # Where torch._scaled_mm takes a scale for each row.
        if (major, minor) != (8, 9) and major not in (9, 10):
            return f"compute capability {major}.{minor}, expected 8.9, 9.x or 10.x"
    return None


def in_fp8(ops: Ops) -> Ops:
    """`ops` with the matrix products of a block in fp8, for bf16 activations; the norms hand on a `Quantized`."""
    from lsep_kernels import adaln, fp8

    return replace(
        ops,
        norm_modulate=partial(adaln.norm_modulate, quantize=True),
        gate_residual_norm_modulate=partial(adaln.gate_residual_norm_modulate, quantize=True),
        linear=fp8.linear,
        mlp=fp8.mlp,
        mlp_by="fp8",
    )


def _best_attention(kernels: str, device: Device, dtype: torch.dtype, tokens: int, head_dim: int) -> Attention:
    if kernels == "triton" and missing_attention("triton", device, dtype, tokens, head_dim) is None:
        return "triton"
    if missing_attention("cudnn", device, dtype, tokens, head_dim) is not None:
        return "sdpa"
    return "cudnn" if capability(device) >= (9, 0) else "sdpa"


def _attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[[Tensor, int], Tensor]:
    if name == "triton":
        from lsep_kernels import attention

        return attention.attention
    if name == "flash":
        generation = libraries.choose_flash(device, head_dim, dtype)
        assert isinstance(generation, int)
        return libraries.flash(generation)
    return {"cudnn": libraries.cudnn, "sdpa": libraries.sdpa, "reference": reference.attention}[name]


def _mlp(name: str, device: torch.device) -> Callable[..., Tensor]:
    if name == "torch":
        return reference.mlp
    from lsep_kernels import mlp

    if name == "triton":
        return mlp.mlp
    cublaslt.prepare(device)
    return mlp.mlp_cublaslt


def _triton() -> Ops:
    from lsep_kernels import adaln, attention, draws, gelu_pool, interpolate, mlp, probe_head, velocity_loss

    return Ops(
        kernels="triton",
        attention_by="triton",
        mlp_by="triton",
        norm_modulate=adaln.norm_modulate,
        gate_residual_norm_modulate=adaln.gate_residual_norm_modulate,
        attention=attention.attention,
        linear=reference.linear,
        mlp=mlp.mlp,
        pool=gelu_pool.pool,
        gelu_pool=gelu_pool.gelu_pool,
        probe_head=probe_head.probe_head,
        interpolate=interpolate.interpolate,
        velocity_loss=velocity_loss.velocity_loss,
        uniform=draws.uniform,
        normal=draws.normal,
        windows=draws.windows,
    )
