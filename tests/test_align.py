"""REPA beside LSEP: the main pass's own tokens, an encoder's for the same images, wherever they come from."""

import io
import json
import shutil
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MANIFEST, lively, random_batch, relative_error, tiny
from safetensors.torch import load_file, save_file
from test_dist import TESTS, torchrun
from test_graphs import Recorded
from test_graphs import curve as replayed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lsep import checkpoint, flops
from lsep.align import align_loss
from lsep.checks import resolve, resolve_align
from lsep.cli import main
from lsep.config import Config
from lsep.data.store import Store
from lsep.data.writer import write_store
from lsep.encoder import Encoder
from lsep.errors import UserError
from lsep.interpolant import noise
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.step import open_loader, setup
from lsep.train import train
from lsep_kernels.reference import gate_residual, norm_modulate

pytest.importorskip("transformers", reason='pip install -e ".[align]"')

WIDTH, ROWS = 24, 30
STEP, EPOCH = torch.tensor(3), torch.tensor(0)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 of two layers, patches of 14 pixels, and a normalisation of its own."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    small = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3})
    )
    return folder


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth random images `(30, 3, 64, 64)` uint8."""
    x = np.random.default_rng(0).normal(size=(ROWS, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    return np.clip(128 + 60 * x, 0, 255).astype(np.uint8)


LABELS = np.random.default_rng(1).integers(5, size=ROWS)


@pytest.fixture(scope="module")
def images(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as PNG, dealt into folders as REPA's."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(pixels):
        file = folder / f"{i // 10:05d}" / f"img{i:08d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of latents of these images, with mirror images."""
    x = np.random.default_rng(2).normal(size=(ROWS, 3, 8, 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("latents") / "store"
    write_store(path, kind="samples", x=x, y=LABELS, num_classes=5, flip=np.ascontiguousarray(x[..., ::-1]))
    return path


@pytest.fixture(scope="module")
def features(latents: Path, images: Path, dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of DINOv2 for the latents' images, in float32, written by the command."""
    path = tmp_path_factory.mktemp("features") / "store"
    given = ["--encoder", str(dino), "--images", str(images), "--dtype", "float32", "--device", "cpu"]
    assert main(["data", "features", str(latents), str(path), *given, "--batch-size", "7", "--shard-rows", "13"]) == 0
    return path


def tokens_of(dino: Path, pixels: np.ndarray, size: int = 56) -> Tensor:
    """What the model itself gives for normalised, resized images, without the class token."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dino).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), 0.2
    x = (torch.from_numpy(pixels).float() / 255 - mean) / std
    with torch.no_grad():
        return model(torch.nn.functional.interpolate(x, (size, size), mode="bicubic")).last_hidden_state[:, 1:]


def aligned(data: Path, **changes: Any) -> Config:
    return tiny(**{"data__path": str(data), "align__depth": 2, "align__projector_dim": 16, **changes})


def batches(config: Config, steps: int = 5) -> list[Any]:
    return [[b.clone() for b in step] for step in islice(open_loader(setup(config), 0, steps), steps)]


# ---------------------------------------------------------------------------------------------------------------------
# The loss


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


# ---------------------------------------------------------------------------------------------------------------------
# Where the tokens come from


def test_tokens_are_those_of_the_model_itself(dino: Path, pixels: np.ndarray) -> None:
    from lsep.encoder import Encoder

    encoder = Encoder(str(dino), 4, torch.device("cpu"))
    assert (encoder.size, encoder.width) == (56, WIDTH)
    assert relative_error(encoder(torch.from_numpy(pixels)), tokens_of(dino, pixels)) < 1e-5
    gray = pixels[:, :1]
    assert relative_error(encoder(torch.from_numpy(gray)), tokens_of(dino, gray.repeat(3, 1))) < 1e-5


def test_registers_are_no_tokens(tmp_path: Path, pixels: np.ndarray) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from lsep.encoder import Encoder

    small = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small)).eval()
    model.save_pretrained(tmp_path / "model")
    got = Encoder(str(tmp_path / "model"), 4, torch.device("cpu"))(torch.from_numpy(pixels[:2]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (torch.from_numpy(pixels[:2]).float() / 255 - mean) / std
    with torch.no_grad():
        whole = model(torch.nn.functional.interpolate(x, (56, 56), mode="bicubic")).last_hidden_state
    assert whole.shape[1] == 1 + 4 + 16 and relative_error(got, whole[:, 5:]) < 1e-5


def test_the_command_writes_every_image_and_its_mirror_image(features: Path, dino: Path, pixels: np.ndarray) -> None:
    store = Store(features)
    assert store.manifest.shape == (WIDTH, 4, 4) and len(store.shards) == 3
    assert main(["data", "check", str(features)]) == 0 and main(["data", "info", str(features)]) == 0
    for mirrored, x in ((False, pixels), (True, np.ascontiguousarray(pixels[..., ::-1]))):
        rows = store.read(np.arange(ROWS), np.full(ROWS, mirrored)).x
        assert relative_error(torch.from_numpy(rows).flatten(2).transpose(1, 2), tokens_of(dino, x)) < 1e-5
    assert store.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_features_go_with_their_rows(
    latents: Path, features: Path, dino: Path, pixels: np.ndarray, loader: str, accumulate: int
) -> None:
    """Every loader, over epochs in which other rows are mirrored."""
    config = aligned(latents, align__features=str(features), data__loader=loader, optim__accumulate=accumulate)
    _check_tokens(batches(config), dino, pixels, Store(latents))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_images_are_encoded_on_the_fly(
    latents: Path, images: Path, dino: Path, pixels: np.ndarray, loader: str
) -> None:
    """Decoded by DALI; its cosine with the tokens of the images themselves is that of the same images."""
    config = aligned(latents, align__encoder=str(dino), align__images=str(images), data__loader=loader)
    _check_tokens(batches(config), dino, pixels, Store(latents))


def _check_tokens(steps: list[Any], dino: Path, pixels: np.ndarray, store: Store) -> None:
    truth = [tokens_of(dino, x) for x in (pixels, np.ascontiguousarray(pixels[..., ::-1]))]
    seen = set()
    for batch in (b for step in steps for b in step):
        for x, sample, tokens in zip(batch.x, batch.id.tolist(), batch.tokens, strict=True):
            mirrored = not torch.equal(x, torch.from_numpy(store.read(np.array([sample]), np.array([False])).x[0]))
            assert relative_error(tokens, truth[mirrored][sample]) < 1e-5
            seen.add(mirrored)
    assert seen == {False, True}


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


# ---------------------------------------------------------------------------------------------------------------------
# Training


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
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "out"), "--format", "sit"]) == 0


def test_a_run_goes_on_with_the_same_tokens_only(
    latents: Path, features: Path, images: Path, dino: Path, tmp_path: Path
) -> None:
    """Wherever encoder, images or features lie by now; an encoder that was swapped in its place is noticed."""
    shutil.copytree(features, tmp_path / "moved")
    shutil.copytree(dino, tmp_path / "encoder")
    shutil.copytree(images, tmp_path / "images")
    x = np.random.default_rng(9).normal(size=(ROWS, WIDTH, 4, 4)).astype(np.float32)
    write_store(tmp_path / "others", kind="features", x=x, y=LABELS, num_classes=5, flip=x)

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


@pytest.mark.parametrize("probe", [True, False])
def test_a_step_replays_as_a_graph(latents: Path, features: Path, probe: bool) -> None:
    config = aligned(
        latents, align__features=str(features), backend__optimizer="reference", probe__enabled=probe, train__steps=12
    )
    eager, recorded = setup(config), setup(config)
    recorded.compute = Recorded(recorded.compute, recorded.device)
    assert torch.equal(replayed(recorded, 12), replayed(eager, 12))


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


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("shape", [(375, 500), (640, 480), (256, 341), (600, 600)])
def test_decoded_images_are_those_the_latents_have(shape: tuple[int, int]) -> None:
    """JPEG, not square, with an orientation in its EXIF: the place and the direction of `center_crop`."""
    pytest.importorskip("nvidia.dali")
    from PIL import Image

    from lsep.data.dali import Decoder
    from lsep.data.images import center_crop, open_image

    height, width = shape
    rows, columns = np.mgrid[:height, :width] / 20.0
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + 2 * columns)], -1) * 100 + 128
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8)).save(file, "JPEG", quality=95, exif=exif)
    decoder = Decoder(1, 200, 1, torch.device("cpu"))
    got = decoder([file.getvalue()], None, lambda place: Path())[0].numpy().astype(int)
    cut = center_crop(open_image(Path("x"), file.getvalue()), 200).astype(int)
    apart = [np.abs(got - np.roll(cut, by, axis)).mean() for by, axis in ((0, 1), (1, 1), (-1, 1), (1, 2), (-1, 2))]
    assert apart[0] == min(apart) and apart[0] < 1.5, apart
    assert decoder.pipe.exec_dynamic, "a GPU's stream orders the output of no other executor"


def test_a_clip_brings_its_own_normalisation(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=8, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no preprocessor_config.json, expected one with the image_mean"):
        Encoder(str(tmp_path), 4, torch.device("cpu"))
    mean, std = [0.481, 0.458, 0.408], [0.269, 0.261, 0.276]
    for file, values in (
        ("processor_config.json", {"image_processor": {"image_mean": mean, "image_std": std}}),
        ("preprocessor_config.json", {"image_mean": std, "image_std": mean}),  # goes before the other
    ):
        (tmp_path / file).write_text(json.dumps(values))
        encoder = Encoder(str(tmp_path), 4, torch.device("cpu"))
        wanted = mean if file.startswith("processor") else std
        assert encoder.mean.flatten().tolist() == pytest.approx(wanted) and encoder.width == 16


def test_half_precision_files_run_in_float32(dino: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(dino).half().save_pretrained(tmp_path / "half")
    encoder = Encoder(str(tmp_path / "half"), 4, torch.device("cpu"))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}


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


@pytest.mark.parametrize("damage", [b"no image", b"", None])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_damaged_image_is_named_or_passed_over(
    latents: Path, images: Path, dino: Path, pixels: np.ndarray, tmp_path: Path, loader: str, damage: bytes | None
) -> None:
    """What is no image, empty or a link to nowhere ends the run with its name, or is skipped like a damaged row: with the next two,
    one of which shows its damage only once it has taken the first one's place."""
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    given = {"align__encoder": str(dino), "align__images": str(copy), "data__loader": loader, "train__batch_size": 10}
    skip = aligned(latents, **given, data__on_corrupt="skip")
    whole = [i for step in batches(skip, 3) for batch in step for i in batch.id.tolist()]
    bad = whole[3:5] + whole[12:13]
    for sample in bad:
        file = copy / f"{sample // 10:05d}" / f"img{sample:08d}.png"
        file.unlink()
        file.symlink_to("nowhere") if damage is None else file.write_bytes(damage)
    name = f"img{bad[0]:08d}.png: (cannot be read|is empty, expected an image).*sample {bad[0]}"
    with pytest.raises(UserError, match=name):
        batches(aligned(latents, **given), 3)
    found = []
    for _ in range(2):
        opened = open_loader(setup(skip), 0, 6)
        steps = [[b.clone() for b in step] for step in opened]
        found.append([batch.id.tolist() for step in steps for batch in step])
        first = [i for batch in found[-1][:3] for i in batch]
        assert first[3] == first[4] == whole[5] and first[12] == whole[13] and len(first) == len(whole)
        assert opened.skipped == 6 and not set(bad) & {i for batch in found[-1] for i in batch}
        _check_tokens(steps, dino, pixels, Store(latents))
    assert found[0] == found[1]


def test_what_dali_does_not_read_pillow_does(tmp_path: Path) -> None:
    """A GIF under another name, as the latents were made of it; the images beside it as they are without it."""
    from PIL import Image

    from lsep.data.dali import Decoder, Undecodable
    from lsep.data.images import center_crop, open_image

    def jpg(place: int) -> Path:
        return Path("abc"[place] + ".jpg")

    rng, files = np.random.default_rng(3), []
    for kind in ("PNG", "GIF", "JPEG"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(file, kind)
        files.append(file.getvalue())
    decoder = Decoder(3, 32, 2, torch.device("cpu"))
    beside = decoder([files[0], files[0], files[2]], None, jpg).clone()
    got = decoder(files, np.array([False, True, True]), jpg)
    gif = torch.from_numpy(center_crop(open_image(tmp_path, files[1]), 32))
    assert torch.equal(got[0], beside[0]) and torch.equal(got[1], gif.flip(-1))
    assert torch.equal(got[2], beside[2].flip(-1))
    cut = files[2][: len(files[2]) // 2]
    with pytest.raises(Undecodable, match=r"^b.jpg: cannot be read as an image \(OSError: .*truncated") as caught:
        decoder([files[1], cut, files[0]], None, jpg)
    assert caught.value.place == 1
    assert torch.equal(decoder([files[0], files[0], files[2]], None, jpg), beside)


def test_bad_input_of_the_command(
    latents: Path, images: Path, dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, sentence in (
        ([], "has latents, expected --images, the folder of their images"),
        (["--images", str(images), "--patch-size", "3"], "--patch-size is 3, expected a divisor of the data's side 8"),
        (["--images", str(images), "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
    ):
        command = ["data", "features", str(latents), str(tmp_path / "out"), "--encoder", str(dino), *more]
        code, err = main(command), capsys.readouterr().err
        assert code == 2 and sentence in err
        assert not (tmp_path / "out").exists()
