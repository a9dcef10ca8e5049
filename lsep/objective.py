"""The whole training objective as one module: rows in, loss and statistics out, one graph, no host sync.

Denoising loss plus the LSEP term and, where tokens are aligned, REPA's; with the backbone, the probe's classifier and
the projector as its parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lsep import interpolant, probe, sizes
from lsep.align import align_loss, build_projector, initialize_projector
from lsep.backbone import Backbone, build
from lsep.config import Config
from lsep.data.loader import Batch
from lsep.data.manifest import Manifest
from lsep.interpolant import Stream
from lsep.passes import Second
from lsep.plan import BranchPlan
from lsep.ranges import span
from lsep_kernels.ops import REFERENCE, Ops

TIME_BINS = 10
"""Bins of t in the statistics of the probe."""


class Losses(NamedTuple):
    """Scalars on the device, and the probe's hits and counts over unlabelled samples by bin of t, `(2, TIME_BINS)`.

    total is the sum of the others, which count with their weights and are 0 where they are off.
    """

    total: Tensor
    denoising: Tensor
    lsep: Tensor
    hits: Tensor
    align: Tensor


class Objective(nn.Module):
    """Flow matching and LSEP for one configuration and one data set."""

    def __init__(self, config: Config, manifest: Manifest, ops: Ops = REFERENCE) -> None:
        """`config` must be resolved against `manifest`; `ops` computes what the step is made of."""
        super().__init__()
        sizes.require_weights(config, manifest.probe_classes)
        self.config, self.manifest, self.ops = config, manifest, ops
        self.model: Backbone = build(config, ops)
        self.classifier = (
            probe.build_classifier(config.model.hidden_size, manifest.probe_classes) if config.probe.enabled else None
        )
        align = config.align
        self.projectors = (  # a list of one, as in REPA's weights
            nn.ModuleList([build_projector(align, config.model.hidden_size)]) if align.enabled else None
        )

    def initialize(self, seed: int) -> None:
        """Fill all weights from `seed`, independently of the global random state."""
        generator = torch.Generator().manual_seed(seed)
        self.model.initialize(generator)
        if self.classifier is not None:
            probe.initialize_classifier(self.classifier, generator)
        for projector in self.projectors or ():
            assert isinstance(projector, nn.Sequential)
            initialize_projector(projector, generator)

    def forward(self, batch: Batch, plan: BranchPlan, step: Tensor, epoch: Tensor) -> Losses:
        """Losses of one micro-batch; `step` and `epoch` are int64 scalars on the device."""
        config, seed = self.config, self.config.train.seed
        with span("interpolant"):
            noised = interpolant.noise(batch.x, self.manifest, config.interpolant, seed, epoch, batch.id, self.ops)
        if not plan.probe:
            y = self._drop_first(batch.y, plan.null)
            patches, _, align = self._predicted(noised, y, None, batch.tokens)
            denoising = self._denoising(patches, interpolant.target(config.interpolant, noised))
            zero = torch.zeros_like(denoising)
            hits = torch.zeros(2, TIME_BINS, device=zero.device)
            return Losses(denoising + align, denoising.detach(), zero, hits, align.detach())
        with span("probe"):
            y, extra_y, unlabelled = self.label_states(batch, plan, epoch)
            window = probe.draw_windows(config.probe, config.grid, seed, step, epoch, batch.id, self.ops)
        return self.losses(noised, plan, y, extra_y, unlabelled, batch.probe_y, window, epoch, batch.tokens)

    def label_states(self, batch: Batch, plan: BranchPlan, epoch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Main labels `(B,)`, labels of the second pass `(extra,)`, and what the probe sees unlabelled `(B,)`."""
        null = self.model.null_class
        if not plan.paper:
            place = torch.arange(plan.batch, device=batch.y.device)
            unlabelled = (place < plan.null) | (place >= plan.batch - plan.extra)
            extra_y = torch.full((plan.extra,), null, dtype=torch.int64, device=batch.y.device)
            return self._drop_first(batch.y, plan.null), extra_y, unlabelled
        u = self.ops.uniform(self.config.train.seed, int(Stream.LABEL_DROP), epoch, batch.id)
        drop, rho = self.config.model.class_dropout_prob, self.config.probe.rho
        if not self.config.model.conditional:
            drop = rho = 1.0
        unlabelled = u[:, 1] < rho
        return (
            torch.where(u[:, 0] < drop, null, batch.y),
            torch.where(unlabelled, null, batch.y),
            unlabelled,
        )

    def losses(
        self,
        noised: interpolant.Noised,
        plan: BranchPlan,
        y: Tensor,
        extra_y: Tensor,
        unlabelled: Tensor,
        probe_y: Tensor,
        window: Tensor,
        epoch: Tensor,
        tokens: Tensor | None = None,
    ) -> Losses:
        """All losses for given noise, label states, windows and, to be aligned with, an encoder's tokens."""
        config = self.config.probe
        assert self.classifier is not None
        second = Second(extra_y, config.depth, window, config.pool_before_fc2)
        patches, features, align = self._predicted(noised, y, second, tokens)
        assert features is not None
        with span("probe"):
            weight = torch.where(unlabelled, plan.null_weight, plan.labelled_weight)
            weight = weight * probe.time_weights(config, noised.t)
            norm, linear = self.classifier
            dtype = torch.bfloat16 if self.config.train.precision == "bf16" else None
            lsep, hit = self.ops.probe_head(
                features, norm.weight, norm.bias, linear.weight, linear.bias,
                probe_y, weight, config.label_smoothing, dtype,
            )  # fmt: skip
            lsep = lsep * probe.epoch_factor(config, epoch)
            hits = _hits(hit, unlabelled, noised.t)
        denoising = self._denoising(patches, interpolant.target(self.config.interpolant, noised))
        return Losses(denoising + lsep + align, denoising.detach(), lsep.detach(), hits, align.detach())

    def _predicted(
        self, noised: interpolant.Noised, y: Tensor, second: Second | None, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The prediction as patches, the probe's features with `second`, and the loss of alignment (0 without)."""
        model, config = self.model, self.config.align
        if self.projectors is not None:
            assert tokens is not None, "alignment without an encoder's tokens"
            found = model.forward_aligned(noised.x_t, noised.t, y, config.depth, second)
            with span("align"):
                align = config.weight * align_loss(self.projectors[0](found.tokens), tokens)
            return found.patches, found.features, align
        zero = torch.zeros((), device=noised.t.device)
        if second is None:
            return model.patches(noised.x_t, noised.t, y), None, zero
        patches, features = model.forward_with_probe(noised.x_t, noised.t, y, *second)
        return patches, features, zero

    def _denoising(self, patches: Tensor, v: Tensor) -> Tensor:
        with span("losses"):
            return self.ops.velocity_loss(patches, v, self.model.patch_size).mean()

    def _drop_first(self, y: Tensor, count: int) -> Tensor:
        place = torch.arange(len(y), device=y.device)
        return torch.where(place < count, self.model.null_class, y)


def _hits(hit: Tensor, counted: Tensor, t: Tensor) -> Tensor:
    """Hits and counts of the samples `counted`, for each bin of t: `(2, TIME_BINS)` float32.

    Only unlabelled samples count: with the label in the conditioning, accuracy says nothing about the features.
    """
    bins = probe.time_bins(t, TIME_BINS)
    sums = torch.zeros(2, TIME_BINS, device=t.device)
    values = torch.stack([hit & counted, counted]).to(torch.float32)
    return sums.scatter_add(1, bins.expand(2, -1), values)
