"""The end of a run as a set of steps: the last samples, results.json, report.html.

Each is done where its output is missing or unreadable, so that a run that was killed at its end, or has lost a file of
it, is put right by the command that trained it.
"""

import json
import platform
from collections.abc import Callable
from typing import Any

import torch

from lsep.backbone import Backbone
from lsep.checkpoint import Progress
from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.files import discard, read_plain, write_atomic
from lsep.pages import png_problem
from lsep.report import render, results_mark
from lsep.run import Run

AGREEMENT_SAMPLES = 200
SAMPLES, RESULTS, REPORT = "samples", "results", "report"


def missing(run: Run, steps: int) -> list[str]:
    """Which outputs of the end at `steps` are not there, or cannot be read; in the order of the steps."""
    found = []
    if png_problem(run.grid(steps)):
        found.append(SAMPLES)
    if run.results().get("steps") != steps:
        found.append(RESULTS)
    try:
        page = read_plain(run.report_file, limit=4 << 30)
        # A page of other results is one of an earlier end, or from before this end was whole.
        whole = page.rstrip().endswith(b"</html>") and results_mark(run).encode() in page
    except (FileNotFoundError, UserError):
        whole = False
    return found if whole else [*found, REPORT]


def finish(
    model: Backbone,
    config: Config,
    manifest: Manifest,
    run: Run,
    device: torch.device,
    progress: Progress,
    measured: Callable[[], dict[str, Any]],
    anew: bool,
) -> str:
    """Do the steps that are missing, or with `anew` all, with the EMA `model`; returns what to print.

    progress: how far the run had come before this session, for what its metrics do not say. `measured` gives further
    results, and is called when `model` is not needed any more.
    """
    from lsep import sample
    from lsep.data import digits

    steps, judged = config.train.steps, config.data.path == "digits"
    todo = [SAMPLES, RESULTS, REPORT] if anew else missing(run, steps)
    lines: list[str] = []
    grid, labels, images = run.grid(steps), None, None
    if SAMPLES in todo or (RESULTS in todo and judged):
        labels = sample.grid_labels(max(config.sample.num, AGREEMENT_SAMPLES if judged else 0), manifest.num_classes)
        images = sample.to_images(sample.draw(model, config, labels, config.train.seed), manifest)
    if SAMPLES in todo and images is not None:
        discard(grid)  # a folder of that name would be in the way
        sample.save_grid(images[: config.sample.num], grid)
    if RESULTS in todo:
        results = _results(run, config, progress, device) | {"parameters": _parameters(model)} | measured()
        lines.append(f"trained {steps} steps in {results['train_seconds']:.0f} s")
        if "lsep_overhead" in results:
            lines.append(f"a step with LSEP takes {1 + results['lsep_overhead']:.2f} times one without")
        if judged and images is not None and labels is not None:
            share = digits.agreement(images[:AGREEMENT_SAMPLES], labels[:AGREEMENT_SAMPLES].numpy())
            results["agreement"], results["agreement_samples"] = share, AGREEMENT_SAMPLES
            lines.append(
                f"3-NN on the real digits agrees with the class asked for on {share:.1%} of {AGREEMENT_SAMPLES} samples"
            )
        write_atomic(run.results_file, json.dumps(results, indent=2) + "\n")
    render(run)
    return "\n".join([*lines, f"samples: {grid}", f"report:  {run.report_file}"])


def _results(run: Run, config: Config, progress: Progress, device: torch.device) -> dict[str, Any]:
    """What the run itself says; of one whose metrics are lost, what its last checkpoint says."""
    metrics = run.metrics()
    last = metrics[-1] if metrics and metrics[-1]["step"] == config.train.steps else {}
    seconds = last.get("seconds") or progress.seconds
    return {
        "steps": config.train.steps,
        "train_seconds": seconds,
        "images_per_second": config.train.steps * config.train.batch_size / seconds if seconds else None,
        "loss": last.get("loss"),
        "probe_accuracy": last.get("probe_accuracy"),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu_seconds": last.get("gpu_seconds"),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
    }


def _parameters(model: Backbone) -> int:
    return sum(p.numel() for p in model.parameters())
