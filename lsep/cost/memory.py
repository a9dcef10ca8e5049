"""Peak of the allocator's memory in a training step, by part, for a card that need not be here.

    choice = backends.decide(config, Card((9, 0)))
    step_memory(config, choice, probe_classes=1000)      sum = torch.cuda.max_memory_allocated()

The step is gone through as it runs: what stays all the time, what each block keeps (`lsep.cost.activations`), and for
every block the moment its backward needs most, with the gradients there are by then; and the optimizer, which has all
of them. The largest of these moments is the peak. `bench.memory` puts it beside the allocator.
"""

from collections import Counter
from collections.abc import Iterator

from lsep.backends import Choice
from lsep.config import Config
from lsep.cost.activations import PASSING, Bytes, Shapes, backward, handed_on, kept
from lsep.cost.parameters import Parameters, parameters
from lsep.plan import branch_plan
from lsep_kernels.limits import Device

WORKSPACES = 2 * 32 * 2**20
"""cuBLAS's, on Hopper and newer 32 MiB each: one for the forward's thread, one for the backward's."""
CUBLASLT_WORKSPACE = 32 * 2**20
"""Of `lsep_kernels.cublaslt`."""
GRADIENTS, MODULATION, INPUTS = "gradients", "kept by the modulation", "inputs"


def unmodelled(config: Config, device: Device, processes: int = 1) -> str | None:
    """One sentence why the memory of `config` is not computed here, or None where it is."""
    if config.model.backbone != "sit":
        return "the memory and time of a U-Net are not modelled: its layers are diffusers' own"
    if device.type != "cuda":
        return f"the memory of a step is modelled for GPUs, and the device is {device.type}"
    if processes > 1 and config.dist.mode != "ddp":
        return f"the memory of weights in shards (--dist.mode {config.dist.mode}) is not modelled"
    if config.align.encoder is not None:
        return "the memory and time of an encoder that runs beside the training (--align.encoder) are not modelled"
    if config.backend.kernels == "reference":
        return "the memory of --backend.kernels reference is not modelled: what it keeps is for the compiler to say"
    return None


def step_memory(
    config: Config, choice: Choice, probe_classes: int, probe: bool = True, processes: int = 1
) -> dict[str, int]:
    """Bytes by part at the peak of a step; their sum is the peak of the allocator's memory.

    config: resolved, with its precision; of one process of `processes`, which have equal parts of the batch. choice:
    what runs (`lsep.backends.decide`); probe_classes: the manifest's. probe: False once the probe has ended. The names
    end in " (at ...)" where memory comes and goes.
    """
    found = max(_moments(config, choice, probe_classes, probe, processes), key=lambda moment: moment.total())
    return {name: size for name, size in found.items() if size}


def after_setup(config: Config, choice: Choice, probe_classes: int) -> Bytes:
    """What stays allocated between steps."""
    count, optim = parameters(config, probe_classes).total, config.optim
    averages = 1 + len(optim.ema_extra) + len(optim.ema_profiles)
    return Counter({
        "weights": 4 * count, "moments": 8 * count, "averages": 4 * averages * count,
        "bf16 copies of the weights": 2 * count * choice.bf16_weights,
    })  # fmt: skip


def _moments(config: Config, choice: Choice, probe_classes: int, probe: bool, processes: int) -> Iterator[Bytes]:
    """All that lives at each moment that can be the peak."""
    shards = config.optim.accumulate * processes
    plans = [branch_plan(config, shard, shards, probe) for shard in range(shards)]
    shapes = Shapes(config, choice, max(plans, key=lambda plan: plan.extra))
    count, depth = parameters(config, probe_classes), config.model.depth
    copies = choice.bf16_weights or config.train.precision == "fp32"  # nothing is cast
    gradient = 2 if choice.bf16_weights else 4
    base = after_setup(config, choice, probe_classes) + _always(shapes, choice)
    base += _of_whole_step(shapes, count, choice, probe_classes)
    if not copies:
        # What is computed again casts again: then one block's are there at a time.
        again = config.train.memory.startswith("recompute")
        base["weights cast for a step"] = 2 * (count.block * (1 if again else depth) + count.modulations)
    # A bucket of DDP holds the gradients always; those of earlier micro-batches are there as well.
    standing = processes > 1 or config.optim.accumulate > 1
    before = handed_on(shapes, 0)
    below = [before]
    for block in range(1, depth):
        below.append(below[-1] + kept(shapes, block))
    # The gradients of the modulations' results add up until the modulation's own backward.
    sums = shapes.element * config.model.hidden_size
    for block in range(depth, 0, -1):
        of_block = count.block if choice.joint_modulation else count.block + count.modulation
        done = count.classifier + count.final + (depth - block) * of_block
        rows = sum(6 * shapes.rows(later) for later in range(block + 1, depth + 1)) + 5 * shapes.rows(block)
        yield base + below[block - 1] + _named(backward(shapes, block), f" (at block {block})") + Counter({
            GRADIENTS: gradient * (count.total if standing else done), MODULATION: sums * rows,
        })  # fmt: skip
    yield base + before + Counter({
        GRADIENTS: gradient * count.total, MODULATION: 2 * sums * shapes.rows(1) * (6 * depth + 2),
    })  # fmt: skip
    yield after_setup(config, choice, probe_classes) + _always(shapes, choice) + Counter({
        GRADIENTS: gradient * count.total
    })  # fmt: skip


def _named(found: Bytes, when: str) -> Bytes:
    """What comes and goes, with the moment it is there."""
    return Counter({name + when if name == PASSING else name: size for name, size in found.items()})


def _always(s: Shapes, choice: Choice) -> Bytes:
    """Inputs and libraries' memory; the batch is there twice with a graph, which reads its own."""
    m = s.config.model
    assert m.in_channels is not None and m.input_size is not None
    row = 2 * m.in_channels * m.input_size**2 * 4
    batches = s.config.optim.accumulate * s.plan.batch * row * (2 if choice.graphs else 1)
    workspace = CUBLASLT_WORKSPACE if choice.mlp_by == "cublaslt" else 0
    return Counter({INPUTS: batches, "workspaces of cuBLAS": WORKSPACES + workspace})


def _of_whole_step(s: Shapes, count: Parameters, choice: Choice, probe_classes: int) -> Bytes:
    """What is kept from the embedding, the modulation, the probe and the loss until late in the backward."""
    m = s.config.model
    assert m.in_channels is not None and m.input_size is not None
    rows, width = s.rows(1), m.hidden_size
    latent = s.plan.batch * m.in_channels * m.input_size**2
    # Noised latents and target in float32, patches and their gradient, patches of the input.
    found: Bytes = Counter({INPUTS: latent * (8 + 3 * s.element)})
    if choice.joint_modulation:
        found[MODULATION] = s.element * rows * width * (6 * m.depth + 2)
    else:  # with silu(c), which each of them keeps
        found[MODULATION] = s.element * width * sum(7 * s.rows(block) for block in range(1, m.depth + 1))
    found[MODULATION] += 8 * s.element * rows * width
    if s.plan.probe:
        # The probe's gradients are computed in the forward, in float32.
        found["kept by the probe"] = 4 * (count.classifier + 2 * s.plan.batch * (width + probe_classes))
    if s.config.align.enabled:
        a, tokens = s.config.align, s.plan.batch * s.config.grid**2
        assert a.width is not None
        found["kept by the projector"] = tokens * (4 * a.projector_dim * s.element + a.width * (2 * s.element + 12))
        found["kept by the projector"] += s.stream(s.plan.batch)
    return found
