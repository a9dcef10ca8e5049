"""Frozen encoders: the tokens of transformers' own models, one a patch, in order; and those that have none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WIDTH, relative_error, tokens_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from lsep.encoder import Encoder
from lsep.errors import UserError

pytest.importorskip("transformers", reason='pip install -e ".[align]"')


def test_tokens_are_those_of_the_model_itself(dino: Path, pixels: np.ndarray) -> None:
    encoder = Encoder(str(dino), 4, torch.device("cpu"))
    assert (encoder.size, encoder.width) == (56, WIDTH)
    assert relative_error(encoder(torch.from_numpy(pixels)), tokens_of(dino, pixels)) < 1e-5
    gray = pixels[:, :1]
    assert relative_error(encoder(torch.from_numpy(gray)), tokens_of(dino, gray.repeat(3, 1))) < 1e-5


def test_registers_are_no_tokens(tmp_path: Path, pixels: np.ndarray) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    small = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small)).eval()
    model.save_pretrained(tmp_path / "model")
    got = Encoder(str(tmp_path / "model"), 4, torch.device("cpu"))(torch.from_numpy(pixels[:2]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (torch.from_numpy(pixels[:2]).float() / 255 - mean) / std
    with torch.no_grad():
        whole = model(torch.nn.functional.interpolate(x, (56, 56), mode="bicubic")).last_hidden_state
    assert whole.shape[1] == 1 + 4 + 16 and relative_error(got, whole[:, 5:]) < 1e-5


def test_a_clip_brings_its_own_normalisation(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=8, image_size=48)).save_pretrained(tmp_path)
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


def test_a_masked_autoencoder_masks_nothing_and_keeps_the_order(tmp_path: Path, pixels: np.ndarray) -> None:
    """ViTMAE as published masks three quarters and shuffles the rest: here its tokens are the same ViT's."""
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    mae = ViTMAEModel(ViTMAEConfig(**sizes, image_size=32, patch_size=8))
    mae.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    got = Encoder(str(tmp_path), 4, torch.device("cpu"))(torch.from_numpy(pixels[:3]))
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    missing = vit.load_state_dict(mae.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    x = torch.nn.functional.interpolate(torch.from_numpy(pixels[:3]) / 127.5 - 1, (32, 32), mode="bicubic")
    with torch.no_grad():
        assert relative_error(got, vit(x).last_hidden_state[:, 1:]) < 1e-5


def test_an_encoder_is_known_by_its_weights(tmp_path: Path) -> None:
    """The same at every loading, though transformers fills a pooler that the file has not with random numbers."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    one, two = (Encoder(str(tmp_path), 4, torch.device("cpu")) for _ in range(2))
    poolers = [e.model.state_dict()["pooler.dense.weight"] for e in (one, two)]
    assert not torch.equal(*poolers) and one.origin == two.origin
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if n.endswith("layernorm.bias"))
    save_file({**weights, name: weights[name] + 1e-3}, tmp_path / "model.safetensors", {"format": "pt"})
    assert Encoder(str(tmp_path), 4, torch.device("cpu")).origin.sha256 != one.origin.sha256
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.5] * 3}))
    assert Encoder(str(tmp_path), 4, torch.device("cpu")).origin.sha256 != one.origin.sha256
    assert Encoder(str(tmp_path), 2, torch.device("cpu")).origin.size == 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert Encoder(str(tmp_path), 4, torch.device("cpu")).origin == one.origin
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 4}))
    assert Encoder(str(tmp_path), 4, torch.device("cpu")).origin.sha256 != one.origin.sha256


def test_positions_are_resampled_once_as_repa_does(tmp_path: Path, pixels: np.ndarray) -> None:
    """A DINOv2 of 9 x 9 patches on a grid of 4: its positions through Pillow's bicubic filter, which antialiases."""
    from PIL import Image
    from transformers import Dinov2Config, Dinov2Model

    small = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 126,
        "patch_size": 14,
    }
    model = Dinov2Model(Dinov2Config(**small)).eval()
    positions = model.embeddings.position_embeddings
    positions.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path), 4, torch.device("cpu"))
    square = positions.detach()[0, 1:].unflatten(0, (9, 9)).numpy()
    resized = [Image.fromarray(square[..., i]).resize((4, 4), Image.Resampling.BICUBIC) for i in range(WIDTH)]
    wanted = torch.from_numpy(np.stack([np.asarray(channel) for channel in resized], -1)).flatten(0, 1)
    found = encoder.model.embeddings.position_embeddings  # type: ignore[union-attr]
    assert isinstance(found, Tensor) and torch.equal(found[0, :1], positions[0, :1])
    assert relative_error(found[0, 1:], wanted) < 1e-5
    model.embeddings.position_embeddings = torch.nn.Parameter(found)
    x = (torch.from_numpy(pixels[:2]).float() / 255 - encoder.mean) / encoder.std
    with torch.no_grad():
        tokens = model(torch.nn.functional.interpolate(x, (56, 56), mode="bicubic")).last_hidden_state[:, 1:]
    assert relative_error(encoder(torch.from_numpy(pixels[:2])), tokens) < 1e-5
    assert encoder.origin == Encoder(str(tmp_path), 4, torch.device("cpu")).origin  # of the weights as they are stored


def test_what_gives_no_token_a_patch_is_refused(dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        ResNetConfig,
        ResNetModel,
        SwinConfig,
        SwinModel,
        YolosConfig,
        YolosModel,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    for name, model in (
        ("yolos", YolosModel(YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5))),
        (
            "swin",
            SwinModel(
                SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
            ),
        ),
        ("resnet", ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))),
        ("clip", CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "patch_size": 8, "image_size": 32}))),
    ):
        model.save_pretrained(tmp_path / name)
        normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(normal))
    for name, sentence in (
        ("yolos", "a YolosModel, whose last tokens are for detections, expected an encoder of images"),
        ("swin", "gives 4 tokens of 16 patches, expected one a patch"),
        ("resnet", "a ResNetModel without a patch size, expected a vision transformer"),
    ):
        with pytest.raises(UserError, match=sentence):
            Encoder(str(tmp_path / name), 4, torch.device("cpu"))
    clip = Encoder(str(tmp_path / "clip"), 4, torch.device("cpu"))  # of both towers that of images
    assert type(clip.model).__name__ == "CLIPVisionModel" or type(clip.model).__name__ == "CLIPVisionTransformer"
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as .*layers.0.mlp.fc1.weight"):
        Encoder(str(tmp_path / "clip"), 4, torch.device("cpu"))

    from transformers import Dinov2Model

    broken = tmp_path / "broken"
    shutil.copytree(dino, broken)
    weights = load_file(broken / "model.safetensors")
    weights["layernorm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="gives values that are not finite, expected numbers"):
        Encoder(str(broken), 4, torch.device("cpu"))
    whole = Dinov2Model.forward
    monkeypatch.setattr(
        Dinov2Model, "forward", lambda self, pixel_values: whole(self, pixel_values + torch.randn_like(pixel_values))
    )
    with pytest.raises(UserError, match="gives other tokens each time for the same image, expected the same"):
        Encoder(str(dino), 4, torch.device("cpu"))


def test_half_precision_files_run_in_float32(dino: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(dino).half().save_pretrained(tmp_path / "half")
    encoder = Encoder(str(tmp_path / "half"), 4, torch.device("cpu"))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
