"""The branch plan: which samples lose their label in which branch, and which need a second pass.

The denoiser drops labels with probability p, the probe with rho > p. Both losses are sums over samples, so their
expected gradients depend on the two marginals only, and the label states of the two branches may be coupled. A batch,
already in random order, is cut by position:

    first  null               main unlabelled, probe unlabelled    the probe reads the main pass
    then                      main labelled,   probe labelled      likewise
    last   extra              main labelled,   probe unlabelled    the only samples that need a second pass

With extra = (rho - p) B this is the paper's objective at 0.8 of its second pass. With fewer, the unlabelled probe
samples there are get total weight rho and the labelled ones 1 - rho: still unbiased, at more variance. `paper` keeps
independent draws and a full second pass, as the reference.
"""

from dataclasses import dataclass

from lsep.config import Config
from lsep.errors import UserError


@dataclass(frozen=True)
class BranchPlan:
    """Counts of one shard's `batch` rows, and the weights of its probe losses.

    The shard's LSEP loss is `sum_i weight_i omega(t_i) CE_i`; its mean over all shards is the global batch's, in which
    the weights of the unlabelled probe samples add up to rho and those of the labelled ones to 1 - rho.
    """

    batch: int
    null: int
    """First rows, unlabelled in both branches; with `paper` labels are drawn instead, and this is 0."""
    extra: int
    """Last rows, which go through the first blocks a second time."""
    null_weight: float = 0.0
    labelled_weight: float = 0.0
    paper: bool = False
    probe: bool = True
    """False: no probe at all, plain SiT."""


def branch_plan(config: Config, shard: int = 0, shards: int = 1, probe: bool = True) -> BranchPlan:
    """The plan of one of `shards` equal parts of the global batch (devices times micro-batches), dealt like cards."""
    total, drop = config.train.batch_size, config.model.class_dropout_prob
    batch = total // shards
    if not config.model.conditional:
        drop = 1.0
    null = _round(drop * total)
    if not (probe and config.probe.enabled):
        return BranchPlan(batch, _dealt(null, shard, shards), 0, probe=False)
    if config.probe.branch == "paper":
        return BranchPlan(batch, 0, batch, 1 / batch, 1 / batch, paper=True)
    rho = config.probe.rho if config.model.conditional else 1.0
    extra = 0
    if config.model.conditional:
        extra = _round((drop + config.extra_fraction) * total) - null
    labelled = total - null - extra
    if rho < 1 and labelled == 0:  # rounded away: a batch of 4 at rho = 0.9
        if extra:
            extra, labelled = extra - 1, 1
        else:
            raise UserError(_too_small(total, "labelled", "lower --probe.extra-fraction or --probe.rho"))
    if rho > 0 and null + extra == 0:
        raise UserError(_too_small(total, "unlabelled", "raise --probe.extra-fraction or --model.class-dropout-prob"))
    return BranchPlan(
        batch,
        _dealt(null, shard, shards),
        # The last `extra` positions g of the global batch: those of this shard are dealt from the end.
        batch - _dealt(total - extra, shard, shards),
        null_weight=shards * rho / (null + extra) if null + extra else 0.0,
        labelled_weight=shards * (1 - rho) / labelled if labelled else 0.0,
    )


def _too_small(total: int, kind: str, remedy: str) -> str:
    return f"--train.batch-size {total} leaves no {kind} sample for the probe: use a larger batch, or {remedy}"


def _round(x: float) -> int:
    """To the nearest whole number, halves up, so that a count is right to half a sample."""
    return int(x + 0.5 + 1e-9)


def _dealt(count: int, shard: int, shards: int) -> int:
    """How many of the first `count` positions fall to `shard` when position g goes to shard g mod shards."""
    return (count - shard + shards - 1) // shards
