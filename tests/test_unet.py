"""The seam between trainer and model, and the U-Net behind it: one pass or two, trained, resumed, sampled, refused."""

import builtins
import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, relative_error, tiny
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from lsep import checkpoint, cli, probe, sample
from lsep.backbone import Backbone, build
from lsep.checks import check, resolve, resolve_align
from lsep.config import Config, from_dict
from lsep.cost import flops
from lsep.cost.floors import step_work
from lsep.diagnose import not_finite
from lsep.errors import UserError
from lsep.evaluate.monitor import Monitor
from lsep.interpolant import Noised, noise, target
from lsep.model import SiT
from lsep.objective import Objective
from lsep.plan import BranchPlan, branch_plan
from lsep.run import Run
from lsep.step import setup
from lsep.train import train
from lsep.unet import TIME_SCALE, UNet
from lsep_kernels.reference import pool, probe_cross_entropy, unpatchify, velocity_loss

pytest.importorskip("diffusers", reason='pip install "diffusers>=0.32"')

TESTS = Path(__file__).parent
STEP, EPOCH = torch.tensor(3), torch.tensor(0)
SMALL = {
    "model__backbone": "unet", "model__depth": 2, "model__layers_per_level": 1, "model__patch_size": 1,
    "probe__depth": 1,
}  # fmt: skip
"""Levels of 16 and 32 channels; over 8 x 8 pixels the mid-block has 4 x 4 positions."""


def small(**changes: Any) -> Config:
    return tiny(**{**SMALL, **changes})


def objective_and_plan(config: Config) -> tuple[Objective, BranchPlan]:
    config = resolve(config, MANIFEST)
    return lively(Objective(config, MANIFEST)), branch_plan(config)


def gradient(objective: Objective, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def hooked(model: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' own forward gives, and its mid-block's output as tokens."""
    seen: list[torch.Tensor] = []
    handle = model.unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        out = model.unet(x, t * TIME_SCALE, y).sample
    finally:
        handle.remove()
    return out, seen[0].flatten(2).transpose(1, 2)


@pytest.mark.parametrize("backbone", ["sit", "unet"])
def test_backbones_have_the_protocols_methods(backbone: str) -> None:
    """All of them, by name, with the same parameters, defaults and results."""
    model = build(resolve(small() if backbone == "unet" else tiny(), MANIFEST))
    assert isinstance(model, Backbone) and isinstance(model, UNet if backbone == "unet" else SiT)
    assert not isinstance(torch.nn.Linear(1, 1), Backbone)
    for name in ("features", "patches", "forward_with_probe", "forward_aligned", "initialize", "compile_blocks"):
        assert inspect.signature(getattr(type(model), name)) == inspect.signature(getattr(Backbone, name)), name
    assert inspect.signature(type(model).forward) == inspect.signature(Backbone.__call__)
    assert model.null_class == 5 and model.patch_size == (1 if backbone == "unet" else 2)


def test_the_pass_is_diffusers_own() -> None:
    objective, _ = objective_and_plan(small(model__depth=3, model__layers_per_level=2))
    model = objective.model
    assert isinstance(model, UNet)
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 4, 5, 2])
    out, mid = hooked(model, x, t, y)
    assert mid.shape == (4, 4, 32)
    assert torch.equal(model.features(x, t, y, [1])[0], mid)
    assert torch.equal(unpatchify(model.patches(x, t, y), 1), out)
    assert torch.equal(model(x, t, y), out)
    null = hooked(model, x, t, torch.full_like(y, 5))[1]
    assert not torch.allclose(null, mid, atol=1e-3) and torch.equal(null[2], mid[2])


@pytest.mark.parametrize("branch", [("shared", None), ("shared", 0.3), ("shared", 0.0), ("paper", None)])
def test_joint_pass_equals_two_passes(branch: tuple[str, float | None]) -> None:
    """For given label states: same losses, same gradients as one pass a branch (fp32, relative error under 1e-5)."""
    objective, plan = objective_and_plan(small(probe__branch=branch[0], probe__extra_fraction=branch[1]))
    config, batch = objective.config, random_batch(10)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    y, extra_y, unlabelled = objective.label_states(batch, plan, EPOCH)
    window = probe.draw_windows(config.probe, config.grid, 0, STEP, EPOCH, batch.id)
    joint = objective.losses(noised, plan, y, extra_y, unlabelled, batch.probe_y, window, EPOCH)
    joint_gradient = gradient(objective, joint.total)

    denoising, lsep = separate(objective, plan, noised, y, extra_y, batch.probe_y, window)
    truth = gradient(objective, denoising + lsep)
    assert relative_error(joint.denoising, denoising) < 1e-5
    assert relative_error(joint.lsep, lsep) < 1e-5
    assert joint_gradient.keys() == truth.keys() == dict(objective.named_parameters()).keys()
    largest = max(g.abs().max() for g in truth.values())
    for name in truth:
        if name.endswith("to_k.bias"):  # one vector added to every key: the softmax does not see it, the truth is 0
            assert joint_gradient[name].abs().max() < 1e-6 * largest
            continue
        assert relative_error(joint_gradient[name], truth[name]) < 1e-5, name


@pytest.mark.parametrize("changes", [{}, {"probe__branch": "paper"}, {"probe__enabled": False}])
def test_the_mid_block_is_aligned_in_the_same_pass(changes: dict[str, Any]) -> None:
    """REPA on a U-Net: the main pass's mid-block as diffusers' own forward has it, and no more FLOPs (under 1e-5)."""
    given = {"align__features": "x", "align__depth": 1, "align__projector_dim": 16}
    config = resolve_align(resolve(small(**given, **changes), MANIFEST), (24, 16))
    objective, plan, batch = lively(Objective(config, MANIFEST)), branch_plan(config), random_batch(10)
    model, wanted = objective.model, torch.randn(10, 16, 24, generator=torch.Generator().manual_seed(5))
    with FlopCounterMode(display=False) as counter:
        losses = objective(batch._replace(tokens=wanted), plan, STEP, EPOCH)
        got = gradient(objective, losses.total)
    assert isinstance(model, UNet) and objective.projectors is not None

    plain = Objective(resolve(small(**changes), MANIFEST), MANIFEST)
    plain.load_state_dict({k: v for k, v in objective.state_dict().items() if not k.startswith("projectors.")})
    with FlopCounterMode(display=False) as fewer:
        others = plain(batch, plan, STEP, EPOCH)
        truth = gradient(plain, others.total)
    assert counter.get_total_flops() - fewer.get_total_flops() == 6 * 10 * 16 * (32 * 16 + 16 * 16 + 16 * 24)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    y = objective.label_states(batch, plan, EPOCH)[0] if plan.probe else objective._drop_first(batch.y, plan.null)
    z = objective.projectors[0](hooked(model, noised.x_t, noised.t, y)[1])
    loss = 0.5 * (1 - torch.nn.functional.cosine_similarity(z, wanted, dim=-1).mean())
    own = gradient(objective, loss)
    assert relative_error(losses.align, loss) < 1e-5
    assert relative_error(losses.total, others.total + loss) < 1e-5
    assert got.keys() == truth.keys() | own.keys()
    largest = max(g.abs().max() for g in got.values())
    for name, found in got.items():
        whole = truth.get(name, 0) + own.get(name, torch.zeros(()))
        if name.endswith("to_k.bias"):  # see above: the truth is 0
            assert found.abs().max() < 1e-6 * largest
            continue
        assert relative_error(found, whole) < 1e-5, name


def separate(
    objective: Objective, plan: BranchPlan, noised: Noised, y: torch.Tensor, extra_y: torch.Tensor,
    probe_y: torch.Tensor, window: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Both losses from diffusers' own forward, run once a branch."""
    model, config = objective.model, objective.config
    assert isinstance(model, UNet) and objective.classifier is not None
    labels = torch.cat([y[: len(y) - len(extra_y)], extra_y])
    predicted, (_, mid) = hooked(model, noised.x_t, noised.t, y)[0], hooked(model, noised.x_t, noised.t, labels)
    wanted = target(config.interpolant, noised)
    denoising = (predicted - wanted).square().mean()
    ce = probe_cross_entropy(objective.classifier(pool(mid, window)), probe_y, 0.0)
    weight = torch.where(labels == 5, plan.null_weight, plan.labelled_weight)
    return denoising, (weight * probe.time_weights(config.probe, noised.t) * ce).sum()


@pytest.mark.parametrize("backbone", ["sit", "unet"])
def test_noise_prediction_with_the_probe(backbone: str) -> None:
    """eps on the variance-preserving path: the loss is that of the noise, the LSEP term that of the same features."""
    changes = {"interpolant__path": "vp", "interpolant__prediction": "eps"}
    objective, plan = objective_and_plan(small(**changes) if backbone == "unet" else tiny(**changes))
    config, batch = objective.config, random_batch(10)
    noised = noise(batch.x, MANIFEST, config.interpolant, config.train.seed, EPOCH, batch.id)
    found = objective(batch, plan, STEP, EPOCH)
    y, extra_y, unlabelled = objective.label_states(batch, plan, EPOCH)
    window = probe.draw_windows(config.probe, config.grid, config.train.seed, STEP, EPOCH, batch.id)
    patches = objective.model.patches(noised.x_t, noised.t, y)
    denoising = velocity_loss(patches, target(config.interpolant, noised), objective.model.patch_size).mean()
    labels = torch.where(unlabelled, objective.model.null_class, batch.y)
    features = objective.model.features(noised.x_t, noised.t, labels, [config.probe.depth])[0]
    assert objective.classifier is not None
    ce = probe_cross_entropy(objective.classifier(pool(features, window)), batch.probe_y, 0.0)
    weight = torch.where(unlabelled, plan.null_weight, plan.labelled_weight)
    lsep = (weight * probe.time_weights(config.probe, noised.t) * ce).sum()
    assert len(extra_y) == plan.extra == 8
    assert relative_error(found.denoising, denoising) < 1e-5
    assert relative_error(found.lsep, lsep) < 1e-5


def test_initialisation_is_the_seeds_and_predicts_zero() -> None:
    config = resolve(small(), MANIFEST)
    models = []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global random state must not count
        objective = Objective(config, MANIFEST)
        objective.initialize(seed)
        models.append(objective.model)
    a, b, c = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a, c, strict=True))
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert models[0](x, t, y).abs().max() == 0
    assert models[0].features(x, t, y, [1])[0].std() > 0.1


def test_compiles_as_one_graph() -> None:
    """`fullgraph=True` raises on any graph break."""
    objective, plan = objective_and_plan(small(model__depth=1))
    batch, counter = random_batch(10), CompileCounter()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend=counter)
    eager, traced = objective(batch, plan, STEP, EPOCH), compiled(batch, plan, STEP, EPOCH)
    assert counter.frame_count == 1
    assert relative_error(traced.total, eager.total) < 1e-6


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("bf16", [False, True])
def test_compiles_by_blocks(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels down and up and the mid-block, each whole, also under autocast; names of weights stay."""
    counter = CompileCounter()
    compiler = torch.compile  # the counter takes none of Inductor's options
    monkeypatch.setattr("torch.compile", lambda f, options, **kw: compiler(f, backend=counter, **kw))
    model = objective_and_plan(small())[0].model
    assert isinstance(model, UNet)
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 4, 5])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        eager, names = model(x, t, y), list(model.state_dict())
        model.compile_blocks()
        assert relative_error(model(x, t, y), eager) < 1e-6
    assert counter.frame_count == 5
    assert list(model.state_dict()) == names


def test_flops_are_those_of_the_layers() -> None:
    """Of a small net by hand, and what the second pass adds; the probe's parts are counted as for a SiT."""
    config = resolve(small(model__depth=1, probe__window_min=4), MANIFEST)  # 32 channels on 8 x 8 positions
    c, pixels = 32, 64

    def resnet(channels_in: int) -> int:
        shortcut = 0 if channels_in == c else channels_in * c * pixels
        return 2 * (9 * channels_in * c * pixels + 9 * c * c * pixels + shortcut + 4 * c * c)

    attention = 2 * (4 * c * c * pixels + 2 * pixels * pixels * c)
    down = 2 * (9 * 3 * c * pixels + c * 4 * c + 16 * c * c) + resnet(c) + attention + 2 * resnet(c) + attention
    up = 2 * (resnet(2 * c) + attention) + 2 * 9 * c * 3 * pixels
    plan = branch_plan(config)
    found = flops.parts(config, plan, 7)
    assert found["U-Net"].forward == 10 * (down + up)
    assert found["second pass: U-Net"].forward == 8 * down
    assert found["U-Net"].training == 3 * found["U-Net"].forward - 10 * 2 * (9 * 3 * c * pixels + c * 4 * c)
    assert found["probe head"].forward == 2 * 10 * c * 7
    work = step_work(config, MANIFEST, 1000, 4, probe=True)
    assert set(work) == {"optimizer", "interpolant", "losses", "probe", "other"}
    assert work["other"].flops == found["U-Net"].training + found["second pass: U-Net"].training


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    parts = ("model", "ema", "optimizer")
    folder = run / "checkpoints" / f"{step:07d}"
    return {f"{part}:{k}": v for part in parts for k, v in checkpoint.read_tensors(folder, part).items()}


class Stopped(Exception):
    """A training that ended early."""


def test_run_resumed_and_used(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run broken off goes on bit for bit; then it is drawn from, reported, probed and exported, and not imported."""
    config = small(data__path=str(store), train__steps=8, sample__steps=2, sample__num=4, train__overhead_rounds=1)
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("lsep.train.train_step", stop_at(6))
        with pytest.raises(Stopped):
            train(config, tmp_path / "broken")
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints").name == "0000004"  # type: ignore[union-attr]
    train(config, tmp_path / "broken", resume=True)
    one, two = tensors(whole.path, 8), tensors(tmp_path / "broken", 8)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(k.startswith("ema:unet.mid_block.") for k in one)
    assert [m["loss"] for m in Run(tmp_path / "broken").metrics()] == [m["loss"] for m in whole.metrics()]
    assert "lsep_overhead" in whole.results()
    report = whole.report_file.read_text()
    assert "U-Net, levels of 16, 32 channels with 1 layers each, 2 heads" in report and "mid-block" in report

    run = str(whole.path)
    assert cli.main(["sample", run, "--num", "3", "--cfg", "2", "--out", str(tmp_path / "drawn")]) == 0
    probed = ["probe", run, "--num", "43", "--times", "0.2", "--seeds", "1", "--json", "--out", str(tmp_path / "probe")]
    capsys.readouterr()
    assert cli.main(probed) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["depths"] == [1] and len(found["token_map"][0][0]) == 4
    assert cli.main(["probe", run, "--depths", "2"]) == 2
    assert f"--depths holds 2, but {run} has features in its mid-block alone, expected 1" in capsys.readouterr().err
    exported(run, tmp_path, capsys)


def stop_at(step: int) -> Any:
    from lsep.step import train_step

    def stepped(state: Any, at: int, *args: Any) -> torch.Tensor:
        if at == step:
            raise Stopped
        return train_step(state, at, *args)

    return stepped


def exported(run: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As safetensors and for diffusers, which gives the same velocity; not for SiT's code, and not back in."""
    from diffusers import UNet2DModel

    for form in ("safetensors", "diffusers"):
        assert cli.main(["export", run, "--format", form, "--out", str(out / form)]) == 0
    assert "unet.mid_block.resnets.0.conv1.weight" in load_file(out / "safetensors" / "model.safetensors")
    card = (out / "diffusers" / "README.md").read_text()
    assert "class-conditional U-Net" in card and "UNet2DModel.from_pretrained" in card
    theirs, report = UNet2DModel.from_pretrained(out / "diffusers", low_cpu_mem_usage=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model = sample.load_ema(Run(run))[0]
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 3, 5])
    assert torch.equal(theirs(x, 1000 * t, y).sample, model(x, t, y))
    capsys.readouterr()
    assert cli.main(["export", run, "--format", "sit", "--out", str(out / "sit")]) == 2
    assert "holds a U-Net, expected --format safetensors or diffusers" in capsys.readouterr().err
    for made in ("safetensors/model.safetensors", "diffusers"):
        assert cli.main(["import", str(out / made), "--out", str(out / "back")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "model.safetensors: holds a U-Net, expected the weights of a SiT or DiT" in errors[0]
    assert "_class_name is 'UNet2DModel', expected 'DiTTransformer2DModel'" in errors[1]


def test_it_learns(store: Path) -> None:
    """One batch again and again: both losses fall, and the monitor measures a distance."""
    from lsep.step import open_loader, train_step

    config = small(
        data__path=str(store), optim__lr=3e-3, optim__probe_lr=3e-2, train__eval_every=1, probe__weight_start=1.0,
        probe__weight_end=1.0, evaluate__features=f"{TESTS / 'test_unet.py'}:mean_pixels", evaluate__num=12,
        sample__steps=2,
    )  # fmt: skip
    state = setup(config)
    batches = next(iter(open_loader(state, 0, 1)))
    losses = [train_step(state, 3, batches)[:2] for _ in range(60)]
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1]
    assert "are finite" in not_finite(state, 3, [batches[0]])
    with torch.no_grad():
        next(state.learning.model.parameters()).fill_(torch.nan)
    assert "the denoising loss of sample" in not_finite(state, 3, [batches[0]])
    monitor = Monitor(state)
    monitor.prepare(Path(config.data.path or "").parent)
    assert math.isfinite(monitor.distance(1))


def mean_pixels(x: Any, device: Any) -> Any:
    """Features of latents for the monitor: their means over places."""
    return x.mean((2, 3))


mean_pixels.latents = True  # type: ignore[attr-defined]


def test_older_configurations_are_those_of_a_sit() -> None:
    values = asdict(tiny())
    del values["model"]["backbone"], values["model"]["layers_per_level"]
    assert from_dict(values, "old") == tiny()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__patch_size": 2}, "--model.patch-size is 2, expected 1: a U-Net has no patches"),
        ({"model__mlp_ratio": 2.0}, "--model.mlp-ratio is 2.0, expected its default 4.0 with --model.backbone unet"),
        ({"model__qk_norm": True}, "--model.qk-norm is True, expected its default False with"),
        ({"probe__pool_before_fc2": False}, "--probe.pool-before-fc2 is False, expected its default True with"),
        ({"train__fp8": True}, "--train.fp8 is True, expected its default False with"),
        ({"train__fp32_residual": True}, "--train.fp32-residual is True, expected its default False with"),
        ({"train__memory": "recompute-blocks"}, "--train.memory is 'recompute-blocks', expected its default 'auto'"),
        ({"backend__attention": "sdpa"}, "--backend.attention is 'sdpa', expected its default 'auto' with"),
        ({"backend__modulation": "joint"}, "--backend.modulation is 'joint', expected its default 'auto' with"),
        ({"backend__mlp": "torch"}, "--backend.mlp is 'torch', expected its default 'auto' with"),
        ({"model__depth": 17}, "--model.depth is 17, expected at most 16 levels of a U-Net"),
        ({"model__hidden_size": 36}, "--model.hidden-size is 36, expected a multiple of 8 for the norms of a U-Net"),
        ({"model__hidden_size": 264}, "--model.hidden-size is 264, expected a multiple of 64 for the norms of a U-Net"),
        ({"model__layers_per_level": 0}, "--model.layers-per-level is 0, expected at least 1"),
        ({"dist__mode": "fsdp"}, "--dist.mode is 'fsdp', expected 'ddp': the weights of a U-Net are not sharded"),
        ({"probe__depth": 2}, "--probe.depth is 2, expected 1: the probe of a U-Net reads its mid-block"),
        ({"align__features": "f"}, "--align.depth is 8, expected 1: what is aligned of a U-Net is its mid-block"),
    ],
)  # fmt: skip
def test_check_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(small(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_levels_are_not_for_a_sit() -> None:
    with pytest.raises(
        UserError, match="--model.layers-per-level is 3, expected its default 2: --model.backbone is 'sit'"
    ):
        check(tiny(model__layers_per_level=3))


def test_a_probe_that_is_off_has_no_depth() -> None:
    check(small(probe__enabled=False, probe__depth=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__depth": 5, "model__hidden_size": 64},
            "--model.depth is 5, whose levels halve a side 4 times, but the data's is 8, expected a multiple of 16",
        ),
        ({"probe__window_min": 5}, "--probe.window-min is 5, expected at most the mid-block's side 4"),
        ({"probe__window_max": 5}, "--probe.window-max is 5, expected at most the mid-block's side 4"),
    ],
)  # fmt: skip
def test_resolve_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(small(**changes), MANIFEST)
    assert message in str(caught.value)


def test_without_diffusers_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One sentence before the data is looked at, which is not there either."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        train(small(data__path=str(tmp_path / "gone")), tmp_path / "run")
    assert str(caught.value) == (
        "--model.backbone unet needs diffusers, which cannot be imported (No module named 'diffusers'): "
        'pip install "diffusers>=0.32"'
    )
    assert not (tmp_path / "run").exists()
