"""`report.html`: one self-contained page a run, made from its own files; and the figures a run ends with."""

import html
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lsep.backbone import NAMES, Backbone, described
from lsep.config import Config, flat
from lsep.data.manifest import Manifest
from lsep.pages import page, picture, svg
from lsep.run import Run, write_atomic

AGREEMENT_SAMPLES = 200


def finish(
    model: Backbone,
    config: Config,
    manifest: Manifest,
    run: Run,
    device: torch.device,
    measured: Callable[[], dict[str, Any]] = dict,
) -> str:
    """Draw the last grid from the EMA `model`, judge digits, write results.json and report; returns what to print.

    `measured` gives further results, and is called when `model` is not needed any more.
    """
    from lsep import sample
    from lsep.data import digits

    step = config.train.steps
    judged = config.data.path == "digits"
    labels = sample.grid_labels(max(config.sample.num, AGREEMENT_SAMPLES if judged else 0), manifest.num_classes)
    x = sample.draw(model, config, labels, config.train.seed)
    images = sample.to_images(x, manifest)
    grid = run.samples / f"step-{step:07d}.png"
    sample.save_grid(images[: config.sample.num], grid)
    metrics = run.metrics()
    last = metrics[-1]
    results: dict[str, Any] = {
        "steps": step,
        "train_seconds": last["seconds"],
        "images_per_second": last["images"] / last["seconds"],
        "loss": last["loss"],
        "probe_accuracy": last["probe_accuracy"],
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu_seconds": last["gpu_seconds"],
        "peak_memory_bytes": last["peak_memory_bytes"],
        **measured(),
    }
    lines = [f"trained {step} steps in {last['seconds']:.0f} s"]
    if "lsep_overhead" in results:
        lines.append(f"a step with LSEP takes {1 + results['lsep_overhead']:.2f} times one without")
    if judged:
        share = digits.agreement(images[:AGREEMENT_SAMPLES], labels[:AGREEMENT_SAMPLES].numpy())
        results["agreement"], results["agreement_samples"] = share, AGREEMENT_SAMPLES
        lines.append(
            f"3-NN on the real digits agrees with the class asked for on {share:.1%} of {AGREEMENT_SAMPLES} samples"
        )
    write_atomic(run.results_file, json.dumps(results, indent=2) + "\n")
    render(run)
    lines += [f"samples: {grid}", f"report:  {run.report_file}"]
    return "\n".join(lines)


def render(run: Run) -> Path:
    """Write RUN/report.html from what the run has so far; returns its path."""
    metrics, config, results = run.metrics(), run.config(), run.results()
    parts = [_summary(run, config, metrics, results)]
    if metrics:
        parts += _curves(metrics)
    grids = sorted(run.samples.glob("step-*.png"))
    if grids:
        parts.append("<h2>Samples of the EMA weights</h2><div class=grids>")
        parts += [picture(g.read_bytes(), f"step {int(g.stem.split('-')[1])}") for g in grids]
        parts.append("</div>")
    rows = "".join(f"<tr><td>{k}<td>{html.escape(repr(v))}" for k, v in flat(config).items())
    parts.append(f"<h2>Configuration</h2><details><summary>all fields</summary><table>{rows}</table></details>")
    title = html.escape(f"{run.path.name}: {run.preset()}")
    write_atomic(run.report_file, page(title, "\n".join(parts)))
    return run.report_file


def _summary(run: Run, config: Config, metrics: list[dict[str, Any]], results: dict[str, Any]) -> str:
    m, p, names = config.model, config.probe, run.manifest().class_names
    place = "mid-block" if m.backbone == "unet" else f"depth {p.depth}"
    plan = (
        f"{p.branch}, e = {config.extra_fraction:g}, rho = {p.rho:g}, {place}"
        if p.enabled
        else f"off (plain {NAMES[m.backbone]})"
    )
    rows = {
        "model": f"{described(m)}, {m.in_channels} x {m.input_size} x {m.input_size}, {m.num_classes} classes"
        + (f" ({', '.join(names)})" if 0 < len(names) <= 20 else ""),
        "probe": plan,
        "progress": f"step {metrics[-1]['step'] if metrics else 0} of {config.train.steps}",
        "batch": str(config.train.batch_size),
        "sampler": f"{config.sample.sampler}, {config.sample.steps} steps, guidance {config.sample.cfg:g}",
    }
    if "agreement" in results:
        rows["3-NN agreement"] = f"{results['agreement']:.1%} of {results['agreement_samples']} samples"
    if "lsep_overhead" in results:
        low, high = results["lsep_overhead_quartiles"]
        rows["LSEP overhead"] = f"{results['lsep_overhead']:+.1%} of a step's time (quartiles {low:+.1%}, {high:+.1%})"
    if results.get("peak_memory_bytes"):
        rows["peak memory"] = f"{results['peak_memory_bytes'] / 2**30:.1f} GiB of the GPU's"
    rows |= {k: str(results[k]) for k in ("machine", "torch") if k in results}
    return "<table>" + "".join(f"<tr><th>{k}<td>{html.escape(v)}" for k, v in rows.items()) + "</table>"


def _curves(metrics: list[dict[str, Any]]) -> list[str]:
    axes = {"step": "step", "training seconds": "seconds"}
    if any(m.get("gpu_seconds") for m in metrics):
        axes["GPU seconds"] = "gpu_seconds"
    losses = {
        name: [m.get(name, 0.0) for m in metrics]
        for name in ("loss", "denoising", "lsep", "align")
        if any(m.get("lsep" if name == "lsep" else "align") for m in metrics)
        or name == "denoising"
        or (name == "loss" and any(m["lsep"] for m in metrics))
    }
    out = ["<h2>Training</h2><div class=curves>"]
    # Against time too: a method that learns more a step may learn less a second.
    out += [_plot("loss", label, [m[x] for m in metrics], losses, log=True) for label, x in axes.items()]
    probed = [m for m in metrics if m["probe_accuracy"] is not None]
    if probed:
        accuracy = {"all t": [m["probe_accuracy"] for m in probed]}
        for label, key in axes.items():
            out.append(_plot("probe accuracy, unlabelled samples", label, [m[key] for m in probed], accuracy))
        out.append(_time_bins(probed))
    measured = [m for m in metrics if "frechet_distance" in m]
    if measured:
        distances = {"EMA": [m["frechet_distance"] for m in measured]}
        for label, key in axes.items():
            title = "Frechet distance of samples"
            out.append(_plot(title, label, [m[key] for m in measured], distances, log=True))
    steps = [m["step"] for m in metrics]
    out.append(_plot("images/s", "step", steps, {"images/s": [m["images_per_second"] for m in metrics]}))
    out.append(_plot("gradient norm", "step", steps, {"before": [m["grad_norm"] for m in metrics]}, log=True))
    return [*out, "</div>"]


def _plot(title: str, label: str, x: list[float], curves: dict[str, list[float]], log: bool = False) -> str:
    """Curves over x, which `label` names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, y in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5)
    axes.set(title=title, xlabel=label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return svg(figure)


def _time_bins(probed: list[dict[str, Any]]) -> str:
    """Probe accuracy over steps and t as a heat map."""
    import numpy as np
    from matplotlib.figure import Figure

    values = np.array([[np.nan if v is None else v for v in m["probe_accuracy_by_time"]] for m in probed]).T
    edges = [0, *(m["step"] for m in probed)]
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        edges, np.linspace(0, 1, len(values) + 1), values, vmin=0, vmax=1, cmap="viridis", rasterized=True
    )
    axes.set(title="probe accuracy by time", xlabel="step", ylabel="t (1 is noise)")
    figure.colorbar(mesh)
    return svg(figure)
