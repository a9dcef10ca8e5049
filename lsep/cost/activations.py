"""Bytes of the activations of one micro-batch: what each block keeps for its backward, and what comes and goes there.

The counts follow what the operators save (`save_for_backward` in `lsep_kernels`), what `lsep.memory` lets them keep,
and the order in which a compiled block drops it. In widths of a token, D elements each, a block keeps

    keep                    14   qkv 3, result of attention and of proj, stream, MLP's input, z 4 and result, stream, h
    recompute-elementwise   12   the same without the first stream and the MLP's result
    recompute-blocks         2   stream and h, the next block's input

With `--backend.mlp torch` GELU's result is kept besides (4), as it is for the main rows of the probed block always.

    R rows (samples), T tokens, D width, H hidden width of the MLP
"""

from collections import Counter
from dataclasses import dataclass

from lsep.backends import Choice
from lsep.config import Config
from lsep.cost.parameters import hidden
from lsep.plan import BranchPlan

ADALN_CHUNK = 32
"""Tokens a partial sum of adaLN's backward covers, see `lsep_kernels.adaln.TOKENS`."""
MLP_ROWS = 256
"""Rows a partial sum of the MLP's backward covers, see `lsep_kernels.mlp.ROWS`."""

Bytes = Counter[str]
ATTENTION, MLP, STREAM, PASSING = "kept by attention", "kept by the MLP", "kept of the stream", "backward of a block"


@dataclass(frozen=True)
class Shapes:
    """Sizes of a micro-batch in bytes."""

    config: Config
    choice: Choice
    plan: BranchPlan

    @property
    def element(self) -> int:
        """Of an activation."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def residual(self) -> int:
        """Of an element of the residual stream."""
        return 4 if self.config.train.fp32_residual else self.element

    @property
    def extra(self) -> int:
        """Rows of the second pass."""
        return self.plan.extra if self.plan.probe else 0

    def rows(self, block: int) -> int:
        """Rows of the input of block `block`, counted from 1."""
        return self.plan.batch + (self.extra if block <= self.config.probe.depth else 0)

    def probed(self, block: int) -> bool:
        """The second pass leaves in this block."""
        return self.extra > 0 and block == self.config.probe.depth

    def width(self, rows: int, widths: float = 1) -> int:
        """`widths` times D elements of each token."""
        return int(rows * self.config.grid**2 * self.config.model.hidden_size * self.element * widths)

    def stream(self, rows: int) -> int:
        """A residual stream."""
        return rows * self.config.grid**2 * self.config.model.hidden_size * self.residual

    def hidden(self, rows: int) -> int:
        """A hidden activation of the MLP."""
        return rows * self.config.grid**2 * hidden(self.config) * self.element

    def statistics(self, rows: int, times: int = 2) -> int:
        """Mean and rstd, or as many float32 for each token."""
        return 4 * times * rows * self.config.grid**2


def handed_on(s: Shapes, block: int) -> Bytes:
    """What block `block` hands on and the next one keeps: stream and modulated input; 0 is the embedding."""
    rows = s.rows(block + 1) if block < s.config.model.depth else s.plan.batch
    return Counter({STREAM: s.stream(rows) + s.width(rows) + s.statistics(rows)})


def products(s: Shapes, block: int) -> Bytes:
    """What the products and attention of a block gave: qkv, attention's result, proj's, z, and statistics."""
    rows, heads = s.rows(block), s.config.model.num_heads
    out: Bytes = Counter({
        ATTENTION: s.width(rows, 5) + s.statistics(rows, heads), MLP: s.hidden(rows),
    })  # fmt: skip
    if s.config.model.qk_norm:  # q and k before their norms, and these norms' statistics
        out[ATTENTION] += s.width(rows, 2) + 2 * s.statistics(rows, heads)
    if s.probed(block) or s.choice.mlp_by == "torch":
        out[MLP] += s.hidden(s.plan.batch if s.probed(block) else rows)  # GELU's result
    if s.probed(block) and not s.config.probe.pool_before_fc2:
        out[MLP] += s.hidden(s.extra) + s.width(s.extra) + s.stream(s.extra)
    return out


def seam(s: Shapes, rows: int) -> Bytes:
    """Stream and MLP's input between the halves of a block."""
    return Counter({STREAM: s.stream(rows) + s.width(rows) + s.statistics(rows)})


def kept(s: Shapes, block: int) -> Bytes:
    """What a block keeps until its backward, with what it hands on."""
    last = block == s.config.model.depth
    after, memory = handed_on(s, block), s.config.train.memory
    rows = s.rows(block)
    if memory == "recompute-blocks":
        return after - Counter({STREAM: s.stream(rows)}) if last else after
    out = after + products(s, block)
    if memory == "recompute-elementwise":
        if s.probed(block):  # the MLP's result instead of its input, and GELU is computed again
            out -= Counter({MLP: s.hidden(s.plan.batch)})
            return out + Counter({MLP: s.width(s.plan.batch)})
        out += Counter({MLP: s.width(rows)})
        return out - Counter({STREAM: s.stream(rows)}) if last else out
    result = s.plan.batch if s.probed(block) else rows
    return out + seam(s, rows) + Counter({MLP: s.width(result)})


def backward(s: Shapes, block: int) -> Bytes:
    """What lives of a block where the backward of its MLP needs most, beside what earlier blocks keep.

    The gradients of the second seam are there, the hidden activation's three: dh, dz and GELU's result; of what was
    kept all but the second seam's own.
    """
    rows, main = s.rows(block), s.plan.batch if s.probed(block) else s.rows(block)
    out = products(s, block) + seam(s, rows)
    tokens = rows * s.config.grid**2
    partial = 4 * hidden(s.config) * -(-tokens // MLP_ROWS)
    passing = s.stream(main) + s.width(main) + partial
    if s.probed(block):
        passing += s.hidden(rows) + s.hidden(main) + s.stream(rows)
    elif s.choice.mlp_by == "torch":
        passing += s.hidden(rows)
    elif s.choice.mlp_by == "cublaslt":
        passing += 2 * s.hidden(rows)
    elif s.choice.mlp_by == "fp8":  # dz in fp8 as well, and dy
        passing += 3 * s.hidden(rows) + s.hidden(rows) // s.element + s.width(rows) // s.element
    else:
        passing += 3 * s.hidden(rows)
    out[PASSING] += passing
    if s.config.train.memory.startswith("recompute"):
        out[STREAM] -= s.stream(rows)  # its input, once the first seam is computed again
    return out
