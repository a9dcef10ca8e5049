"""Where the figures come from: machine, versions, commit, and the two ceilings everything is measured against."""

import os
import platform
import shutil
import subprocess
import sys

import torch
import triton

from bench.programs import program, unbuilt
from bench.section import ROOT, Context, Section
from bench.timing import measure
from lsep.config import override
from lsep.presets import PRESETS

_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,power.limit,temperature.gpu"


def machine(context: Context, section: Section) -> None:
    """Names and versions, and the measured rates of a copy and of a bf16 matrix product."""
    facts = {"GPU": _gpu(context), **_driver(section), **_versions(), "commit": commit(), "seed": context.seed}
    facts["command"] = f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip()
    facts |= _default_program(context)
    problem = unbuilt(context.device)
    if problem:
        section.failures.append(problem)
    context.copy_rate = copy_rate(context)
    context.matrix_rate = matrix_rate(context)
    facts["device copy"] = f"{context.copy_rate / 1e12:.3g} TB/s, bytes read and written"
    facts["bf16 matrix product"] = f"{context.matrix_rate / 1e12:.3g} TFLOP/s"
    if context.cuda:
        facts["clocks after the products"] = ", ".join(_smi("clocks.sm,clocks.mem")) or "unknown"
    section.rows = [{"what": key, "found": str(value)} for key, value in facts.items()]
    section.details = {"copy_rate": context.copy_rate, "matrix_rate": context.matrix_rate, **facts}


def _default_program(context: Context) -> dict[str, str]:
    """What `auto` means here for a step of SiT-XL/2; what was timed stands in each row of the step tables."""
    config = override(PRESETS["sit-xl-2-256"], {
        "model.input_size": 32, "model.in_channels": 4, "model.num_classes": 1000,
        "train.precision": "bf16" if context.cuda else "fp32",
    })  # fmt: skip
    return {f"auto, {what}": by for what, by in program(config, context.device).items()}


def copy_rate(context: Context) -> float:
    """Bytes/s of a copy of 4 GiB, which no cache holds, counting bytes read and written."""
    source = torch.empty(1 << (16 if context.smoke else 32), dtype=torch.uint8, device=context.device).fill_(1)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, context.device, flush=False)["copy"].median
    return 2 * source.numel() / seconds


def matrix_rate(context: Context) -> float:
    """FLOP/s of a bf16 product of 8192^3 on random data (zeros would run faster)."""
    n = 64 if context.smoke else 8192
    a, b = (torch.randn(n, n, device=context.device).to(torch.bfloat16) for _ in range(2))
    seconds = measure({"product": lambda: a @ b}, context.device, repeats=6, flush=False)["product"].median
    return 2 * n**3 / seconds


def commit() -> str:
    """The commit of the tree, `+ changes` when files differ; `$LSEP_COMMIT` where git cannot say."""
    git = ["git", "-C", str(ROOT), "-c", "safe.directory=*"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LSEP_COMMIT", "unknown (no git here, LSEP_COMMIT is not set)")
    return f"{head} + changes" if changes.strip() else head


def _gpu(context: Context) -> str:
    if not context.cuda:
        return "none (smoke test on a CPU)"
    properties = torch.cuda.get_device_properties(context.device)
    count, memory = properties.multi_processor_count, properties.total_memory / 2**30
    return f"{properties.name}, {count} multiprocessors, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"


def _driver(section: Section) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        section.notes.append("nvidia-smi is missing: driver, clocks and power limit are unknown.")
        return {}
    return dict(zip(_QUERY.split(","), _smi(_QUERY), strict=False))


def _smi(query: str) -> list[str]:
    """Fields of nvidia-smi's first GPU; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in done.stdout.strip().split(",")]


def _versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else "none",
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores",
    }
