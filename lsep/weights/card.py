"""The model card of an export: what the weights are, how they were made, and how they are loaded."""

from lsep import __version__
from lsep.backbone import described
from lsep.config import Config, flat
from lsep.run import Run

_LOAD = {
    "safetensors": """from safetensors.torch import load_file

weights = load_file("model.safetensors")  # or, as a run: lsep import model.safetensors --out RUN""",
    "sit": """import torch

weights = torch.load("model.pt", weights_only=True)["ema"]  # as SiT's sample.py does""",
    "diffusers": """from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained(".")
v = model(x_t, timestep=t, class_labels=y).sample""",
}
_LOAD_UNET = {
    "safetensors": """from safetensors.torch import load_file

weights = load_file("model.safetensors")  # under `unet.` those of diffusers' UNet2DModel""",
    "diffusers": """from diffusers import UNet2DModel

model = UNet2DModel.from_pretrained(".")
predicted = model(x_t, timestep=1000 * t, class_labels=y).sample""",
}
_KINDS = {"sit": "flow transformer (SiT)", "unet": "U-Net"}
_FIGURES = ("loss", "probe_accuracy", "train_seconds", "images_per_second", "agreement", "lsep_overhead", "machine")


def text(run: Run, config: Config, form: str, part: str, step: int, notes: list[str]) -> str:
    """The card in Markdown."""
    m, p, manifest = config.model, config.probe, run.manifest()
    unet = m.backbone == "unet"
    place, load = ("the mid-block", _LOAD_UNET) if unet else (f"block {p.depth}", _LOAD)
    lsep = f"probe on {place}, {p.branch}, rho {p.rho:g}" if p.enabled else "off"
    scaled = f"the model sees (latent - {manifest.shift:g}) * {manifest.scale:g}"
    if manifest.kind == "pixels":
        scaled = "the model sees pixels from -1 to 1"
    way = manifest.latents
    if way is not None and way.changed:
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (way.mean, way.std))
        scaled += f", where latent = (z - mean) / std * {way.factor:g} of the VAE's z, mean ({mean}), std ({std})"
    results = {k: v for k, v in run.results().items() if k in _FIGURES and v is not None}
    lines = [
        f"# {run.path.name}", "",
        f"A class-conditional {_KINDS[m.backbone]} trained with lsep {__version__}; preset {run.preset()}.", "",
        f"* {described(m)}",
        f"* {manifest.kind}, {m.in_channels} x {m.input_size} x {m.input_size}, {m.num_classes} classes; {scaled}",
        f"* label {m.num_classes} is no label; path {config.interpolant.path}",
        f"* weights: {part}, step {step}; LSEP (arXiv 2509.21565): {lsep}",
        *(f"* {note}" for note in notes), "",
        "```python", load[form], "```", "",
    ]  # fmt: skip
    if results:
        lines += ["| figure of the run | |", "|---|---|", *(f"| {k} | {v} |" for k, v in results.items()), ""]
    lines += ["| setting | |", "|---|---|", *(f"| {k} | {v} |" for k, v in flat(config).items()), ""]
    return "\n".join(lines)
