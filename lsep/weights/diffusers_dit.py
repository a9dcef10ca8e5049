"""SiT's weights as those of diffusers' `DiTTransformer2DModel`, and back.

Two things differ beyond names: diffusers repeats the embeddings of time and label in every block, and its time
embedding divides frequencies by half - 1, so that the first layer over it is refitted (a relative error below 1e-6).
"""

from typing import Any

import torch

from lsep.config import Config
from lsep.errors import UserError
from lsep.weights.convention import TIME, refit, refit_or_anew
from lsep.weights.read import Raw, Tensors, count_blocks

OURS = "lsep.json"
"""Beside our own exports: their time is ours, from 0 to 1."""
_PLAIN = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}  # fmt: skip
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}  # fmt: skip
_EMBEDDING = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def read(raw: Raw) -> tuple[Tensors, list[str]]:
    """The weights in a diffusers directory under SiT's names, with `pos_embed` made from its sizes, and notes."""
    from lsep.model import sincos_positions

    given, out = dict(raw.tensors), {}
    depth = count_blocks(given, "transformer_blocks", str(raw.path))
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _PLAIN.items() for kind in ("weight", "bias")}
    for i in range(depth):
        names |= {
            f"blocks.{i}.{ours}.{kind}": f"transformer_blocks.{i}.{theirs}.{kind}"
            for ours, theirs in _BLOCK.items() for kind in ("weight", "bias")
        }  # fmt: skip
    try:
        for ours, theirs in names.items():
            out[ours] = given.pop(theirs)
        for i in range(depth):
            for kind in ("weight", "bias"):
                parts = [given.pop(f"transformer_blocks.{i}.attn1.to_{x}.{kind}") for x in "qkv"]
                out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for ours, theirs in _EMBEDDING.items():
                tensor = given.pop(f"transformer_blocks.{i}.norm1.emb.{theirs}")
                if not torch.equal(out.setdefault(ours, tensor), tensor):
                    raise UserError(f"{raw.path}: the blocks differ in {theirs}, expected one embedding for all")
        config = raw.rest
        side = int(config["sample_size"]) // int(config["patch_size"])
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{raw.path}: no usable {error.args[0]}, expected a whole DiTTransformer2DModel") from None
    out |= given  # what is left is named as unknown later
    out.pop("pos_embed.pos_embed", None)
    if out[TIME].ndim != 2 or out["x_embedder.proj.bias"].ndim != 1:
        raise UserError(f"{raw.path}: {_EMBEDDING[TIME]} is {tuple(out[TIME].shape)}, expected 2 dimensions")
    out["pos_embed"] = sincos_positions(side, len(out["x_embedder.proj.bias"]))[None]
    own, half = (raw.path / OURS).is_file(), out[TIME].shape[1] // 2
    out[TIME], fitted = refit_or_anew(out[TIME], (1.0 if own else 999.0, half - 1), (1.0, half))
    if own:
        return out, [f"an export of lsep: {fitted}"]
    return out, [f"a DiT, which predicts noise over 1,000 discrete times: a warm start, no flow model ({fitted})"]


def write(tensors: Tensors) -> tuple[Tensors, float]:
    """Weights under SiT's names as diffusers' state, and the relative error of the refitted time layer."""
    out: Tensors = {}
    embedding = {ours: tensors[ours] for ours in _EMBEDDING}
    half = embedding[TIME].shape[1] // 2
    embedding[TIME], error = refit(embedding[TIME], (1.0, half), (1.0, half - 1))
    depth = count_blocks(tensors, "blocks", "the model")
    for kind in ("weight", "bias"):
        out |= {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for ours, theirs in _PLAIN.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            out |= {f"{block}.{theirs}.{kind}": tensors[f"blocks.{i}.{ours}.{kind}"] for ours, theirs in _BLOCK.items()}
            for x, part in zip("qkv", tensors[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{block}.attn1.to_{x}.{kind}"] = part
    for i in range(depth):
        out |= {f"transformer_blocks.{i}.norm1.emb.{theirs}": embedding[ours] for ours, theirs in _EMBEDDING.items()}
    return {name: tensor.clone() for name, tensor in out.items()}, error  # safetensors takes no shared memory


def config_of(config: Config) -> dict[str, Any]:
    """What diffusers' config.json says of a model of ours."""
    m = config.model
    return {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": m.num_heads,
        "attention_head_dim": m.hidden_size // m.num_heads, "in_channels": m.in_channels,
        "out_channels": m.in_channels, "num_layers": m.depth, "dropout": 0.0, "norm_num_groups": 32,
        "attention_bias": True, "sample_size": m.input_size, "patch_size": m.patch_size,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": m.num_classes, "upcast_attention": False,
        "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-6,
    }  # fmt: skip
