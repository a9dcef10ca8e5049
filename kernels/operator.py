"""How a Triton kernel becomes a PyTorch operator, and how it runs without a GPU.

On a GPU every operator is a `torch.library.triton_op`: `torch.compile` sees the kernel inside and keeps one graph.
With TRITON_INTERPRET=1, set before the first import, the same kernels run on the CPU in Triton's interpreter, which
reads real memory; there the operator is an opaque `custom_op`, which also keeps one graph.
"""

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Multiply and add may become one instruction, as always so far; Triton 3.9 warns where nobody says so.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
import triton.language as tl

_RESERVED = "stream"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the operator `lsep::name`, pure (all its results are new tensors)."""
    register = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return register(f"lsep::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid` on the current device, in a way that `torch.compile` can look into.

    Raises ValueError for a grid that no GPU takes, TypeError for a Python float that is not a tl.constexpr, and for
    an argument of a name that Inductor's launchers have for their own.
    """
    if any(size > 65_535 for size in grid[1:]):
        raise ValueError(
            f"a grid of {grid} programs was asked for, a GPU takes 65535 in the second and third dimension"
        )
    names, constants = _parameters(kernel.fn)
    if _RESERVED in names:
        raise TypeError(
            f"{kernel.fn.__name__}: {_RESERVED} is the stream of torch.compile's launch, expected another name"
        )
    for name, value in (*zip(names, args, strict=False), *meta.items()):
        if isinstance(value, float) and name not in constants:
            raise TypeError(
                f"{kernel.fn.__name__}: {name} is the Python float {value}, which torch.compile hands on in double "
                "precision, expected an argument declared as tl.constexpr"
            )
    if _traced(args):
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@cache
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The arguments of a kernel, and those of them that are tl.constexpr."""
    found = inspect.signature(function).parameters
    return tuple(found), frozenset(name for name, p in found.items() if p.annotation is tl.constexpr)


def _traced(args: tuple[Any, ...]) -> bool:
    """Whether these are tensors of a compiler, which stand for others, and not tensors with memory.

    `wrap_triton` is for the former alone: around a launch it makes an autotuner and two entries in a table that only
    grows (1.8 ms), and torch 2.11 refuses interpreted kernels there.
    """
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in args)


def check(name: str, wanted: tuple[int, ...], **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has the shape `wanted`."""
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: {key} is {tuple(tensor.shape)}, expected {wanted}")


def check_integers(name: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is int64."""
    for key, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: {key} is {tensor.dtype}, expected torch.int64")


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is dense; its rows may lie apart, as those of a chunk do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, triton.next_power_of_2(n))
