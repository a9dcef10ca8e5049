"""The proofs of the joint pass and of the branch plans."""

from dataclasses import replace

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, relative_error, tiny

from lsep import probe
from lsep.checks import resolve
from lsep.interpolant import Stream, noise
from lsep.objective import TIME_BINS, Losses, Objective
from lsep.plan import BranchPlan, branch_plan
from lsep_kernels.reference import (
    gate_residual,
    mix,
    norm_modulate,
    normal,
    path,
    pool,
    probe_cross_entropy,
    uniform,
    unpatchify,
    velocity_loss,
)

STEP, EPOCH = torch.tensor(3), torch.tensor(0)


def build(**changes: object) -> tuple[Objective, BranchPlan]:
    config = resolve(tiny(**changes), MANIFEST)
    return lively(Objective(config, MANIFEST)), branch_plan(config)


def gradient(objective: Objective, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def features(objective: Objective, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Tokens after the probed block, from a pass of their own."""
    model = objective.model
    h, c = model.x_embedder(x_t) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
    for block in model.blocks[: objective.config.probe.depth]:
        m = block.modulation(c)
        h = gate_residual(h, m.gate1, block.attn(norm_modulate(h, m.shift1, m.scale1)))
        h = gate_residual(h, m.gate2, block.mlp(norm_modulate(h, m.shift2, m.scale2)))
    return h


@pytest.mark.parametrize("pool_before_fc2", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("branch", [("shared", None), ("shared", 0.3), ("shared", 0.0), ("paper", None)])
def test_joint_pass_equals_two_passes(branch: tuple[str, float | None], qk_norm: bool, pool_before_fc2: bool) -> None:
    """For given label states: same losses, same gradients as one pass a branch (fp32, relative error under 1e-5)."""
    objective, plan = build(
        probe__branch=branch[0], probe__extra_fraction=branch[1], probe__pool_before_fc2=pool_before_fc2,
        model__qk_norm=qk_norm, probe__label_smoothing=0.1,
    )  # fmt: skip
    config, batch = objective.config, random_batch(10)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    y, extra_y, unlabelled = objective.label_states(batch, plan, EPOCH)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    joint = objective.losses(noised, plan, y, extra_y, unlabelled, batch.probe_y, window, EPOCH)
    joint_gradient = gradient(objective, joint.total)

    keep = 10 - len(extra_y)
    probe_y = torch.cat([y[:keep], extra_y])
    assert torch.equal(unlabelled, probe_y == 5)
    denoising = velocity_loss(objective.model.patches(noised.x_t, noised.t, y), noised.v, 2).mean()
    h = features(objective, noised.x_t, noised.t, probe_y)
    assert objective.classifier is not None
    ce = probe_cross_entropy(objective.classifier(pool(h, window)), batch.probe_y, 0.1)
    weight = torch.where(unlabelled, plan.null_weight, plan.labelled_weight) * probe.time_weights(
        config.probe, noised.t
    )
    lsep = (weight * ce).sum()
    truth = gradient(objective, denoising + lsep)

    assert relative_error(joint.denoising, denoising) < 1e-5
    assert relative_error(joint.lsep, lsep) < 1e-5
    assert joint_gradient.keys() == truth.keys()
    largest = max(g.abs().max() for g in truth.values())
    for name in truth:
        if name.endswith("k_norm.bias"):  # one vector added to every key: the softmax does not see it, the truth is 0
            assert joint_gradient[name].abs().max() < 1e-6 * largest
            continue
        assert relative_error(joint_gradient[name], truth[name]) < 1e-5, name


def test_paper_term_is_the_mean_of_weighted_cross_entropy() -> None:
    """With the paper's plan the LSEP term is mean_i omega(t_i) CE_i, omega rising over ten bins of t."""
    objective, plan = build(probe__branch="paper")
    batch, config = random_batch(10), objective.config
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    _, extra_y, _ = objective.label_states(batch, plan, EPOCH)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    assert objective.classifier is not None
    logits = objective.classifier(pool(features(objective, noised.x_t, noised.t, extra_y), window))
    log_p = torch.log_softmax(logits, -1)
    omega = [0.0225 + 0.0075 / 9 * min(9, int(10 * t)) for t in noised.t.tolist()]
    truth = -sum(w * log_p[i, y] for i, (w, y) in enumerate(zip(omega, batch.probe_y.tolist(), strict=True))) / 10
    assert relative_error(objective(batch, plan, STEP, EPOCH).lsep, truth) < 1e-5


def plan_gradients(objective: Objective, plan: BranchPlan, draws: int) -> torch.Tensor:
    """Gradients of `draws` draws of the label states at fixed noise, on fixed random directions: `(draws, 24)`."""
    config, batch = objective.config, random_batch(10)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    out = []
    for draw in range(draws):
        # A batch comes in random order; the paper's labels are drawn anew each epoch.
        order = torch.randperm(10, generator=torch.Generator().manual_seed(draw))
        shuffled = type(batch)(*(part[order] for part in batch.tensors()))
        y, extra_y, unlabelled = objective.label_states(shuffled, plan, torch.tensor(draw))
        losses = objective.losses(
            type(noised)(*(part[order] for part in noised)),
            plan, y, extra_y, unlabelled, shuffled.probe_y, window[order], EPOCH,
        )  # fmt: skip
        out.append(project(objective, losses))
    return torch.stack(out)


def project(objective: Objective, losses: Losses) -> torch.Tensor:
    """The gradient's components along eight random directions in each of: first block, probed block, classifier."""
    grads = gradient(objective, losses.total)
    components = []
    for seed, prefix in enumerate(("model.blocks.0.", "model.blocks.1.", "classifier.")):
        part = torch.cat([g.flatten() for n, g in grads.items() if n.startswith(prefix)]).double()
        directions = torch.randn(8, len(part), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        components.append(directions @ part)
    return torch.cat(components)


def expected_gradient(objective: Objective) -> torch.Tensor:
    """The exact expectation over label states: both losses are sums over samples, so three full batches give it."""
    config, batch = objective.config, random_batch(10)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    plan = branch_plan(resolve(tiny(probe__branch="paper"), MANIFEST))
    null, p, rho = torch.full_like(batch.y, 5), 0.1, 0.9
    total = torch.zeros(24, dtype=torch.float64)
    for share, y, probe_y in ((p, null, null), (rho - p, batch.y, null), (1 - rho, batch.y, batch.y)):
        losses = objective.losses(noised, plan, y, probe_y, probe_y == 5, batch.probe_y, window, EPOCH)
        total += share * project(objective, losses)
    return total


@pytest.mark.parametrize("plan", ["paper", "shared", "free"])
def test_mean_gradient_of_every_plan_is_the_papers(plan: str) -> None:
    """paper, shared (e = rho - p) and free (e = 0) agree in expectation, each within its standard error."""
    changes = {"paper": {"probe__branch": "paper"}, "shared": {}, "free": {"probe__extra_fraction": 0.0}}[plan]
    # A larger weight lifts the LSEP gradient out of the denoiser's.
    objective, branch = build(**changes, probe__weight_start=1.0, probe__weight_end=2.0)
    grads = plan_gradients(objective, branch, 300)
    error = (grads.mean(0) - expected_gradient(objective)).abs()
    standard = grads.std(0) / 300**0.5
    assert (error / standard).max() < 4  # 24 components: 4 sigma is one false alarm in 600 seeds; the seeds are fixed


def test_the_expectation_test_sees_wrong_weights() -> None:
    """Without the weights of the plan, e = 0 is biased, and the test above would say so."""
    objective, branch = build(probe__extra_fraction=0.0, probe__weight_start=1.0, probe__weight_end=2.0)
    grads = plan_gradients(objective, replace(branch, null_weight=0.1, labelled_weight=0.1), 300)
    error = (grads.mean(0) - expected_gradient(objective)).abs()
    assert (error / (grads.std(0) / 300**0.5)).max() > 8


def test_probe_reads_its_own_label_column() -> None:
    objective, plan = build()
    assert objective.classifier is not None and objective.classifier[1].out_features == 7
    batch = random_batch(10)
    other = batch._replace(probe_y=(batch.probe_y + 1) % 7)
    a, b = (objective(one, plan, STEP, EPOCH) for one in (batch, other))
    assert a.denoising == b.denoising
    assert a.lsep != b.lsep


def test_unconditional_model_ignores_the_label() -> None:
    objective, plan = build(model__conditional=False)
    batch = random_batch(10)
    a, b = (objective(one, plan, STEP, EPOCH) for one in (batch, batch._replace(y=(batch.y + 1) % 5)))
    assert a.total == b.total
    grads = gradient(objective, a.total)
    assert grads["model.y_embedder.embedding_table.weight"][:5].abs().max() == 0
    assert grads["classifier.1.weight"].abs().max() > 0


def test_without_probe_it_is_plain_sit() -> None:
    objective, plan = build()
    plain, _ = build(probe__enabled=False)
    plain.model.load_state_dict(objective.model.state_dict())
    batch = random_batch(10)
    off = branch_plan(objective.config, probe=False)
    ended, never = objective(batch, off, STEP, EPOCH), plain(batch, off, STEP, EPOCH)
    assert ended.total == never.total == objective(batch, plan, STEP, EPOCH).denoising
    assert ended.lsep == 0


def test_hits_count_unlabelled_samples_by_time() -> None:
    objective, plan = build()
    hits = objective(random_batch(10), plan, STEP, EPOCH).hits
    assert hits.shape == (2, TIME_BINS)
    assert hits[1].sum() == plan.null + plan.extra
    assert (hits[0] <= hits[1]).all()


def test_term_fades_with_the_epoch() -> None:
    objective, plan = build(probe__decay_start_epoch=2, probe__decay_epochs=10)
    batch = random_batch(10)
    config = objective.config
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    states = objective.label_states(batch, plan, EPOCH)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    values = [
        float(objective.losses(noised, plan, *states, batch.probe_y, window, torch.tensor(epoch)).lsep)
        for epoch in (0, 2, 12, 22)
    ]
    assert values[0] == values[1]
    assert values[2] / values[0] == pytest.approx(0.1)
    assert values[3] / values[0] == pytest.approx(0.01)


@pytest.mark.parametrize(("branch", "bf16"), [("shared", False), ("paper", False), ("shared", True)])
def test_compiles_as_one_graph(branch: str, bf16: bool) -> None:
    """`fullgraph=True` raises on any graph break; values and gradients stay those of eager, also under autocast."""
    objective, plan = build(probe__branch=branch, model__depth=2)
    batch = random_batch(10)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        eager, traced = objective(batch, plan, STEP, EPOCH), compiled(batch, plan, STEP, EPOCH)
    truth, got = gradient(objective, eager.total), gradient(objective, traced.total)
    bound = 0.05 if bf16 else 1e-5  # bf16 keeps 8 bits, and the compiled backward rounds in another order
    assert relative_error(traced.total, eager.total) < bound
    for name in truth:
        assert relative_error(got[name], truth[name]) < bound, name


@pytest.mark.parametrize("wide", [False, True])
def test_type_of_the_residual_stream(wide: bool) -> None:
    objective, _ = build(train__fp32_residual=wide)
    seen: list[torch.dtype] = []
    objective.model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        objective.model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    assert seen == [torch.float32 if wide else torch.bfloat16]


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize(("kind", "prediction"), [("vp", "eps"), ("vp", "v"), ("linear", "x"), ("cosine", "eps")])
def test_the_loss_of_every_prediction(kind: str, prediction: str, probed: bool) -> None:
    """The mean square of what the model gives less the noise drawn, the data, or the velocity of both."""
    objective, plan = build(interpolant__path=kind, interpolant__prediction=prediction, probe__enabled=probed)
    batch, seed = random_batch(10), objective.config.train.seed
    t = uniform(seed, Stream.TIME, EPOCH, batch.id)[:, 0]
    e = normal(seed, Stream.NOISE, EPOCH, batch.id, (3, 8, 8))
    x_t, v = mix(batch.x, t, e, kind)
    place = torch.arange(10)
    y = torch.where(place < plan.null, objective.model.null_class, batch.y)
    patches = objective.model.patches(x_t, t, y)
    truth = velocity_loss(patches, {"eps": e, "x": batch.x, "v": v}[prediction], 2).mean()
    assert relative_error(objective(batch, plan, STEP, EPOCH).denoising, truth) < 1e-5


def test_the_model_hands_out_velocities() -> None:
    objective, _ = build(interpolant__path="vp", interpolant__prediction="eps")
    model, x, y = objective.model, torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 5])
    t = torch.tensor([0.0, 0.3, 1.0])
    inner = torch.tensor([1e-3, 0.3, 0.999])
    e = unpatchify(model.patches(x, inner, y), 2)
    alpha, sigma, d_alpha, d_sigma = (k.view(3, 1, 1, 1) for k in path(inner, "vp"))
    assert relative_error(model(x, t, y), d_alpha * (x - sigma * e) / alpha + d_sigma * e) < 1e-6
