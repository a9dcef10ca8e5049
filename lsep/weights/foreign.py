"""Which project weights come from, their names as SiT's, and the configuration that follows from their shapes."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lsep.config import AlignConfig, Config, ModelConfig, from_dict
from lsep.data.manifest import Manifest, parse_described
from lsep.errors import UserError, shown, told
from lsep.presets import PRESETS
from lsep.weights import diffusers_dit
from lsep.weights.convention import TIME, flip_time, refit_or_anew
from lsep.weights.names import listed
from lsep.weights.read import Raw, Tensors, count_blocks

Form = Literal["sit", "repa", "lsep", "dit", "diffusers"]
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, of the published sizes; weights do not tell."""
_SIZES = {(12, 384): "s", (12, 768): "b", (24, 1024): "l", (28, 1152): "xl"}
_TURNED = {
    "x_embedder.proj.weight": 4, TIME: 2, "final_layer.linear.weight": 2, "final_layer.linear.bias": 1,
    "x_embedder.proj.bias": 1,
}  # fmt: skip
"""Dimensions of the tensors that are changed, or that sizes follow from, before all are compared with a model's."""
_LIGHTNING = re.compile(r"blocks\.0\.(norm1\.weight|mlp\.w12\.weight)|feat_rope\.")


@dataclass
class Foreign:
    """Weights under SiT's names in our convention, and what was done to them."""

    form: Form
    tensors: Tensors
    rounding: float = 0.0
    """See `Raw`."""
    classifier: Tensors = field(default_factory=dict)
    projectors: Tensors = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""
    config: Config | None = None
    """What the weights were trained with, where the file says it."""
    manifest: Manifest | None = None
    """And on."""


def recognise(raw: Raw, form: Form | None) -> Form:
    """The form of `raw`, or `form`; raises UserError where it is not clear, or of a kind that does not fit."""
    names = raw.tensors.keys()
    if any(_LIGHTNING.match(name) for name in names):
        raise UserError(
            f"{raw.path}: LightningDiT's blocks (RMSNorm, SwiGLU, rotary positions) are other functions than SiT's, so "
            "its weights have no place here, expected SiT, REPA, LSEP, DiT or diffusers' DiTTransformer2DModel"
        )
    if any(name.startswith("unet.") for name in names):
        raise UserError(f"{raw.path}: holds a U-Net, expected the weights of a SiT or DiT")
    if raw.diffusers or form == "diffusers":
        if not raw.diffusers or form not in (None, "diffusers"):
            raise UserError(f"{raw.path}: --form is {form!r}, but a diffusers directory is one of form 'diffusers'")
        return "diffusers"
    if form is not None:
        return form
    if "classifier.1.weight" in names or raw.rest.get("format") == "lsep":
        return "lsep"
    if any(name.startswith("projectors.") for name in names):
        return "repa"
    raise UserError(
        f"{raw.path}: its names fit SiT, DiT, REPA and LSEP, which mean different things by them: expected --form sit, "
        "dit (noise prediction), repa or lsep"
    )


def translate(raw: Raw, form: Form) -> Foreign:
    """Weights of `raw`, which is of `form`, under SiT's names, in our direction of time, without a second half of the
    output; what is left over is an error of `fit`."""
    if form == "diffusers":
        tensors, notes = diffusers_dit.read(raw)
        _require_shapes(tensors, str(raw.path))
        return _half_the_output(Foreign(form, tensors, raw.rounding, notes=[*raw.notes, *notes]))
    found = Foreign(form, {}, raw.rounding, notes=[*raw.notes])
    if raw.rest.get("format") == "lsep":
        found.config = _own_config(raw)
        found.manifest = _own_manifest(raw, found.config)
    depth = count_blocks(raw.tensors, "blocks", str(raw.path))
    for name, tensor in raw.tensors.items():
        later = re.match(r"decoder_blocks\.(\d+)\.(.*)", name)  # of old REPA files
        if name.startswith("classifier."):
            found.classifier[name] = tensor
        elif name.startswith("projectors."):
            found.projectors[name] = tensor
        elif later:
            found.tensors[f"blocks.{depth + int(later[1])}.{later[2]}"] = tensor
        else:
            found.tensors[name] = tensor
    _require_shapes(found.tensors, str(raw.path))
    _half_the_output(found)
    if form == "sit":
        exact = raw.rest.get("lsep")
        found.tensors = flip_time(found.tensors)
        # A file of our own export has the layer before it was turned: turning back would round a second time.
        if isinstance(exact, dict) and isinstance(before := exact.get(TIME), Tensor):
            turned = found.tensors[TIME]
            if before.shape == turned.shape and (before - turned).abs().max() <= 1e-5 * turned.abs().max():
                found.tensors[TIME] = before
        found.notes.append("SiT's time and velocity turned into ours, exactly: t = 1 is noise here")
    elif form == "dit":
        found.tensors[TIME], fitted = refit_or_anew(
            found.tensors[TIME], (999.0, weight_half(found)), (1.0, weight_half(found))
        )
        found.notes.append(
            "DiT predicts noise over 1,000 discrete times: this is a warm start, to be trained, no flow model "
            f"({fitted})"
        )
    return found


def _require_shapes(tensors: Tensors, where: str) -> None:
    """Raise UserError unless all are numbers, and those that are turned or cut have their dimensions."""
    for name, dimensions in _TURNED.items():
        if name not in tensors:
            raise UserError(
                f"{where}: no tensor {name} ({listed(tensors)} found), expected the weights of a SiT or DiT"
            )
        if tensors[name].ndim != dimensions or not tensors[name].numel():
            raise UserError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {dimensions} dimensions")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):  # halves are float32 by now; fp8 means nothing unscaled
            raise UserError(f"{where}: {name} is of {tensor.dtype}, expected floating-point numbers of 16 bits or more")


def _own_config(raw: Raw) -> Config:
    """The configuration in the metadata of an export of ours."""
    try:
        values = json.loads(raw.rest["config"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{raw.path}: its metadata hold no configuration ({told(error)})") from None
    config = from_dict(values, f"{raw.path}: metadata")
    if None in (config.model.input_size, config.model.in_channels, config.model.num_classes):
        raise UserError(f"{raw.path}: metadata: the sizes of the data are missing, expected an export of lsep")
    return config


def _own_manifest(raw: Raw, config: Config) -> Manifest | None:
    """What the data was, in the metadata of an export of ours; None where it does not say it, as older ones."""
    where = f"{raw.path}: metadata: data"
    if "data" not in raw.rest:
        return None
    try:
        values = json.loads(raw.rest["data"])
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON ({told(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is {shown(values)}, expected an object")
    found, m = parse_described(values, where, f"what {raw.path.name} was trained on"), config.model
    if (*found.shape, found.num_classes) != (m.in_channels, m.input_size, m.input_size, m.num_classes):
        raise UserError(
            f"{where}: shape {found.shape} and {found.num_classes} classes, expected those of the configuration"
        )
    return found


def weight_half(found: Foreign) -> int:
    """Frequencies of the time embedding, by which SiT and DiT divide."""
    return found.tensors[TIME].shape[1] // 2


def _half_the_output(found: Foreign) -> Foreign:
    """Of an output of 2C channels keep the first half, the other is of no use here; rows go (p, p, channel)."""
    weight, bias = (found.tensors[f"final_layer.linear.{kind}"] for kind in ("weight", "bias"))
    proj = found.tensors["x_embedder.proj.weight"]
    channels, patch = proj.shape[1], proj.shape[-1]
    if len(weight) == len(bias) == 2 * channels * patch**2:
        cut = weight.view(patch**2, 2 * channels, -1)[:, :channels]
        found.tensors["final_layer.linear.weight"] = cut.reshape(-1, weight.shape[1]).contiguous()
        found.tensors["final_layer.linear.bias"] = bias.view(patch**2, 2 * channels)[:, :channels].flatten()
        found.notes.append(f"of {2 * channels} output channels the first {channels} are kept")
    return found


def configuration(found: Foreign, where: str, num_heads: int | None) -> Config:
    """A configuration whose model has the shapes of the weights, from the preset of its size where there is one."""
    t = found.tensors
    if found.config is not None:
        # Without what was left behind: the probe, unless it was asked for, and the projectors of an alignment.
        probe = replace(found.config.probe, enabled=bool(found.classifier))
        return replace(found.config, probe=probe, align=AlignConfig())
    try:
        width, channels, patch, _ = t["x_embedder.proj.weight"].shape
        depth = count_blocks(t, "blocks", where)
        hidden = len(t["blocks.0.mlp.fc1.weight"])
        classes = len(t["y_embedder.embedding_table.weight"]) - 1
        tokens = t["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"{where}: no usable tensor {shown(str(error.args[0]))}, from which sizes follow ({listed(t)} found)"
        ) from None
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise UserError(f"{where}: width {width} is of no published size, expected --num-heads")
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UserError(f"{where}: pos_embed has {tokens} tokens, expected a square")
    size = _SIZES.get((depth, width), "")
    latents = "f16d32" if (side * patch, channels) == (16, 32) else "512" if side * patch == 64 else "256"
    base = PRESETS.get(f"sit-{size}-{patch}-{latents}", Config())
    model = ModelConfig(
        depth=depth, hidden_size=width, num_heads=heads, mlp_ratio=hidden / width, patch_size=patch,
        input_size=side * patch, in_channels=channels, num_classes=classes, qk_norm="blocks.0.attn.q_norm.weight" in t,
    )  # fmt: skip
    probe = replace(
        base.probe, enabled=bool(found.classifier), depth=min(base.probe.depth, depth),
        window_min=min(base.probe.window_min, side), window_max=side,
    )  # fmt: skip
    return replace(base, model=model, probe=probe)


def fit(found: Foreign, wanted: Tensors, where: str) -> None:
    """Raise UserError with every tensor that is missing, unknown or of another shape than in `wanted`."""
    given = found.tensors | found.classifier
    problems = [
        (kind, sorted(names))
        for kind, names in (("missing", wanted.keys() - given.keys()), ("unknown", given.keys() - wanted.keys()))
    ]
    odd = [n for n in sorted(wanted.keys() & given.keys()) if wanted[n].shape != given[n].shape]
    problems.append(("of another shape", [f"{n} {tuple(given[n].shape)} for {tuple(wanted[n].shape)}" for n in odd]))
    told = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems if names]
    if told:
        raise UserError(f"{where}: the weights do not fit a SiT of their sizes; {'; '.join(told)}")
