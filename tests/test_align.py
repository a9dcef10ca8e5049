"""REPA beside LSEP: the main pass's own tokens, their loss, training with it, and what is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, MANIFEST, ROWS, WIDTH, aligned, batches, lively, random_batch, relative_error, tiny
from safetensors.torch import load_file, save_file
from test_dist import TESTS, torchrun
from test_graphs import Recorded
from test_graphs import curve as replayed
from torch.utils.flop_counter import FlopCounterMode

from lsep import checkpoint
from lsep.align import align_loss
from lsep.checks import resolve, resolve_align
from lsep.cli import main
from lsep.cost import flops
from lsep.data.writer import write_store
from lsep.encoder import Encoder
from lsep.errors import UserError
from lsep.interpolant import noise
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.step import setup
from lsep.train import train
from lsep_kernels.reference import gate_residual, norm_modulate

pytest.importorskip("transformers", reason='pip install -e ".[align]"')

STEP, EPOCH = torch.tensor(3), torch.tensor(0)
UNET = {
    "model__backbone": "unet", "model__depth": 2, "model__layers_per_level": 1, "model__patch_size": 1,
    "probe__depth": 1, "align__depth": 1,
}  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"probe__branch": "paper"}, {"probe__enabled": False}])
def test_the_joint_pass_has_losses_and_gradients_of_separate_ones(depth: int, changes: dict[str, Any]) -> None:
    """Tokens before, at and after the probed block: those of a pass of the main branch alone (fp32, under 1e-5)."""
    config = resolve(tiny(align__features="x", align__depth=depth, align__projector_dim=16, **changes), MANIFEST)
    config = resolve_align(config, (WIDTH, 16))
    objective, plan, batch = lively(Objective(config, MANIFEST)), branch_plan(config), random_batch(10)
    wanted = torch.randn(10, 16, WIDTH, generator=torch.Generator().manual_seed(5))
    losses = objective(batch._replace(tokens=wanted), plan, STEP, EPOCH)
    losses.total.backward()
    got = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}

    plain = Objective(resolve(tiny(**changes), MANIFEST), MANIFEST)
    plain.load_state_dict({k: v for k, v in objective.state_dict().items() if not k.startswith("projectors.")})
    others = plain(batch, plan, STEP, EPOCH)
    noised = noise(batch.x, MANIFEST, config.interpolant, 0, EPOCH, batch.id)
    y = objective.label_states(batch, plan, EPOCH)[0] if plan.probe else objective._drop_first(batch.y, plan.null)
    model = plain.model
    h, c = model.x_embedder(noised.x_t) + model.pos_embed, model.t_embedder(noised.t) + model.y_embedder(y)
    for block in model.blocks[:depth]:
        m = block.modulation(c)
        h = gate_residual(h, m.gate1, block.attn(norm_modulate(h, m.shift1, m.scale1)))
        h = gate_residual(h, m.gate2, block.mlp(norm_modulate(h, m.shift2, m.scale2)))
    assert objective.projectors is not None
    objective.zero_grad()
    z = objective.projectors[0](h)
    cosine = (z * wanted).sum(-1) / (z.norm(dim=-1) * wanted.norm(dim=-1))
    loss = 0.5 * (1 - cosine.mean())
    (others.total + loss).backward()
    truth = {n: p.grad for n, p in (*plain.named_parameters(), *objective.projectors.named_parameters("projectors"))}
    truth = {n: g for n, g in truth.items() if g is not None}
    assert relative_error(losses.align, loss) < 1e-5
    for name in ("denoising", "lsep", "hits"):
        assert torch.equal(getattr(losses, name), getattr(others, name))
    assert relative_error(losses.total, others.total + loss) < 1e-5
    assert got.keys() == truth.keys()
    for name in truth:
        assert relative_error(got[name], truth[name]) < 1e-5, name


def test_the_loss_is_one_minus_the_cosine_whatever_the_lengths() -> None:
    a, b = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert relative_error(align_loss(3 * a, b), align_loss(a, 7 * b)) < 1e-6
    assert float(align_loss(a, 2 * a)) < 1e-6 and abs(float(align_loss(a, -a)) - 2) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"probe__enabled": False}])
def test_alignment_costs_its_projector_and_no_pass(changes: dict[str, Any]) -> None:
    """Torch's count of FLOPs, forward and backward, with and without; and ours of the projector."""
    counts, ours = [], []
    for more in ({}, {"align__features": "x", "align__depth": 2, "align__projector_dim": 16}):
        config = resolve(tiny(**changes, **more), MANIFEST)
        config = resolve_align(config, (WIDTH, 16) if more else None)
        objective, plan = lively(Objective(config, MANIFEST)), branch_plan(config)
        batch = random_batch(10)._replace(tokens=torch.randn(10, 16, WIDTH) if more else None)
        with FlopCounterMode(display=False) as counter:
            objective(batch, plan, STEP, EPOCH).total.backward()
        counts.append(counter.get_total_flops())
        ours.append(flops.parts(config, plan, 7).get("projector", flops.Flops(0, 0)).training)
    projector = 6 * 10 * 16 * (32 * 16 + 16 * 16 + 16 * WIDTH)
    assert ours == [0, projector] and counts[1] - counts[0] == projector


def test_images_of_the_data_itself_give_the_curve_of_stored_features(
    pixels: np.ndarray, dino: Path, tmp_path: Path
) -> None:
    write_store(tmp_path / "pixels", kind="pixels", x=pixels[:, :, ::8, ::8].copy(), y=LABELS, num_classes=5)
    command = ["data", "features", str(tmp_path / "pixels"), str(tmp_path / "f"), "--encoder", str(dino)]
    assert main([*command, "--dtype", "float32"]) == 0
    curves = [
        replayed(setup(aligned(tmp_path / "pixels", **given)), 4)
        for given in ({"align__encoder": str(dino)}, {"align__features": str(tmp_path / "f")})
    ]
    assert relative_error(*curves) < 1e-4 and float(curves[0][:, -2].min()) > 0


def test_training_draws_the_tokens_to_the_encoders_and_goes_on_exactly(
    latents: Path, features: Path, tmp_path: Path
) -> None:
    """LSEP and REPA together; 20 + 20 steps have the bits of 40, projector, averages and moments included."""
    given = {"align__features": str(features), "train__steps": 40, "train__checkpoint_every": 20, "optim__lr": 3e-3}
    whole = train(aligned(latents, **given), tmp_path / "whole")
    train(aligned(latents, **{**given, "train__steps": 20}), tmp_path / "parts")
    parts = train(aligned(latents, **given), tmp_path / "parts", resume=True)
    for part in ("model", "ema", "optimizer"):
        one, two = (checkpoint.read_tensors(checkpoint.find(r.checkpoints, 40), part) for r in (whole, parts))
        assert one.keys() == two.keys() and any(name.startswith("projectors.") for name in one) == (part != "optimizer")
        assert all(torch.equal(one[name], two[name]) for name in one)
    lines = whole.metrics()
    assert lines[-1]["align"] < 0.8 * lines[0]["align"] and lines[-1]["lsep"] > 0
    assert abs(lines[-1]["loss"] - sum(lines[-1][k] for k in ("denoising", "lsep", "align"))) < 1e-9
    assert "align" in (tmp_path / "whole" / "report.html").read_text()
    assert main(["sample", str(tmp_path / "whole"), "--num", "4", "--steps", "2"]) == 0
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "sit"), "--format", "sit"]) == 0
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "own")]) == 0
    assert main(["import", str(tmp_path / "own" / "model.safetensors"), "--out", str(tmp_path / "again")]) == 0
    one, two = (
        checkpoint.read_tensors(checkpoint.find(tmp_path / r / "checkpoints", None), "ema") for r in ("whole", "again")
    )
    assert two and all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_a_run_goes_on_with_the_same_tokens_only(
    latents: Path, features: Path, images: Path, dino: Path, tmp_path: Path
) -> None:
    """Wherever encoder, images or features lie by now; an encoder that was swapped in its place is noticed."""
    shutil.copytree(features, tmp_path / "moved")
    shutil.copytree(dino, tmp_path / "encoder")
    shutil.copytree(images, tmp_path / "images")
    x = np.random.default_rng(9).normal(size=(ROWS, WIDTH, 4, 4)).astype(np.float32)
    write_store(tmp_path / "others", kind="features", x=x, y=LABELS, num_classes=5, flip=x, shard_rows=13)

    def go_on(steps: int, run: str, **given: Any) -> None:
        train(aligned(latents, train__steps=steps, **{f"align__{k}": str(v) for k, v in given.items()}), tmp_path / run)

    go_on(1, "stored", features=features)
    go_on(2, "stored", features=tmp_path / "moved")
    with pytest.raises(UserError, match=r"\(align.features's sha256: '[0-9a-f]{64}' -> '[0-9a-f]{64}'\): choose"):
        go_on(3, "stored", features=tmp_path / "others")
    with pytest.raises(UserError, match=r"align.encoder's sha256: None -> '.*align.features's sha256: '.*' -> None"):
        go_on(3, "stored", encoder=dino, images=images)
    with pytest.raises(UserError, match=r"align.features's sha256: '.*' -> None"):
        train(aligned(latents, train__steps=3), tmp_path / "stored")
    go_on(1, "encoded", encoder=dino, images=images)
    go_on(2, "encoded", encoder=tmp_path / "encoder", images=tmp_path / "images")
    (tmp_path / "images" / "00000" / "img00000000.png").rename(tmp_path / "images" / "00000" / "img.png")
    with pytest.raises(UserError, match=r"\(align.images's sha256: '.*' -> '.*'\)"):
        go_on(3, "encoded", encoder=dino, images=tmp_path / "images")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights["encoder.layer.1.mlp.fc2.bias"] += 1e-3
    save_file(weights, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"\(align.encoder's sha256: '.*' -> '.*'\)"):
        go_on(3, "encoded", encoder=tmp_path / "encoder", images=images)
    go_on(3, "encoded", encoder=dino, images=images)
    config = tmp_path / "encoded" / "config.json"
    values = json.loads(config.read_text())
    del values["teacher"]  # as runs of earlier versions have it
    values["align"]["size"] = None
    config.write_text(json.dumps(values))
    go_on(4, "encoded", encoder=dino, images=images)
    assert json.loads(config.read_text())["teacher"].keys() == {"encoder", "images"}
    config.write_text(json.dumps({**values, "teacher": 3}))
    with pytest.raises(UserError, match=r"config.json: teacher is 3, expected an object"):
        go_on(5, "encoded", encoder=dino, images=images)


def test_the_mid_block_of_a_unet_is_drawn_to_the_encoders(latents: Path, features: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    given = {**UNET, "align__features": str(features), "train__steps": 30, "optim__lr": 3e-3}
    lines = train(aligned(latents, **given), tmp_path / "run").metrics()
    assert lines[-1]["align"] < 0.8 * lines[0]["align"] and lines[-1]["lsep"] > 0


@pytest.mark.parametrize("changes", [{}, {"probe__enabled": False}, UNET])
def test_a_step_replays_as_a_graph(latents: Path, features: Path, changes: dict[str, Any]) -> None:
    """With averages beside the EMA, which are updated in it: the same bits."""
    given = {
        "align__features": str(features), "backend__optimizer": "reference", "train__steps": 12,
        "optim__ema_extra": (0.5,), "optim__ema_profiles": (0.05,), **changes,
    }  # fmt: skip
    eager, recorded = setup(aligned(latents, **given)), setup(aligned(latents, **given))
    recorded.compute = Recorded(recorded.compute, recorded.device)
    assert torch.equal(replayed(recorded, 12), replayed(eager, 12))
    assert len(eager.averages) == 2
    for name, average in eager.averages.items():
        assert all(map(torch.equal, average.parameters(), recorded.averages[name].parameters())), name


def test_processes_have_the_losses_of_one(latents: Path, features: Path, tmp_path: Path) -> None:
    """DDP and FSDP of two processes, with accumulation (float32, under 1e-5)."""
    from distributed_worker import curve

    given = {"align__features": str(features), "train__batch_size": 8, "train__steps": 8, "optim__accumulate": 2}
    file, out = tmp_path / "configs.json", tmp_path / "found.pt"
    file.write_text(json.dumps([asdict(aligned(latents, dist__mode=mode, **given)) for mode in ("ddp", "fsdp")]))
    done = torchrun(2, str(TESTS / "distributed_worker.py"), str(file), "8", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    one = curve(aligned(latents, **given), 8)
    for many in torch.load(out, weights_only=True):
        for column in (0, 1, -2):  # denoising, lsep, align
            assert relative_error(many["curve"][:, column], one["curve"][:, column]) < 1e-5
        assert relative_error(many["weights"], one["weights"]) < 1e-3


def test_the_projectors_of_repa_are_taken_over(latents: Path, features: Path, tmp_path: Path) -> None:
    """`lsep import --keep-projectors`, then --train.init of a run that aligns; of other sizes they are new."""
    plain = train(tiny(data__path=str(latents), train__steps=2), tmp_path / "plain")
    state = checkpoint.read_tensors(checkpoint.find(plain.checkpoints, None), "ema")
    sizes = ((32, 16), (16, 16), (16, WIDTH))
    extra = {}
    for i, (a, b) in zip((0, 2, 4), sizes, strict=True):
        extra |= {f"projectors.0.{i}.weight": torch.randn(b, a), f"projectors.0.{i}.bias": torch.randn(b)}
    state = {k: v for k, v in state.items() if not k.startswith("classifier.")} | extra
    torch.save({"ema": state}, tmp_path / "repa.pt")
    command = ["import", str(tmp_path / "repa.pt"), "--out", str(tmp_path / "run"), "--keep-projectors"]
    assert main([*command, "--num-heads", "2", "--kind", "samples"]) == 0
    given = {"align__features": str(features), "train__init": str(tmp_path / "run")}
    taken = setup(aligned(latents, **given)).objective
    assert taken.projectors is not None
    assert all(torch.equal(taken.state_dict()[name], tensor) for name, tensor in extra.items())
    assert torch.equal(taken.state_dict()["model.blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    other = setup(tiny(**{"data__path": str(latents), "align__depth": 2, "align__projector_dim": 8, **given})).objective
    assert other.projectors is not None and other.projectors[0][0].weight.shape == (8, 32)
    aligned_run = train(aligned(latents, align__features=str(features), train__steps=2), tmp_path / "aligned")
    setup(tiny(data__path=str(latents), train__init=str(aligned_run.path)))  # a plain run leaves projectors behind


def test_bf16_is_asked_of_the_encoder(latents: Path, images: Path, dino: Path) -> None:
    """Of the run's precision and the command's: near the float32 tokens, and not them."""
    state = setup(aligned(latents, align__encoder=str(dino), align__images=str(images), train__precision="bf16"))
    assert state.teacher.encoder is not None and state.teacher.encoder.bf16
    x = torch.from_numpy(np.random.default_rng(0).integers(256, size=(2, 3, 56, 56), dtype=np.uint8))
    half, full = state.teacher.encoder(x), Encoder(str(dino), 4, torch.device("cpu"))(x)
    assert 1e-4 < relative_error(half, full) < 2e-2


def test_what_cannot_be_meant_is_refused(
    latents: Path, features: Path, images: Path, dino: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    x = np.zeros((ROWS, 3, 8, 8), np.float32)
    for name, rows, y in (
        ("fewer", ROWS - 1, LABELS),
        ("shifted", ROWS, np.roll(LABELS, 1)),
        ("unmirrored", ROWS, LABELS),
    ):
        flip = None if name == "unmirrored" else x[:rows]
        write_store(tmp_path / name, kind="features", x=x[:rows], y=y[:rows], num_classes=5, flip=flip)
    write_store(tmp_path / "pixels", kind="pixels", x=pixels[:, :, ::8, ::8].copy(), y=LABELS, num_classes=5)
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.png").write_bytes((images / "00000" / "img00000000.png").read_bytes())
    for given, sentence in (
        ({"features": "f", "encoder": "e"}, "--align.encoder is 'e' and --align.features 'f', expected one of them"),
        ({"images": "i"}, "--align.images is 'i' without --align.encoder"),
        ({"features": "f", "depth": 4}, "--align.depth is 4, expected at most the model's 3 blocks"),
        ({"features": "f", "weight": -1.0}, "--align.weight is -1.0, expected at least 0"),
        ({"features": str(tmp_path)}, r"no manifest.json there, expected a store of features \(lsep data features\)"),
        ({"features": str(latents)}, "a store of samples, expected one of features"),
        ({"features": str(tmp_path / "fewer")}, "29 rows, expected 30 as .* has"),
        ({"features": str(tmp_path / "shifted")}, r"the label of row \d+ is \d and \d in .*, expected the same images"),
        ({"features": str(tmp_path / "unmirrored")}, "no mirror images, expected some as .* has"),
        ({"features": str(features), "width": 7}, "--align.width is 7, but the encoder's tokens have 24"),
        ({"encoder": str(dino)}, "has latents, expected --align.images, their images"),
        ({"encoder": str(dino), "images": str(tmp_path / "no")}, "not a folder, expected that of the images"),
        ({"encoder": str(dino), "images": str(short)}, "1 images, expected 30 as .* has"),
        (
            {"encoder": str(tmp_path / "no"), "images": str(images)},
            "no such folder, expected one with a model's config",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            setup(aligned(latents, **{f"align__{k}": v for k, v in given.items()}))
    with pytest.raises(UserError, match="has images itself, expected no --align.images"):
        setup(aligned(tmp_path / "pixels", align__encoder=str(dino), align__images=str(images)))
    with pytest.raises(UserError, match="a store of features, expected images or latents"):
        setup(tiny(data__path=str(features)))
    with pytest.raises(UserError, match="keeps no images for --align.images, expected auto, torch or dali"):
        batches(aligned(latents, align__encoder=str(dino), align__images=str(images), data__loader="resident"))
