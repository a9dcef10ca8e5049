"""Files of weights as they are found: halves, wrappers, entries, directories; and a time layer as it is stored."""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from test_weights import CLASSES, GRID, HEADS, SIT, WIDTH, imported, inputs, positions, sit, sit_weights
from torch import Tensor

from lsep import checkpoint, sample
from lsep.checkpoint_commands import gather
from lsep.errors import UserError
from lsep.run import Run
from lsep.weights.convention import TIME, WORST_FIT, embed, refit, refit_or_anew
from lsep.weights.exporting import export
from lsep.weights.importing import Given, import_weights

__all__ = ["imported"]
DIT = Given(form="dit", num_heads=HEADS)


def velocity(run: Path) -> Tensor:
    with torch.no_grad():
        return sample.load_ema(Run(run))[0](*inputs())


def stored(run: Path) -> dict[str, Tensor]:
    return checkpoint.read_tensors(checkpoint.find(Run(run).checkpoints, None), "ema")


# ---------------------------------------------------------------------------------------------------------------------
# The time layer


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("source", "target"), [(127, 128), (128, 127)])
def test_a_fit_is_judged_as_it_is_stored_and_used(source: int, target: int, scale: float) -> None:
    """The error said is that of float32 weights over a float32 embedding; between frequencies so near it is tiny."""
    weight = scale * torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    fitted, error = refit(weight, (1.0, source), (1.0, target))
    t = torch.linspace(0, 1, 997)
    truth = embed(t, 128, source) @ weight.double().T
    found = embed(t, 128, target).float() @ fitted.T
    assert fitted.dtype == torch.float32 and relative_error(found, truth) < 1e-6
    assert error < 1e-5 and (found - truth).abs().max() / truth.abs().max() <= 2 * error


def test_a_layer_that_no_float32_holds_is_made_anew() -> None:
    """Over 999 t it turns faster than any layer over t can; weights to 2e9 would cancel to noise."""
    weight = 0.02 * torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    _, error = refit(weight, (999.0, 128), (1.0, 128))
    assert WORST_FIT < error < 1
    anew, said = refit_or_anew(weight, (999.0, 128), (1.0, 128))
    assert "initialised anew" in said and f"{error:.1e}" in said
    assert anew.std() == pytest.approx(0.02, rel=0.05) and anew.abs().max() < 0.1
    slow = torch.zeros(32, 256)  # one that DiT's network could have learned: it hardly turns in a thousand steps
    slow[:, 100:128] = weight[:, 100:128]
    fitted, said = refit_or_anew(slow, (999.0, 128), (1.0, 128))
    t = torch.linspace(0, 1, 997)
    truth = embed(999 * t, 128, 128) @ slow.double().T
    assert "refitted" in said and relative_error(embed(t, 128, 128).float() @ fitted.T, truth) < WORST_FIT


@pytest.mark.parametrize("kind", ["file", "diffusers"])
def test_a_dit_comes_with_a_time_layer_of_use(kind: str, imported: Path, tmp_path: Path) -> None:
    if kind == "file":
        torch.save(sit_weights(), tmp_path / "DiT.pt")
        said = import_weights(tmp_path / "DiT.pt", tmp_path / "run", DIT)
    else:
        pytest.importorskip("diffusers")
        export(Run(imported), "diffusers", tmp_path / "DiT")
        (tmp_path / "DiT" / "lsep.json").unlink()
        said = import_weights(tmp_path / "DiT", tmp_path / "run", Given(num_heads=HEADS))
    assert any("its time layer is initialised anew" in sentence for sentence in said)
    assert stored(tmp_path / "run")[TIME].abs().max() < 0.2
    assert velocity(tmp_path / "run").isfinite().all() and velocity(tmp_path / "run").abs().max() < 100


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_to_float32_first(dtype: torch.dtype, tmp_path: Path) -> None:
    """Turning the time layer adds no rounding to that of the file: the run is the SiT of the file's own numbers."""
    halves = {k: v.to(dtype) for k, v in sit_weights().items()}
    torch.save({"ema": halves}, tmp_path / "half.pt")
    said = import_weights(tmp_path / "half.pt", tmp_path / "run", SIT)
    assert f"read from {str(dtype).removeprefix('torch.')}" in said
    x, t, y = inputs()
    exact = {k: v.float() for k, v in halves.items()} | {"pos_embed": positions()}
    truth = -sit(exact, x, 1 - t.double(), y)[:, :3]
    assert relative_error(velocity(tmp_path / "run"), truth) < 2e-5
    kept = stored(tmp_path / "run")
    assert kept[TIME].dtype == torch.float32 and not torch.equal(kept[TIME], kept[TIME].to(dtype).float())
    assert torch.equal(kept["blocks.1.attn.qkv.weight"], exact["blocks.1.attn.qkv.weight"])


def test_other_positions_are_refused_in_halves_too(tmp_path: Path) -> None:
    halves = {k: v.half() for k, v in sit_weights().items()}
    torch.save(halves | {"pos_embed": halves["pos_embed"] + 0.01}, tmp_path / "half.pt")
    with pytest.raises(UserError, match="pos_embed holds other positions"):
        import_weights(tmp_path / "half.pt", tmp_path / "run", SIT)
    torch.save(sit_weights() | {TIME: sit_weights()[TIME].to(torch.float8_e4m3fn)}, tmp_path / "eight.pt")
    with pytest.raises(UserError, match="is of torch.float8_e4m3fn, expected floating-point numbers of 16 bits"):
        import_weights(tmp_path / "eight.pt", tmp_path / "run", SIT)


# ---------------------------------------------------------------------------------------------------------------------
# Names and entries


def before(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {prefix + k: v for k, v in weights.items()}


def inside(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("blocks.1.", "blocks.1._orig_mod.").replace("mlp.", "mlp.module."): v for k, v in weights.items()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "named",
    [before("module."), before("_orig_mod."), before("module._orig_mod."), before("_orig_mod.module."), inside,
     before("model."), before("ema."), before("ema._orig_mod."), before("_fsdp_wrapped_module.")],
)  # fmt: skip
def test_wrappers_and_prefixes(named: Callable[..., dict[str, Tensor]], suffix: str, tmp_path: Path) -> None:
    file, weights = tmp_path / f"file.{suffix}", named(sit_weights())
    torch.save(weights, file) if suffix == "pt" else save_file(weights, file)
    import_weights(file, tmp_path / "run", SIT)
    torch.save(sit_weights(), tmp_path / "plain.pt")
    import_weights(tmp_path / "plain.pt", tmp_path / "plain", SIT)
    found, wanted = stored(tmp_path / "run"), stored(tmp_path / "plain")
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


OTHER = sit_weights(seed=9)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"model": OTHER, "ema": sit_weights()},
        {"model": OTHER, "ema_model": sit_weights(), "optimizer": {"state": {}}},
        {"state_dict": OTHER, "state_dict_ema": sit_weights(), "lr_schedulers": [], "epoch": 3},
        {"model": before("module.")(OTHER), "model_ema": before("module.")(sit_weights())},
        {"state_dict": before("model.")(OTHER) | before("ema.")(sit_weights())},
        before("model.")(OTHER) | before("model_ema.")(sit_weights()) | {"loss.scale": torch.ones(1)},
        OTHER | before("ema.")(sit_weights()),
    ],
)
def test_averaged_weights_are_found_by_any_of_their_names(content: dict[str, Any], ema: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    said = import_weights(tmp_path / "file.pt", tmp_path / "run", replace(SIT, ema=ema))
    wanted = (sit_weights() if ema else OTHER)["blocks.0.attn.qkv.weight"]
    assert torch.equal(stored(tmp_path / "run")["blocks.0.attn.qkv.weight"], wanted)
    assert not any("no averaged weights" in sentence for sentence in said)
    if "loss.scale" in content:
        assert any(
            sentence.endswith("are left out: loss.scale") and sentence.startswith("1 tensors") for sentence in said
        )


@pytest.mark.parametrize("name", ["model", "state_dict", "transformer"])
def test_no_averaged_weights_is_said(name: str, tmp_path: Path) -> None:
    torch.save({name: sit_weights(), "ema_decay": 0.9999, "args": argparse.Namespace(a=1)}, tmp_path / "file.pt")
    said = import_weights(tmp_path / "file.pt", tmp_path / "run", SIT)
    assert f"no averaged weights are in the file: these are its {name!r}" in said


@pytest.mark.parametrize(
    ("content", "ema", "message"),
    [
        ({"ema": sit_weights(), "ema_slow": sit_weights()}, True, "entries 'ema', 'ema_slow' could all be the weights"),
        ({"teacher": sit_weights(), "student": OTHER}, True, "entries 'teacher', 'student' could all be the"),
        ({"model": OTHER, "ema": [torch.ones(2)]}, True, "'ema', are a list without names"),
        ({"model_ema": OTHER}, False, "--no-ema was given, but it holds averaged weights only (model_ema)"),
        (before("ema.")(OTHER), False, "--no-ema was given, but it holds averaged weights only (ema.)"),
        (before("a.")(OTHER) | before("b.")(OTHER), True, "prefixes 'a.', 'b.' could all be the weights"),
        (OTHER | before("module.")(OTHER), True, "more than one tensor is"),
        ({"conv.weight": torch.ones(2), "fc.bias": torch.ones(2)}, True, "found conv.weight, fc.bias"),
        ({"ema": {"a": 1, "b": 2}}, True, "entry 'a' is no tensor (a, b found)"),
        ({"blocks.0.x": torch.ones(2)}, True, "no tensor x_embedder.proj.weight (blocks.0.x found)"),
    ],
)  # fmt: skip
def test_names_that_are_not_clear(content: object, ema: bool, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(UserError) as error:
        import_weights(tmp_path / "file.pt", tmp_path / "run", replace(SIT, ema=ema))
    assert message in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_scale_that_no_file_says_is_said(tmp_path: Path) -> None:
    torch.save(sit_weights(), tmp_path / "file.pt")
    for name, changes in (("a", {"scale": None}), ("b", {}), ("c", {"scale": None, "kind": "pixels"})):
        said = import_weights(tmp_path / "file.pt", tmp_path / name, replace(SIT, **changes))  # type: ignore[arg-type]
        assert any("Stable Diffusion's VAE, times 0.18215" in sentence for sentence in said) == (name == "a")


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02K\x01K\x02t.", b"PK\x03\x04" + bytes(60), bytes(200)])
def test_damaged_files_are_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UserError, match="file.pt: ") as error:
        import_weights(tmp_path / "file.pt", tmp_path / "run", SIT)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Directories


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random DiT of diffusers, its embeddings alike in all blocks."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=3, out_channels=6, num_layers=2,
        sample_size=2 * GRID, patch_size=2, num_embeds_ada_norm=CLASSES, norm_num_groups=1,
    )  # fmt: skip
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model


def saved(transformer: Any, folder: Path, kind: str) -> Path:
    """`transformer` as users find it; the path they give."""
    if kind == "pipeline":
        transformer.save_pretrained(folder / "transformer")
        index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif kind == "variant":
        transformer.save_pretrained(folder, variant="fp16")
    elif kind == "sharded":
        transformer.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif kind == "sharded variant":
        transformer.save_pretrained(folder, max_shard_size="100KB", variant="fp16")
    elif kind == "pickle":
        transformer.save_pretrained(folder, safe_serialization=False)
    else:
        transformer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["pipeline", "variant", "sharded", "sharded variant", "pickle"])
def test_diffusers_directories(kind: str, transformer: Any, tmp_path: Path) -> None:
    given = Given(num_heads=HEADS)
    import_weights(saved(transformer, tmp_path / "plain", "plain"), tmp_path / "wanted", given)
    said = import_weights(saved(transformer, tmp_path / "dit", kind), tmp_path / "run", given)
    found, wanted = stored(tmp_path / "run"), stored(tmp_path / "wanted")
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert ("of the variant fp16" in said) == ("variant" in kind)


def test_a_diffusers_directory_of_halves(transformer: Any, tmp_path: Path) -> None:
    folder = saved(transformer, tmp_path / "dit", "plain")
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    said = import_weights(folder, tmp_path / "run", Given(num_heads=HEADS))
    assert "read from float16" in said and all(v.isfinite().all() for v in stored(tmp_path / "run").values())


def test_diffusers_directories_that_are_not_whole(transformer: Any, tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            import_weights(folder, tmp_path / "run", Given(num_heads=HEADS))
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    folder = saved(transformer, tmp_path / "sharded", "sharded")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_text()
    next(iter(sorted(folder.glob("*-of-*")))).rename(folder / "gone")
    assert "which is not beside it, expected all shards there" in message(folder)
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / "gone").read_bytes())
    values = json.loads(whole)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(values["weight_map"], "../elsewhere.safetensors")}))
    assert "which is not beside it" in message(folder)
    index.write_text("{}")
    assert "no weight_map" in message(folder)
    pipeline = saved(transformer, tmp_path / "pipeline", "pipeline")
    (pipeline / "model_index.json").write_text('{"transformer": ["diffusers", "PixArtTransformer2DModel"]}')
    assert "its transformer is 'PixArtTransformer2DModel'" in message(pipeline)
    variants = saved(transformer, tmp_path / "variants", "variant")
    file = variants / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(file, variants / "diffusion_pytorch_model.bf16.safetensors")
    assert "weights of the variants bf16, fp16, expected one" in message(variants)
    shutil.rmtree(variants)
    saved(transformer, variants, "plain")
    (variants / "diffusion_pytorch_model.safetensors").rename(variants / "model.onnx")
    assert "no diffusion_pytorch_model.safetensors (config.json, model.onnx found)" in message(variants)


@pytest.mark.parametrize("form", ["safetensors", "sit", "consolidated"])
def test_our_own_directories_are_read(form: str, imported: Path, tmp_path: Path) -> None:
    """A folder that `lsep export` or `lsep checkpoint consolidate` wrote is given as it is."""
    if form == "consolidated":
        gather(checkpoint.find(Run(imported).checkpoints, None), tmp_path / "out")
    else:
        export(Run(imported), form, tmp_path / "out")  # type: ignore[arg-type]
    given = Given(form=None if form == "safetensors" else "sit" if form == "sit" else "repa", num_heads=HEADS)
    import_weights(tmp_path / "out", tmp_path / "run", given)
    found, wanted = stored(tmp_path / "run"), stored(imported)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted) and math.prod(found[TIME].shape) == WIDTH * 256
