"""Attention by libraries, all with the signature of `attention.attention`: SDPA, its cuDNN backend, flash-attn.

`missing_cudnn` and `choose_flash` say in one sentence why one cannot be used here.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsep_kernels.limits import Card, Device, capability

FLASH_INSTALL = "pip install flash-attn --no-build-isolation"


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # (B, T, heads, head_dim)
    return q, k, v


def sdpa(qkv: Tensor, num_heads: int) -> Tensor:
    """`scaled_dot_product_attention` with the backend torch chooses; qkv `(B, T, 3 D)` -> `(B, T, D)`."""
    q, k, v = (x.transpose(1, 2) for x in _heads(qkv, num_heads))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def cudnn(qkv: Tensor, num_heads: int) -> Tensor:
    """SDPA restricted to cuDNN's kernels."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(qkv, num_heads)


def missing_cudnn(device: Device, head: int, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"cuDNN needs a GPU, and the device is {device.type}"
    if not isinstance(device, Card) and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if capability(device) < (8, 0):
        return "cuDNN's attention needs compute capability 8.0 or newer"
    if head % 8 or head > 128:
        return f"head_dim is {head}, expected a multiple of 8 up to 128"
    if dtype == torch.float32:
        return "the type is float32, expected float16 or bfloat16"
    return None


def cannot_import(module: str) -> str | None:
    """None when `module` can be imported, else the reason: not installed, or built for another torch."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{module} is not installed"
    except Exception as error:  # an extension of another ABI raises what it likes
        return f"{module} is installed but cannot be imported ({type(error).__name__}: {error})"
    return None


_FLASH = {2: ("flash_attn", "flash_attn_2_cuda"), 3: ("flash_attn_interface",), 4: ("flash_attn.cute",)}
"""The generations of flash-attn: the module of `flash_attn_func`, and what else must be there."""


def _flash_problem(generation: int, capability: tuple[int, int], head: int) -> str | None:
    if generation == 3 and capability[0] != 9:
        return f"flash-attn 3 runs on sm_90 only, found sm_{capability[0]}{capability[1]}"
    if generation == 4 and head % 32:
        # Pull request 2896 (sm_90: dQ silently wrong) and 2715 (sm_100: an error), both open in September 2026.
        return f"flash-attn 4 has a wrong or failing backward at head_dim {head} (flash-attention#2896): install 2 or 3"
    return None


def choose_flash(device: Device, head: int, dtype: torch.dtype) -> int | str:
    """The flash-attn generation to use, the newest that is right for this device and head; or why there is none."""
    if device.type != "cuda":
        return f"flash-attn needs a GPU, and the device is {device.type}"
    if dtype == torch.float32:
        return "the type is float32, expected float16 or bfloat16"
    there = isinstance(device, Card)  # of a card nothing is looked for
    absent = {g: None if there else next(filter(None, map(cannot_import, m)), None) for g, m in _FLASH.items()}
    problems = {g: _flash_problem(g, capability(device), head) for g, reason in absent.items() if reason is None}
    usable = [g for g, problem in problems.items() if problem is None]
    if usable:
        return max(usable)
    broken = [reason for reason in absent.values() if reason and "cannot be imported" in reason]
    return "; ".join([p for p in problems.values() if p] + broken) or f"flash-attn is not installed: {FLASH_INSTALL}"


def flash(generation: int) -> Callable[[Tensor, int], Tensor]:
    """Attention by `flash_attn_func` of an installed generation."""
    function: Any = importlib.import_module(_FLASH[generation][0]).flash_attn_func

    def flash_attention(qkv: Tensor, num_heads: int) -> Tensor:
        out = function(*_heads(qkv, num_heads))
        return (out[0] if isinstance(out, tuple) else out).flatten(2)  # generations 3 and 4 return lse as well

    return flash_attention
