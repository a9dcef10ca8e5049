"""Section `compiled`: a block as a training runs it, through torch.compile, against plain PyTorch in float64.

The other sections look at one kernel at a time, called eagerly. Here is what trains: the block under autocast over bf16
weights, compiled whole, with its neighbours fused into it; forward, and the gradients of all inputs and weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bench.kernel_cases import Draw
from bench.kernel_checks import worst_of
from bench.section import Context, Section
from lsep import backends
from lsep.config import Config, override
from lsep.model import Block, Modulation, SiT
from lsep_kernels.ops import REFERENCE, Ops
from lsep_kernels.reference import Activation, plain

FULL = {"model.hidden_size": 1152, "model.num_heads": 16, "model.input_size": 32}
"""SiT-XL/2: heads of 72, 256 tokens."""
SMOKE = {"model.hidden_size": 144, "model.num_heads": 2, "model.input_size": 8}
SMOKE_GPU = SMOKE | {"model.input_size": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "as auto has it": {},
    "attention by cuDNN": {"backend.attention": "cudnn"},
    "MLP by cuBLASLt": {"backend.mlp": "cublaslt"},
    "MLP by PyTorch": {"backend.mlp": "torch"},
    "float32 stream": {"train.fp32_residual": True},
    "elementwise recomputed": {"train.memory": "recompute-elementwise"},
}
"""What the rows of the step table run, and what else changes a block's code."""
ROWS, EXTRA = 12, 4
"""Samples, and those of a probe's second pass."""


@dataclass(frozen=True)
class Data:
    """What goes into a block, in float64, and what comes back."""

    x: Tensor
    h: Tensor
    modulation: list[Tensor]
    following: list[Tensor]
    window: Tensor
    weights: dict[str, Tensor]
    seed: int


def compiled(context: Context, section: Section) -> None:
    """Outputs and all gradients of compiled blocks, at most twice as far off as plain PyTorch in bf16."""
    if not section.begun:
        section.notes.append(
            f"{ROWS} samples through one block of width {_sizes(context)['model.hidden_size']}, with the "
            f"probe in it for {EXTRA} of them; truth is plain PyTorch in float64, allowed is twice the error of "
            "plain PyTorch in the same types, not compiled, and 1e-6 of the largest entry."
        )

    def one(case: tuple[str, bool]) -> None:
        what, probed = case
        config = _config(context, CHANGES[what])
        problem = _missing(config, context)
        if problem:
            section.skipped.append(f"{what}: {problem}")
            return
        section.rows.append(_row(context, section, config, what, probed))
        torch._dynamo.reset()

    # A smoke test on a GPU compiles in earnest, which takes longest of all.
    changes = list(CHANGES)[:3] if context.smoke and context.cuda else list(CHANGES)
    cases = [(f"{what}{', probed' if probed else ''}", (what, probed)) for what in changes for probed in (False, True)]
    context.each(section, cases, one)


def _sizes(context: Context) -> dict[str, Any]:
    return FULL if not context.smoke else SMOKE_GPU if context.cuda else SMOKE


def _config(context: Context, changes: dict[str, Any]) -> Config:
    return override(Config(), {
        **_sizes(context), "model.depth": 1, "model.in_channels": 4, "model.num_classes": 10,
        "train.precision": "bf16" if context.cuda else "fp32", **changes,
    })  # fmt: skip


def _missing(config: Config, context: Context) -> str | None:
    """Why a library that `config` asks for is not there; that of auto is."""
    try:
        backends.choose(config, context.device)
    except backends.UserError as error:
        return str(error)
    return None


def _row(context: Context, section: Section, config: Config, what: str, probed: bool) -> dict[str, Any]:
    data = draw(config, context, probed)
    dtype = torch.bfloat16 if context.cuda else torch.float32
    chosen = backends.choose(config, context.device).ops
    ours = through(context, config, chosen, data, dtype, probed, compiled=True)
    theirs = through(context, config, REFERENCE, data, dtype, probed)
    truth = through(context, config, REFERENCE, data, torch.float64, probed)
    names = list(truth)
    results = [[found[name] for name in names] for found in (ours, theirs, truth)]
    worst = worst_of(names, results[0], results[1], results[2], dtype, floor=1e-6)
    title = f"block of {config.model.num_heads} heads of {config.model.hidden_size // config.model.num_heads}, {what}"
    title += ", probed" if probed else ""
    text = f"{title}: {worst.what}, error {worst.error:.3g} of the largest entry, {worst.allowed:.3g} allowed"
    return {
        "block": title, "attention": chosen.attention_by, "MLP": chosen.mlp_by, "checked": len(names),
        "nearest to its limit": worst.what, "error": worst.error, "allowed": worst.allowed,
        "ok": section.check(worst.share <= 1, text),
    }  # fmt: skip


def draw(config: Config, context: Context, probed: bool) -> Data:
    """Numbers that bf16 has, so that all types start from the same; gates and weights as of a model in training."""
    draw = Draw(context.device, context.seed)
    n, t, d = ROWS, config.grid**2, config.model.hidden_size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * draw.normal(*shape)).to(torch.bfloat16).double()

    block = Block(d, config.model.num_heads, config.model.mlp_ratio, config.model.qk_norm, REFERENCE)
    weights = {
        name: normal(*p.shape, scale=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
        for name, p in block.named_parameters()
        if "adaLN" not in name
    }
    kept = n - EXTRA if probed else n
    window = draw.uniform(EXTRA, t)
    return Data(
        normal(n, t, d), normal(n, t, d), [normal(n, d, scale=0.5) for _ in Modulation._fields],
        [normal(kept, d, scale=0.5) for _ in range(2)], window / window.sum(1, keepdim=True), weights, context.seed,
    )  # fmt: skip


def through(
    context: Context, config: Config, ops: Ops, data: Data, dtype: torch.dtype, probed: bool, compiled: bool = False
) -> dict[str, Tensor]:
    """Outputs of a block by `ops` over weights of `dtype`, and the gradients of all inputs and weights, by name."""
    with torch.device(context.device):
        model = SiT(config, ops).to(dtype)
    block = model.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name in data.weights:
                p.copy_(data.weights[name])
    if compiled:
        _compile(model, context)
    stream = torch.float32 if config.train.fp32_residual and dtype == torch.bfloat16 else dtype
    x = data.x.to(stream).requires_grad_()
    h = data.h.to(dtype).requires_grad_()
    modulation, following = ([y.to(dtype).requires_grad_() for y in part] for part in (data.modulation, data.following))
    half = dtype == torch.bfloat16
    with torch.autocast(context.device.type, torch.bfloat16, enabled=half):
        given = (x, h, Modulation(*modulation), (following[0], following[1]))
        if probed:
            window = data.window.to(torch.float64 if dtype == torch.float64 else torch.float32)
            out = model.run(block.forward_probed, *given, window, True)
        else:
            out = model.run(block, *given)
    outputs = dict(zip(("stream", "next input", "features"), map(_tensor, out), strict=False))
    leaves = {"x": x, "h": h}
    # The first shift and scale belong to the norm before the block.
    leaves |= dict(zip(Modulation._fields[2:], modulation[2:], strict=True))
    leaves |= {"next shift": following[0], "next scale": following[1]}
    leaves |= {name: p for name, p in block.named_parameters() if name in data.weights}
    back = Draw(context.device, data.seed + 1)
    # Drawn in float32 and rounded to bfloat16: the same numbers in every type.
    grads = [back.normal(*y.shape).to(torch.bfloat16).to(y.dtype) for y in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
    values = {name: y.detach() for name, y in outputs.items()}
    return values | {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


def _tensor(value: Activation) -> Tensor:
    return plain(value)


def _compile(model: SiT, context: Context) -> None:
    """As a training does; on a CPU, in the interpreter, by dynamo alone."""
    if context.cuda:
        model.compile_blocks()
    else:
        model.run = torch.compile(model.run, fullgraph=True, dynamic=False, backend="eager")
