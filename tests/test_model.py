"""SiT: published sizes and names, and its parts against formulas."""

import math

import numpy as np
import pytest
import torch
from conftest import MANIFEST, lively, relative_error, tiny

from lsep.checks import resolve
from lsep.config import Config, override
from lsep.model import SiT, sincos_positions
from lsep.objective import Objective
from lsep.presets import PRESETS

IMAGENET = {"model.input_size": 32, "model.in_channels": 4, "model.num_classes": 1000}


def build(**changes: object) -> SiT:
    return lively(Objective(resolve(tiny(**changes), MANIFEST), MANIFEST)).model


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sit-s-2-256", 33), ("sit-b-2-256", 130), ("sit-l-2-256", 458), ("sit-xl-2-256", 675)],
)
def test_published_parameter_counts(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = SiT(override(PRESETS[name], IMAGENET))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = SiT(override(PRESETS["sit-xl-2-256"], IMAGENET)).state_dict()
    shapes = {
        "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (16, 1152), "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,),
    }  # fmt: skip
    for i in range(28):
        for key, shape in {
            "attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608),
            "adaLN_modulation.1": (6912, 1152),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{key}.weight"], shapes[f"blocks.{i}.{key}.bias"] = shape, shape[:1]
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes


def test_starts_as_zero_velocity() -> None:
    objective = Objective(resolve(tiny(), MANIFEST), MANIFEST)
    objective.initialize(0)
    v = objective.model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5]))
    assert v.shape == (2, 3, 8, 8)
    assert not v.any()


def test_initialisation_depends_on_the_seed_only() -> None:
    a, b, c = (Objective(resolve(tiny(), MANIFEST), MANIFEST) for _ in range(3))
    a.initialize(1)
    torch.randn(3)
    b.initialize(1)
    c.initialize(2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.model.x_embedder.proj.weight, c.model.x_embedder.proj.weight)


def test_positions_name_row_and_column() -> None:
    table = sincos_positions(3, 8).view(3, 3, 8)
    for row in range(3):
        for column in range(3):
            halves = [f(p / d) for p in (column, row) for f in (math.sin, math.cos) for d in (1, 100)]
            np.testing.assert_allclose(table[row, column], halves, atol=1e-7)


def test_time_embedding_has_cosines_first() -> None:
    embedder = build().t_embedder
    seen: list[torch.Tensor] = []
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(torch.tensor([0.7]))
    frequencies = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    truth = torch.cat([torch.cos(0.7 * frequencies), torch.sin(0.7 * frequencies)])[None]
    assert relative_error(seen[0], truth) < 1e-6


def patchwise(x: torch.Tensor, p: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, T, p p C), channels last inside a patch, by plain indexing."""
    n, _, height, width = x.shape
    patches = [
        x[:, :, i : i + p, j : j + p].permute(0, 2, 3, 1).reshape(n, -1)
        for i in range(0, height, p)
        for j in range(0, width, p)
    ]
    return torch.stack(patches, 1)


def test_forward_is_the_papers_equations() -> None:
    """A second SiT, written from the equations in float64, on the same weights."""
    model = build().double()
    w = dict(model.state_dict())
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h: torch.Tensor) -> torch.Tensor:
        return h / (1 + torch.exp(-h))

    def norm(h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def gelu(h: torch.Tensor) -> torch.Tensor:
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    frequencies = torch.tensor([math.exp(-math.log(10_000) * i / 128) for i in range(128)])
    angles = (t[:, None] * frequencies).double()
    c = linear(silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = c + w["y_embedder.embedding_table.weight"][y]
    kernel = w["x_embedder.proj.weight"].permute(0, 2, 3, 1).reshape(32, -1)  # channels last, as the patches
    h = patchwise(x, 2) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"]
    for i in range(3):
        s1, k1, g1, s2, k2, g2 = linear(silu(c), f"blocks.{i}.adaLN_modulation.1")[:, None].chunk(6, -1)
        q, k, v = (
            part.view(2, 16, 2, 16).transpose(1, 2)
            for part in linear(norm(h) * (1 + k1) + s1, f"blocks.{i}.attn.qkv").chunk(3, -1)
        )
        a = (torch.softmax(q @ k.transpose(2, 3) / 4, -1) @ v).transpose(1, 2).reshape(2, 16, 32)
        h = h + g1 * linear(a, f"blocks.{i}.attn.proj")
        h = h + g2 * linear(gelu(linear(norm(h) * (1 + k2) + s2, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    shift, scale = linear(silu(c), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    truth = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    # The model keeps statistics in float32, so float64 inputs do not buy more.
    assert relative_error(patchwise(model(x, t.double(), y), 2), truth) < 1e-5


def test_qk_norm_normalises_each_head() -> None:
    attention = build(model__qk_norm=True).blocks[0].attn
    assert attention.q_norm.weight.shape == (16,)
    with torch.no_grad():
        x = torch.randn(1, 4, 32)
        attention.q_norm.weight.fill_(1.0), attention.k_norm.weight.fill_(1.0)
        attention.q_norm.bias.zero_(), attention.k_norm.bias.zero_()
        before = attention(x)
        attention.qkv.weight[:64] *= 7  # queries and keys: their scale no longer matters
        attention.qkv.bias[:64] *= 7
        assert relative_error(attention(x), before) < 1e-3  # LayerNorm's eps


def test_sizes_come_from_the_configuration() -> None:
    config = override(Config(), {"model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "model.patch_size": 4,
                                 "model.input_size": 12, "model.in_channels": 1, "model.num_classes": 3})  # fmt: skip
    model = SiT(config)
    assert model(torch.randn(2, 1, 12, 12), torch.rand(2), torch.tensor([3, 0])).shape == (2, 1, 12, 12)


def test_features_are_what_pools_into_the_probe() -> None:
    model = build()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    tokens = model.features(x, t, y, [3, 1, 2])
    whole = torch.full((2, 16), 1 / 16)
    for depth, at in zip((3, 1, 2), tokens, strict=True):
        assert at.shape == (2, 16, 32)
        _, pooled = model.forward_with_probe(x, t, y, y[:0], depth, whole)
        assert relative_error(at.mean(1), pooled) < 1e-6
    assert torch.equal(model.features(x, t, y, [1])[0], tokens[1])
