"""Several linear maps of one input as one matrix product.

    join([m.weight for m in linears]); join([m.bias for m in linears])     once
    y = joint_linear(x, weights, biases)                                   each step

The adaLN modulations of all blocks are 29 small products for SiT-XL/2, none large enough to fill a GPU. As parameters
they keep their names, gradients and optimizer states; `join` only moves them behind one another in memory, where
they are one matrix. Imports torch only.

    N rows, K inputs, M_i outputs of map i
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def join(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters that differ in their first dimension only into one piece of memory, one behind the other."""
    flat = torch.cat([p.detach() for p in parameters])
    for p, part in zip(parameters, flat.split([len(p) for p in parameters]), strict=True):
        p.data = part


def _joined(tensors: list[Tensor]) -> Tensor:
    """All of them as one tensor: a view where `join` has put them, otherwise a copy."""
    first = tensors[0]
    place, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t.untyped_storage().data_ptr() != memory or t.data_ptr() != place or not t.is_contiguous():
            return torch.cat(tensors)
        place += t.numel() * t.element_size()
    rows = sum(len(t) for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


# Opaque to compilers, which know nothing of tensors that lie behind one another.
@torch.library.custom_op("lsep::joint_linear", mutates_args=())
def _joint_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return torch.addmm(_joined(biases), x, _joined(weights).t())


@torch.library.custom_op("lsep::joint_linear_backward", mutates_args=())
def _joint_linear_backward(dy: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return dy @ _joined(weights), dy.t() @ x, dy.sum(0)


@_joint_linear.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(len(x), sum(len(w) for w in weights))


@_joint_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rows = dy.shape[1]
    return torch.empty_like(x), x.new_empty(rows, x.shape[1]), x.new_empty(rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, _ = inputs
    ctx.save_for_backward(x, *weights)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, *weights = ctx.saved_tensors
    dx, dweight, dbias = _joint_linear_backward(dy, x, weights)
    rows = [len(w) for w in weights]
    return dx, list(dweight.split(rows)), list(dbias.split(rows))


_joint_linear.register_autograd(_gradients, setup_context=_save)


def joint_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`x W_i^T + b_i` of all maps beside one another: x `(N, K)`, weights `(M_i, K)`, biases `(M_i,)`; `(N, sum M_i)`.

    The weights need not be joined, but are copied into one matrix then.
    """
    return _joint_linear(x, list(weights), list(biases))
