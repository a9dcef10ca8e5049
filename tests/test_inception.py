"""Inception's features, on torch-fidelity's network with random weights: the published ones cannot be had here."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsep.errors import UserError
from lsep.evaluate import inception
from lsep.evaluate.features import Extractor, sha256
from lsep.evaluate.inception import network_class, open_inception, spatial_features

CPU = torch.device("cpu")
needs_network = pytest.mark.skipif(
    not importlib.util.find_spec("torch_fidelity"), reason="torch-fidelity is not installed"
)


def test_spatial_features_are_in_the_order_h_w_c() -> None:
    """Two by three places, nine channels: place by place, the first seven channels of each."""
    branch = torch.tensor([[[[100 * h + 10 * w + c for w in range(3)] for h in range(2)] for c in range(9)]])
    wanted = [100 * h + 10 * w + c for h in range(2) for w in range(3) for c in range(7)]
    assert spatial_features(branch).tolist() == [wanted]
    assert spatial_features(torch.zeros(2, 192, 17, 17)).shape == (2, 2023)


def test_missing_weights_are_named_with_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no.pth: not found, expected weights-inception-2015-12-05-6726825d.pth, which is"
    ):
        open_inception(tmp_path / "no.pth", "fp32", CPU)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / inception.FILE
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match="its sha256 begins with [0-9a-f]{8}, expected 6726825d of weights-inception"):
        open_inception(file, "fp32", CPU)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install --no-deps torch-fidelity==0.4.0"):
        network_class()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, whose sha256 begins as that of any file."""

    class Random(network_class()):  # type: ignore[misc]
        def load_state_dict(self, state: object) -> None:
            """Keeps the weights of the initialisation."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Random("random", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # so that a norm that is left out shows
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.01, 0.05)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    torch.save(network.state_dict(), path)
    return path


def opened(path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setattr(inception, "SHA256_BEGINS", sha256(path)[:8])
    return open_inception(path, precision, CPU)  # type: ignore[arg-type]


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)


@needs_network
def test_features_are_those_of_the_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the network's own outputs, and Mixed_6d's branch computed by hand from the layers before it."""
    extractor = opened(weights, "fp32", monkeypatch)
    found = extractor(IMAGES)
    network = network_class()("plain", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    pool, logits = network(x)
    assert torch.equal(found.features, pool) and found.features.shape == (2, 2048)
    assert found.logits is not None and found.spatial is not None
    assert torch.equal(found.logits, logits) and found.logits.shape == (2, 1008)
    order = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c "
    )
    order += "Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    resized = torch.from_numpy(tensorflow_1_resize(IMAGES, 299)).permute(0, 3, 1, 2)
    x = (resized - 128) / 128
    for name in order.split():
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1
    normed = branch.bn(F.conv2d(x, branch.conv.weight)).clamp(min=0)
    truth = normed.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert found.spatial.shape == (2, 2023) and float(found.spatial.max()) > 0
    assert np.abs(found.spatial.numpy() - truth).max() < 1e-4 * np.abs(truth).max()


def tensorflow_1_resize(images: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, place i of the output at i * in / out, no half pixels: by the formula, in float32."""
    _, height, width, _ = images.shape
    out = images.astype(np.float32)
    for axis, size in ((1, height), (2, width)):
        place = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = place.astype(int)
        high, part = np.minimum(low + 1, size - 1), (place - low).astype(np.float32)
        part = part.reshape([-1 if i == axis else 1 for i in range(4)])
        out = out.take(low, axis) * (1 - part) + out.take(high, axis) * part
    return out


@needs_network
def test_fp64_features_do_not_depend_on_the_batch(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = opened(weights, "fp64", monkeypatch)
    both = extractor(IMAGES)
    one = extractor(IMAGES[1:])
    single = opened(weights, "fp32", monkeypatch)(IMAGES)
    for name in ("features", "spatial", "logits"):
        truth, alone, fp32 = getattr(both, name), getattr(one, name), getattr(single, name)
        assert truth.dtype == torch.float64
        scale = float(truth.abs().max())
        assert float((truth[1:] - alone).abs().max()) < 1e-12 * scale
        assert 1e-12 * scale < float((fp32 - truth).abs().max()) < 1e-4 * scale


@needs_network
def test_grey_images_are_spread_over_three_channels(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = opened(weights, "fp32", monkeypatch)
    grey = IMAGES[:1, :, :, :1]
    assert torch.equal(extractor(grey).features, extractor(grey.repeat(3, 3)).features)
    with pytest.raises(UserError, match=r"images of shape \(40, 56, 2\) found, expected \(H, W, 3\) or \(H, W, 1\)"):
        extractor(IMAGES[..., :2])


@needs_network
def test_the_package_can_still_be_imported_whole() -> None:
    """Its __init__ was left out; nothing of that stays behind."""
    assert network_class().__name__ == "FeatureExtractorInceptionV3"
    assert not [name for name in sys.modules if name.startswith("torch_fidelity")]


@needs_network
@pytest.mark.parametrize("content", [b"no pickle", {"fc.weight": torch.zeros(3)}])
def test_damaged_weights_are_named(tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match="w.pth: cannot be read as Inception's weights"):
        opened(file, "fp32", monkeypatch)
