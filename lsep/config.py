"""The configuration: frozen dataclasses in sections; `presets` has ready ones, `checks` says what cannot be meant.

    from lsep.config import override
    from lsep.presets import PRESETS
    config = override(PRESETS["quickstart"], {"train.steps": 100})

Flags and their help are generated from the fields (`lsep train PRESET --help`). The resolved configuration is written
to every run as `config.json`. Nothing here imports torch.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lsep.errors import UserError, nearest, shown


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: SiT, the DiT architecture trained as a flow (arXiv 2212.09748, 2401.08740), or a U-Net."""

    backbone: Literal["sit", "unet"] = "sit"
    """sit: a transformer; unet: diffusers' UNet2DModel, whose probe reads the mid-block."""
    depth: int = 12
    """Transformer blocks; of a U-Net its levels, each of half the side and twice the channels of the one before."""
    hidden_size: int = 384
    """Width D of a token; of a U-Net the channels of its last level and mid-block."""
    num_heads: int = 6
    """Attention heads; must divide hidden_size. A U-Net has attention in its last level and mid-block."""
    layers_per_level: int = 2
    """ResNet blocks of each level of a U-Net on its way down; it has one more on its way up."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP as a multiple of hidden_size."""
    patch_size: int = 2
    """Side of a patch, in latent pixels; 1 for a U-Net, which has none."""
    input_size: int | None = None
    """Side of the square latent or image, in its own pixels; None takes the data's."""
    in_channels: int | None = None
    """Channels of the latent or image; None takes the data's."""
    num_classes: int | None = None
    """Classes of the conditioning label; None takes the data's."""
    conditional: bool = True
    """Condition on the class label; False trains an unconditional model (the probe still sees labels)."""
    class_dropout_prob: float = 0.1
    """Probability p that the main branch drops its label, for classifier-free guidance."""
    qk_norm: bool = False
    """LayerNorm on the queries and keys of each head."""


@dataclass(frozen=True)
class InterpolantConfig:
    """The path from data (t = 0) to noise (t = 1), and what is predicted on it."""

    path: Literal["linear", "cosine", "vp"] = "linear"
    """linear: x_t = (1 - t) x + t e; cosine: x_t = cos(pi t / 2) x + sin(pi t / 2) e; vp: as DDPM."""
    prediction: Literal["v", "eps", "x"] = "v"
    """What the model is trained to give: the velocity, the noise (as DiT), or the data. Samplers see the velocity."""
    time: Literal["uniform", "logit-normal", "lognormal"] = "uniform"
    """Distribution of the training time t; lognormal (REPA): of noise over data, sigma(t) / alpha(t), which on a cosine
    path is t = 2 / pi atan(exp(z)), and on a linear one the same as logit-normal."""
    time_mean: float = 0.0
    """Mean of logit(t), or of log(sigma(t) / alpha(t)), for logit-normal and lognormal."""
    time_std: float = 1.0
    """Standard deviation of the same."""


@dataclass(frozen=True)
class ProbeConfig:
    """The LSEP term: a linear probe on an intermediate layer, trained with the denoiser (arXiv 2509.21565)."""

    enabled: bool = True
    """Train with the LSEP term; False is the backbone alone."""
    branch: Literal["shared", "paper"] = "shared"
    """shared: a second pass only where the label states of main pass and probe differ; paper: independent draws and a
    full second pass."""
    extra_fraction: float | None = None
    """Fraction e of the batch with a second pass (shared), from 0 to rho - p; None is rho - p, the full objective."""
    rho: float = 0.9
    """Probability that the probe's branch drops its label."""
    depth: int = 8
    """The probe reads the output of this block, counted from 1; 1 for a U-Net, whose probe reads the mid-block."""
    window_min: int = 12
    """Smallest side of the pooling window, in tokens; those of a U-Net are its mid-block's positions."""
    window_max: int | None = None
    """Largest side of the pooling window, in tokens; None is the side of the token grid."""
    weight_start: float = 0.0225
    """Weight omega of the cross-entropy in the first time bin (clean data)."""
    weight_end: float = 0.03
    """Weight omega in the last time bin (noise); equal to weight_start for a constant weight."""
    weight_bins: int = 10
    """Equal bins of t over which omega rises linearly."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in [0, 1)."""
    decay_start_epoch: int | None = 100
    """From this epoch on the term is multiplied by 0.1^((epoch - start) / decay_epochs); None never decays it."""
    decay_epochs: int = 800
    """Epochs in which the decay reaches a tenth."""
    end_step: int | None = None
    """Drop the probe from this step on (the backbone alone from there); None keeps it."""
    pool_before_fc2: bool = True
    """In the probed block, pool the second pass before the linear fc2: same result, a third of its matmuls less."""


@dataclass(frozen=True)
class AlignConfig:
    """REPA: tokens of the main pass are drawn to those of a frozen image encoder (arXiv 2410.06940).

    It is on where `encoder` or `features` is given, with or without the probe.
    """

    encoder: str | None = None
    """transformers id or folder of a vision transformer (DINOv2, ...), run on the images of every batch."""
    features: str | None = None
    """Instead of an encoder: a store of its tokens (lsep data features)."""
    images: str | None = None
    """Folder of the images whose latents train, for the encoder; not needed where the data itself is images."""
    image_size: int | None = None
    """Side to which these images are resized and cropped, in pixels; None is 8 a latent pixel."""
    depth: int = 8
    """The tokens after this block are aligned, counted from 1."""
    weight: float = 0.5
    """Weight of the loss, one minus the cosine."""
    projector_dim: int = 2048
    """Hidden width of the projector, an MLP of three layers from the model's tokens to the encoder's."""
    width: int | None = None
    """Width of the encoder's tokens; None takes the encoder's."""

    @property
    def enabled(self) -> bool:
        return self.encoder is not None or self.features is not None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, gradient clipping, schedule and EMA."""

    lr: float = 1e-4
    """Learning rate of the backbone."""
    probe_lr: float = 1e-4
    """Learning rate of the probe."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per unit of learning rate."""
    clip: float = 1.0
    """Largest global gradient norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine to zero at train.steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    ema_decay: float = 0.9999
    """Decay per step of the exponential moving average of all weights."""
    ema_extra: tuple[float, ...] = ()
    """Decays of further averages, kept beside it."""
    ema_profiles: tuple[float, ...] = ()
    """Relative widths of averages by power functions (EDM2), such as 0.05 0.1; `lsep ema reconstruct` makes others."""
    ema_snapshot_every: int = 0
    """Steps between copies of those into RUN/ema, for that; 0 keeps none."""
    accumulate: int = 1
    """Micro-batches per step; must divide train.batch_size."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images or latents come from."""

    path: str | None = None
    """A store (a folder with manifest.json), or `digits` for the real images inside scikit-learn."""
    loader: Literal["auto", "torch", "dali", "resident"] = "auto"
    """torch: threads and pinned buffers; dali: the same through NVIDIA DALI; resident: all of it in device memory."""
    threads: int = 2
    """Threads that read rows."""
    prefetch: int = 4
    """Micro-batches read ahead of the step."""
    crc: bool = True
    """Compare the checksum of every row that is read."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """A damaged row ends the run (raise), or is replaced by the next in order and counted in the metrics (skip)."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 400_000
    """Optimizer steps."""
    batch_size: int = 256
    """Images in a step, over all devices and micro-batches."""
    seed: int = 0
    """Seed of weights, data order, noise, times, label drops and windows."""
    init: str | None = None
    """A run whose averaged weights a new run starts from (`lsep import` makes one of others' weights)."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 10_000
    """Steps between two checkpoints; the last step always writes one."""
    keep_last: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept besides; 0 keeps none."""
    sample_every: int = 10_000
    """Steps between two sample grids; 0 draws only the last."""
    eval_every: int = 0
    """Steps between two Frechet distances of the EMA weights' samples, see the section evaluate; 0 measures none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs the matmuls under autocast over fp32 weights; auto is bf16 on a GPU and fp32 on a CPU."""
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    """What bf16 matmuls read: copies the optimizer writes, or fp32 weights cast at each use; auto: copies if it can."""
    fp32_residual: bool = False
    """Keep the residual stream in float32 under bf16 autocast."""
    fp8: bool = False
    """The four matrix products of each block in fp8, but for weight gradients; needs bf16 and a GPU with fp8."""
    memory: Literal["auto", "keep", "recompute-elementwise", "recompute-blocks"] = "auto"
    """What a step keeps for its backward; norms and GELU, or whole blocks, can be computed again to save memory. auto
    keeps all; where that does not fit on the GPU, more micro-batches (optim.accumulate) come first."""
    compile: Literal["auto", "off", "block", "model"] = "auto"
    """torch.compile of each block (one code for all of a shape) or of the whole objective; auto: block on a GPU."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """The whole step as one CUDA graph; auto is on for one process whose optimizer is on the GPU (csrc, reference)."""
    max_skipped: int = 10
    """Steps in a row without a finite gradient, each skipped, after which a run ends with a diagnosis."""
    on_spike: Literal["off", "warn", "rollback"] = "warn"
    """When a window's loss is spike_factor times the median of the last 20: say so, or go back to the last checkpoint
    and leave out the data since."""
    spike_factor: float = 2.0
    """How far a loss must jump to be a spike."""
    overhead_rounds: int = 5
    """Pairs of steps, with and without the probe, that measure LSEP's cost once a run is done; 0 leaves it out."""
    wandb: str | None = None
    """Weights & Biases project to log to; None logs to files and TensorBoard only."""


@dataclass(frozen=True)
class BackendConfig:
    """Which implementation computes what; the mathematics is the same (`lsep doctor` shows what `auto` means here)."""

    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Operations of the block, the probe and the loss: Triton kernels or plain PyTorch; auto is Triton on a GPU."""
    attention: Literal["auto", "triton", "cudnn", "flash", "sdpa", "reference"] = "auto"
    """Attention; auto is the Triton kernel on Hopper for 256 tokens and heads of 64 or 72, else cuDNN or SDPA."""
    modulation: Literal["auto", "joint", "block"] = "auto"
    """adaLN's matrix products: one for all blocks, or one a block; auto is joint for one process over bf16 weights."""
    mlp: Literal["auto", "torch", "triton", "cublaslt"] = "auto"
    """A block's MLP; triton and cublaslt compute GELU again in the backward; auto is triton where the kernels are."""
    optimizer: Literal["auto", "csrc", "torch", "apex", "reference"] = "auto"
    """Clipping, AdamW and EMA; auto is csrc on a GPU where it is built, otherwise torch."""


@dataclass(frozen=True)
class DistConfig:
    """Many processes, started by torchrun; the global batch and the losses are those of one."""

    mode: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: all weights on every GPU; fsdp: shards of weights, EMA and optimizer; hsdp: shards within replicas."""
    replicate: int | None = None
    """Replicas of hsdp; None is one a node."""
    reduce: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which gradients are averaged; auto is that of the weights the model runs on."""
    timeout: float = 600.0
    """Seconds a process waits for the others before the run ends with the name of the one that does not answer."""


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn from the EMA weights."""

    sampler: Literal["ode", "heun", "sde", "dopri5"] = "ode"
    """ode: Euler; heun: second order; sde: Euler-Maruyama, diffusion 2t, last step at t = 0.04; dopri5: adaptive."""
    steps: int = 50
    """Sampler steps; dopri5 chooses its own."""
    cfg: float = 1.0
    """Guidance scale; 1 is no guidance."""
    guidance_low: float = 0.0
    """Smallest t at which guidance acts."""
    guidance_high: float = 1.0
    """Largest t at which guidance acts."""
    guidance_rule: Literal["time", "repa"] = "time"
    """Which t must be in that interval: time, the one the model is asked at; repa, the step's start, for Heun's second
    slope too, as REPA's and LSEP's samplers have it."""
    cfg_channels: int | None = None
    """First channels that guidance acts on; None is all. SiT's and DiT's own figures guide 3 of 4."""
    num: int = 64
    """Images in a sample grid."""
    batch_size: int = 64
    """Images that are kept in memory at once; the model runs on units of 32."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The Frechet distance that train.eval_every measures, of samples drawn as the section sample says."""

    features: str | None = None
    """inception, or a function as MODULE:FUNCTION or FILE.py:FUNCTION (see lsep/evaluate/features.py)."""
    weights: str | None = None
    """File of the extractor's weights."""
    reference: str | None = None
    """Statistics to compare with (lsep evaluate reference writes them); None is the training data."""
    num: int = 10_000
    """Samples drawn; the classes in turn."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    interpolant: InterpolantConfig = field(default_factory=InterpolantConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def grid(self) -> int:
        """Side of the grid of tokens that the probe reads."""
        assert self.model.input_size is not None, "the configuration is not resolved yet"
        if self.model.backbone == "unet":
            return self.model.input_size >> (self.model.depth - 1)
        return self.model.input_size // self.model.patch_size

    @property
    def probe_depths(self) -> int:
        """At how many depths, from 1 on, the backbone has features: after each block, or in a U-Net's mid-block."""
        return 1 if self.model.backbone == "unet" else self.model.depth

    @property
    def extra_fraction(self) -> float:
        """Fraction of the batch with a second pass: e, or 1 for the paper's plan."""
        if self.probe.branch == "paper":
            return 1.0
        full = self.probe.rho - self.model.class_dropout_prob
        return full if self.probe.extra_fraction is None else self.probe.extra_fraction


# ---------------------------------------------------------------------------------------------------------------------
# Flat names, overrides and JSON


def flat(config: Config) -> dict[str, Any]:
    """`{"section.field": value}` for every field."""
    return {f"{s}.{k}": v for s, section in asdict(config).items() for k, v in section.items()}


def override(config: Config, values: dict[str, Any]) -> Config:
    """A copy with `{"section.field": value}` put in; raises UserError for a name or a value that does not fit."""
    known = flat(config)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"field {shown(name)} is unknown{nearest(name, list(known))}")
        section, key = name.split(".")
        part = getattr(config, section)
        if isinstance(value, int) and not isinstance(value, bool) and get_type_hints(type(part))[key] is float:
            value = _as_float(name, value)  # JSON and people write 1 for 1.0
        if isinstance(value, list | tuple):  # JSON has no tuples
            value = tuple(_as_float(name, v) if type(v) is int else v for v in value)
        _check_type(name, value, get_type_hints(type(part))[key])
        config = replace(config, **{section: replace(part, **{key: value})})
    return config


def _as_float(name: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is {shown(value)}, expected a number below 1e308") from None


def _check_type(name: str, value: Any, hint: Any) -> None:
    choices = get_args(hint)
    if get_origin(hint) is tuple:
        if type(value) is not tuple or not all(type(v) is choices[0] for v in value):
            raise UserError(f"{name} is {shown(value)}, expected a list of {choices[0].__name__}s")
        return
    if choices and not any(isinstance(c, type) for c in choices):  # Literal
        if value not in choices:
            raise UserError(f"{name} is {shown(value)}, expected one of {', '.join(map(repr, choices))}")
        return
    kinds = choices or (hint,)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits:
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{name} is {shown(value)}, expected {wanted}")


def from_dict(values: Any, source: str) -> Config:
    """The configuration in the nested dictionary `values`; `source` names where it comes from in errors."""
    names = [f.name for f in fields(Config)]
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise UserError(f"{source} holds no configuration: expected an object with the sections {', '.join(names)}")
    found = {f"{s}.{k}": v for s, section in values.items() for k, v in section.items()}
    if found.get("align.size", 0) is None:  # a field of earlier runs, of which only the default was ever right
        del found["align.size"]
    try:
        return override(Config(), found)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
