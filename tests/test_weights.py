"""Weights in and out: every form against a SiT written here from the paper's equations, and what is refused."""

import argparse
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MANIFEST, lively, relative_error, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lsep import checkpoint, sample, shards
from lsep.checks import resolve
from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.run import Run
from lsep.step import setup
from lsep.train import train
from lsep.weights.exporting import export, sit_state
from lsep.weights.importing import Given, import_weights

DEPTH, WIDTH, HEADS, PATCH, CHANNELS, GRID, CLASSES = 2, 64, 2, 2, 3, 4, 5
SIT = Given(form="sit", num_heads=HEADS, kind="samples", scale=0.5)


def sit_weights(channels: int = 2 * CHANNELS, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names."""
    g = torch.Generator().manual_seed(seed)

    def linear(out: int, *inputs: int) -> tuple[Tensor, Tensor]:
        fan = math.prod(inputs)
        return torch.randn(out, *inputs, generator=g) / math.sqrt(fan), 0.1 * torch.randn(out, generator=g)

    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH), "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH), "final_layer.linear": (PATCH**2 * channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }  # fmt: skip
    for i in range(DEPTH):
        for name, shape in {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH), "adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    out = {"pos_embed": positions(), "y_embedder.embedding_table.weight": torch.randn(CLASSES + 1, WIDTH, generator=g)}
    for name, shape in shapes.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = linear(*shape)
    return out


def positions() -> Tensor:
    """Sines and cosines of the column, then of the row."""
    frequencies = [10_000 ** (-i / (WIDTH // 4)) for i in range(WIDTH // 4)]
    table = []
    for row in range(GRID):
        for column in range(GRID):
            table.append([f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies])
    return torch.tensor(table)[None]


def sit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """SiT's output for x `(N, C, H, W)` in float64, all channels: arXiv 2212.09748, section 3."""
    w = {k: v.double() for k, v in w.items()}
    n, channels, height, _ = x.shape

    def linear(name: str, z: Tensor) -> Tensor:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def silu(z: Tensor) -> Tensor:
        return z / (1 + (-z).exp())

    grid = height // PATCH
    patches = (
        x.double().reshape(n, channels, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, grid**2, -1)
    )
    h = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = factor * t.double()[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)]).double()
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        qkv = linear(f"{b}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        q, k, v = qkv.reshape(n, grid**2, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        a = ((q @ k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = h + gate1 * linear(f"{b}.attn.proj", a.transpose(1, 2).flatten(2))
        z = linear(f"{b}.mlp.fc1", norm(h) * (1 + scale2) + shift2)
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + gate2 * linear(f"{b}.mlp.fc2", z)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = out.reshape(n, grid, grid, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(n, -1, height, height)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, CHANNELS, 8, 8, generator=g), torch.rand(4, generator=g), torch.tensor([0, 3, 4, 5])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a random SiT, as SiT's training script saves it."""
    folder = tmp_path_factory.mktemp("imported")
    content = {
        "model": sit_weights(seed=9),
        "ema": sit_weights(),
        "opt": {"state": {}},
        "args": argparse.Namespace(a=1),
    }
    torch.save(content, folder / "0400000.pt")
    import_weights(folder / "0400000.pt", folder / "run", SIT)
    return folder / "run"


def test_sit_in_its_own_time(imported: Path) -> None:
    """v here at t is minus SiT's at 1 - t: x_t = (1 - t) x + t e and v = e - x against t x + (1 - t) e and x - e."""
    model, config, manifest, step = sample.load_ema(Run(imported))
    assert (step, manifest.scale, config.model.num_heads, config.probe.enabled) == (0, 0.5, HEADS, False)
    x, t, y = inputs()
    truth = -sit(sit_weights(), x, 1 - t.double(), y)[:, :CHANNELS]
    assert relative_error(model(x, t, y), truth) < 2e-5
    assert not shards.problems(checkpoint.find(Run(imported).checkpoints, 0))


def test_the_weights_being_trained_where_asked(tmp_path: Path) -> None:
    torch.save({"model": sit_weights(seed=9), "ema": sit_weights()}, tmp_path / "both.pt")
    import_weights(tmp_path / "both.pt", tmp_path / "run", replace(SIT, ema=False))
    x, t, y = inputs()
    truth = -sit(sit_weights(seed=9), x, 1 - t.double(), y)[:, :CHANNELS]
    assert relative_error(sample.load_ema(Run(tmp_path / "run"))[0](x, t, y), truth) < 2e-5


@pytest.mark.parametrize("form", ["repa", "lsep"])
def test_repa_and_lsep_have_our_time(form: str, tmp_path: Path) -> None:
    weights = sit_weights(CHANNELS)
    extra = {"projectors.0.0.weight": torch.randn(8, WIDTH), "projectors.0.0.bias": torch.randn(8)}
    if form == "lsep":
        extra = {"classifier.0.weight": torch.ones(WIDTH), "classifier.0.bias": torch.zeros(WIDTH),
                 "classifier.1.weight": torch.randn(7, WIDTH), "classifier.1.bias": torch.randn(7)}  # fmt: skip
    stored = {k.replace("blocks.1.", "decoder_blocks.0.") if form == "repa" else k: v for k, v in weights.items()}
    torch.save({"ema": stored | extra, "steps": 7}, tmp_path / "file.pt")
    given = Given(num_heads=HEADS, kind="samples", keep_projectors=True)
    said = import_weights(tmp_path / "file.pt", tmp_path / "run", given)
    model, config, manifest, _ = sample.load_ema(Run(tmp_path / "run"))
    x, t, y = inputs()
    assert relative_error(model(x, t, y), sit(weights, x, t, y)) < 2e-5
    if form == "lsep":
        assert config.probe.enabled and manifest.probe_classes == 7
        kept = checkpoint.read_tensors(checkpoint.find(Run(tmp_path / "run").checkpoints, None), "ema")
        assert torch.equal(kept["classifier.1.weight"], extra["classifier.1.weight"])
    else:
        assert "projectors.0.0.weight" in said[-1]
        assert torch.equal(load_file(tmp_path / "run" / "projectors.safetensors")["projectors.0.0.bias"],
                           extra["projectors.0.0.bias"])  # fmt: skip


def test_dit_is_a_warm_start(tmp_path: Path) -> None:
    torch.save(sit_weights(), tmp_path / "DiT.pt")
    said = import_weights(tmp_path / "DiT.pt", tmp_path / "run", Given(form="dit", num_heads=HEADS))
    assert any("warm start" in sentence for sentence in said)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps with a probe."""
    folder = tmp_path_factory.mktemp("trained")
    x = np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)
    write_store(folder / "store", kind="samples", x=x, y=np.arange(20) % 5, num_classes=5, scale=0.5)
    return train(tiny(data__path=str(folder / "store"), train__steps=2, sample__num=2, sample__steps=1), folder / "run")


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "sit"])
def test_round_trips_are_bitwise(form: str, ema: bool, trained: Run, tmp_path: Path) -> None:
    export(trained, form, tmp_path / "out", "ema" if ema else "model")  # type: ignore[arg-type]
    (file,) = (tmp_path / "out").glob("model.*")
    given = Given(form="sit" if form == "sit" else None, num_heads=2)
    import_weights(file, tmp_path / "again", given)
    part = "ema" if ema else "model"
    before = checkpoint.read_tensors(checkpoint.find(trained.checkpoints, None), part)
    after = checkpoint.read_tensors(checkpoint.find(Run(tmp_path / "again").checkpoints, None), "ema")
    assert after.keys() == {k for k in before if not k.startswith("classifier.")}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert "| train.steps | 2 |" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_for_sit_is_sit(imported: Path, tmp_path: Path) -> None:
    """What is exported runs in SiT's own equations, on float32 weights alone."""
    export(Run(imported), "sit", tmp_path / "out")
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["ema"]
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in sit_weights().items()}
    x, t, y = inputs()
    model = sample.load_ema(Run(imported))[0]
    out = sit(found, x, 1 - t.double(), y)
    assert relative_error(-out[:, :CHANNELS], model(x, t, y)) < 2e-5
    assert not out[:, CHANNELS:].any()


def test_the_probe_goes_out_where_asked(trained: Run, tmp_path: Path) -> None:
    export(trained, "safetensors", tmp_path / "out", probe=True)
    assert "classifier.1.weight" in load_file(tmp_path / "out" / "model.safetensors")
    import_weights(tmp_path / "out" / "model.safetensors", tmp_path / "again", Given())
    assert Run(tmp_path / "again").config() == trained.config()
    assert replace(Run(tmp_path / "again").manifest(), source="") == replace(trained.manifest(), source="")
    with pytest.raises(UserError, match="--with-probe is for --format safetensors"):
        export(trained, "sit", tmp_path / "other", probe=True)


def test_an_export_says_what_the_data_was(trained: Run, tmp_path: Path) -> None:
    """Kind, scale and classes come back without a flag; a flag counts more; what cannot be meant is refused."""
    export(trained, "safetensors", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"

    def manifest(name: str, **given: Any) -> Manifest:
        import_weights(file, tmp_path / name, Given(**given))
        return Run(tmp_path / name).manifest()

    found = manifest("same")
    assert (found.kind, found.scale, found.rows, found.dtype) == ("samples", 0.5, 20, "float32")
    assert found.source == "what model.safetensors was trained on"
    assert manifest("scaled", scale=0.25) == replace(found, scale=0.25)
    assert manifest("moments", kind="moments") == replace(found, kind="moments", scale=0.18215)
    pixels = replace(found, kind="pixels", scale=1.0, dtype="uint8", latents=None)
    assert manifest("pixels", kind="pixels") == pixels
    with pytest.raises(UserError, match="--scale is 0.5, but pixels have none"):
        manifest("no", kind="pixels", scale=0.5)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for data, sentence in (
        ("{", "metadata: data: cannot be read as JSON"),
        ("3", "metadata: data is 3, expected an object"),
        ('{"rows": 0}', "metadata: data: rows and flips are 0 and None, expected a count, and true or false"),
        (
            metadata["data"].replace('"num_classes": 5', '"num_classes": 6'),
            r"\(3, 8, 8\) and 6 classes, expected those",
        ),
    ):
        save_file(tensors, file, {**metadata, "data": data})
        with pytest.raises(UserError, match=sentence):
            manifest("no")
        assert not (tmp_path / "no").exists()
    save_file(tensors, file, {k: v for k, v in metadata.items() if k != "data"})  # as exported before
    assert (manifest("older").kind, Run(tmp_path / "older").manifest().scale) == ("moments", 0.18215)


def test_diffusers_computes_the_same(imported: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    export(Run(imported), "diffusers", tmp_path / "out")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    model = sample.load_ema(Run(imported))[0]
    x, t, y = inputs()
    with torch.no_grad():
        ours = model(x, t, y)
        assert relative_error(theirs(x, timestep=t, class_labels=y).sample, ours) < 1e-4
        import_weights(tmp_path / "out", tmp_path / "again", Given(num_heads=HEADS))
        assert relative_error(sample.load_ema(Run(tmp_path / "again"))[0](x, t, y), ours) < 1e-4
    assert json.loads((tmp_path / "out" / "lsep.json").read_text())["step"] == 0


def test_a_dit_of_diffusers_is_a_warm_start(imported: Path, tmp_path: Path) -> None:
    export(Run(imported), "diffusers", tmp_path / "out")
    (tmp_path / "out" / "lsep.json").unlink()
    said = import_weights(tmp_path / "out", tmp_path / "again", Given(num_heads=HEADS))
    assert any("warm start" in sentence for sentence in said)


def test_a_run_starts_from_another(imported: Path, tmp_path: Path, store: Path) -> None:
    """Weights are the other's, the grid its own, the classifier new; going on does not need the other."""
    sizes = {"model__hidden_size": WIDTH, "model__depth": DEPTH, "sample__num": 2, "sample__steps": 1}
    config = tiny(data__path=str(store), train__init=str(imported), **sizes)
    state = setup(config)
    source = checkpoint.read_tensors(checkpoint.find(Run(imported).checkpoints, None), "ema")
    for objective in (state.objective, state.ema):
        for name, tensor in checkpoint.weights(objective).items():
            if not name.startswith("classifier."):
                assert torch.equal(tensor, source[name]), name
    plain = setup(replace_init(config, None)).objective
    assert torch.equal(state.objective.classifier[1].weight, plain.classifier[1].weight)
    run = train(replace_init(config, str(imported), steps=4), tmp_path / "run")
    train(replace_init(config, str(tmp_path / "gone"), steps=8), run.path, resume=True)
    assert checkpoint.progress_of(checkpoint.find(run.checkpoints, None)).step == 8


def replace_init(config: Config, init: str | None, steps: int = 8) -> Config:
    return replace(config, train=replace(config.train, init=init, steps=steps))


def test_a_larger_grid_is_made_anew(imported: Path) -> None:
    manifest = Manifest("test", "samples", (3, 16, 16), rows=100, num_classes=5, probe_classes=5)
    config = resolve(tiny(model__hidden_size=WIDTH, model__depth=DEPTH), manifest)
    objective = Objective(config, manifest)
    own = objective.model.pos_embed.clone()
    checkpoint.start_from(checkpoint.find(Run(imported).checkpoints, None), objective)
    assert own.shape[1] == 64 and torch.equal(objective.model.pos_embed, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__hidden_size": 32}, "x_embedder.proj.weight is (64, 3, 2, 2) there and (32, 3, 2, 2)"),
        ({"model__hidden_size": WIDTH, "model__depth": 1, "probe__depth": 1}, "blocks.1.adaLN_modulation.1.bias is"),
        ({"model__hidden_size": WIDTH, "model__depth": 3}, "blocks.2.attn.qkv.weight is none there"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit(imported: Path, store: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        setup(tiny(data__path=str(store), train__init=str(imported), **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("evil-was-here",)


def _write(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


def test_nothing_in_a_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (sit_weights() | {"x": Evil()}, {"ema": sit_weights(), "args": Evil()}):
        with pytest.raises(UserError, match="file.pt: refused, it is damaged or holds more than tensors"):
            import_weights(_write(tmp_path, content), tmp_path / "run", SIT)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="plain.pt: "):
        import_weights(tmp_path / "plain.pt", tmp_path / "run", SIT)
    assert not (tmp_path / "evil-was-here").exists() and not (tmp_path / "run").exists()


def without(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in sit_weights().items() if k != name}


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        (without("blocks.1.mlp.fc2.bias") | {"odd": torch.ones(1)}, SIT,
         "do not fit a SiT of their sizes; 1 missing: blocks.1.mlp.fc2.bias; 1 unknown: odd"),
        (sit_weights(), replace(SIT, form=None), "its names fit SiT, DiT, REPA and LSEP"),
        (sit_weights(), replace(SIT, num_heads=None), "width 64 is of no published size"),
        (sit_weights() | {"blocks.0.mlp.w12.weight": torch.ones(2)}, SIT, "LightningDiT's blocks (RMSNorm"),
        (sit_weights() | {"pos_embed": torch.zeros(1, 16, WIDTH)}, SIT, "pos_embed holds other positions"),
        (sit_weights() | {"pos_embed": torch.zeros(1, 15, WIDTH)}, SIT, "pos_embed has 15 tokens, expected a square"),
        (without("pos_embed"), SIT, "no usable tensor 'pos_embed'"),
        (without("t_embedder.mlp.0.weight"), SIT, "no tensor t_embedder.mlp.0.weight"),
        (sit_weights() | {"x_embedder.proj.bias": torch.full((WIDTH,), math.nan)}, SIT, "not finite"),
        (sit_weights() | {"x_embedder.proj.bias": torch.ones(3)}, SIT, "1 of another shape: x_embedder.proj.bias (3,)"),
        (sit_weights() | {"blocks.9999999999.mlp.fc1.weight": torch.zeros(2)}, SIT, "no tensors of blocks.2, expected"),
        ({k: v for k, v in sit_weights().items() if "blocks" not in k}, SIT, "no tensors of blocks.0, expected"),
        (sit_weights() | {"x_embedder.proj.bias": torch.ones(WIDTH, dtype=torch.int64)}, SIT, "is of torch.int64"),
        (sit_weights() | {"t_embedder.mlp.0.weight": torch.zeros(1, WIDTH, 256)}, SIT, "expected 2 dimensions"),
        ([1], SIT, "holds 'list', expected a dictionary"),
        ({"ema": {"a": 1}}, SIT, "entry 'a' is no tensor"),
        ({}, SIT, "it is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(content: object, given: Given, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        import_weights(_write(tmp_path, content), tmp_path / "run", given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = _write(tmp_path, sit_weights()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save_file(sit_weights(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name, message in {
        "cut.pt": "cut.pt: not a whole file", "cut.safetensors": "not a whole safetensors file",
        "none.pt": "no such file", "empty": "no config.json", "other": "_class_name is 'UNet2DModel'",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            import_weights(tmp_path / name, tmp_path / "run", SIT)


def test_no_format_of_velocities_for_another_prediction(trained: Run, tmp_path: Path) -> None:
    run, config = Run(tmp_path / "run"), trained.config()
    run.open(replace(config, interpolant=replace(config.interpolant, prediction="eps")), trained.manifest(), "")
    run.checkpoints.symlink_to(trained.checkpoints)
    for form in ("sit", "diffusers"):
        with pytest.raises(UserError, match="predicts eps on linear: expected --format safetensors"):
            export(run, form, tmp_path / "out")  # type: ignore[arg-type]
    assert export(run, "safetensors", tmp_path / "out")[1].startswith("predicts eps; t = 1 is noise")


def test_nothing_is_written_over(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        import_weights(tmp_path / "x", imported, SIT)
    with pytest.raises(UserError, match="is there already"):
        export(Run(imported), "sit", tmp_path)


def test_the_sit_head_keeps_its_rows() -> None:
    objective = lively(Objective(resolve(tiny(), MANIFEST), MANIFEST))
    tensors = checkpoint.weights(objective)
    head = sit_state(tensors, objective.config)["final_layer.linear.weight"]
    rows = head.view(PATCH**2, 2, CHANNELS, -1)
    assert torch.equal(-rows[:, 0].flatten(0, 1), tensors["final_layer.linear.weight"]) and not rows[:, 1].any()
