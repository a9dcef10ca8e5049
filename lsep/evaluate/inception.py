"""Inception as FID knows it: torch-fidelity's network with the weights that TensorFlow's graph of 2015 had.

`features` is pool_3, 2048 wide; `spatial` the first 7 channels of Mixed_6d's branch1x1 after its ReLU, flattened in the
order H, W, C, 2023 wide; `logits` the 1008 of the last layer without its bias: the layers of ADM's evaluator. Images of
any size are resized as TensorFlow 1 did. In fp32 values depend a little on the batch size; fp64 is the remedy.
"""

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsep.errors import UserError, told
from lsep.evaluate import Precision
from lsep.evaluate.features import Extractor, Features, Identity, sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256_BEGINS = "6726825d"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SPATIAL_CHANNELS = 7


def open_inception(weights: Path | None, precision: Precision, device: torch.device) -> Extractor:
    """The network in eval mode; `weights` None looks where torch.hub keeps downloads."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE if weights is None else weights
    if not path.is_file():
        raise UserError(f"--weights {path}: not found, expected {FILE}, which is at {URL}")
    digest = sha256(path)
    if not digest.startswith(SHA256_BEGINS):
        raise UserError(f"--weights {path}: its sha256 begins with {digest[:8]}, expected {SHA256_BEGINS} of {FILE}")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    network = Inception(_load(path), dtype, device)
    return Extractor(Identity("inception", None, digest), precision, device, network)


class Inception:
    """uint8 images (N, H, W, 3 or 1) to `Features`, computed in `dtype` on `device`."""

    def __init__(self, network: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.network, self.device = network.to(device, dtype), device
        # It would cast its input to float32, and its outputs, which the hooks take before that.
        self.network.feature_extractor_internal_dtype = dtype
        self.caught: dict[str, Tensor] = {}
        self._catch("pool", network.AvgPool)
        self._catch("branch", network.Mixed_6d.branch1x1)

    def _catch(self, name: str, layer: Any) -> None:
        layer.register_forward_hook(lambda module, inputs, output: self.caught.update({name: output}))

    def __call__(self, images: np.ndarray) -> Features:
        if images.ndim != 4 or images.shape[3] not in (1, 3):
            raise UserError(f"images of shape {images.shape[1:]} found, expected (H, W, 3) or (H, W, 1) for inception")
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        # TF32 keeps 10 bits of a product's factors, and benchmarked convolutions differ from call to call.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            self.network(x)
            pool = self.caught["pool"].flatten(1)
            logits = pool @ self.network.fc.weight.T
        spatial = spatial_features(self.caught["branch"])
        self.caught.clear()
        return Features(pool, spatial, logits)


def spatial_features(branch: Tensor) -> Tensor:
    """The first 7 channels of `(N, C, H, W)`, flattened in the order H, W, C: `(N, H W 7)`."""
    return branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def network_class() -> Any:
    """torch-fidelity's FeatureExtractorInceptionV3.

    The package imports torchvision, which this network does not need, which pip builds for CUDA only, and which fails
    over a torch for CPUs: the network's module is therefore imported without the package's `__init__`.
    """
    name = "torch_fidelity"
    if name in sys.modules:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(
            "--features inception needs torch-fidelity, which is not installed: "
            "pip install --no-deps torch-fidelity==0.4.0"
        )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"torch-fidelity cannot be used ({told(error)}), expected version 0.4.0") from None
    finally:  # who imports the package later gets all of it
        for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[module]


def _load(path: Path) -> Any:
    network = network_class()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # The constructor unpickles whatever its file holds: it gets one that was written here.
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        buffer.seek(0)
        return network("inception", ["2048"], feature_extractor_weights_path=buffer)
    except Exception as error:  # damage raises anything
        raise UserError(f"--weights {path}: cannot be read as Inception's weights ({told(error)})") from None
