"""`report.html`: one self-contained page per run, made from its own files."""

import hashlib
import html
import math
from pathlib import Path
from typing import Any

from lsep.backbone import NAMES, described
from lsep.config import Config, flat
from lsep.errors import UserError
from lsep.files import read_plain, write_atomic
from lsep.pages import page, picture, png_problem, svg
from lsep.run import Run


def render(run: Run) -> Path:
    """Write RUN/report.html from what the run has so far; returns its path."""
    metrics, config = run.metrics(), run.config()
    parts = [_summary(run, config, metrics, run.results())]
    if metrics:
        parts += _curves(metrics)
    parts += _samples(run)
    rows = "".join(f"<tr><td>{k}<td>{html.escape(repr(v))}" for k, v in flat(config).items())
    parts.append(f"<h2>Configuration</h2><details><summary>all fields</summary><table>{rows}</table></details>")
    parts.append(results_mark(run))
    title = html.escape(f"{run.path.resolve().name}: {run.preset()}")
    write_atomic(run.report_file, page(title, "\n".join(parts)))
    return run.report_file


def facts(run: Run) -> str:
    """The page's table and pictures, without its curves."""
    return "\n".join([_summary(run, run.config(), run.metrics(), run.results()), *_samples(run)])


def results_mark(run: Run) -> str:
    """A comment that says of which results a page is, so that one made before them is known."""
    try:
        digest = hashlib.sha256(read_plain(run.results_file)).hexdigest()
    except (FileNotFoundError, UserError):
        digest = "none"
    return f"<!-- results.json: sha256 {digest} -->"


def _samples(run: Run) -> list[str]:
    """The grids, and which of them cannot be shown."""
    shown, left = [], []
    for step, path in run.grids():
        problem = png_problem(path)
        if problem is None:
            shown.append(picture(read_plain(path), f"step {step}"))
        else:
            left.append(f"<p>{html.escape(f'{path.name} {problem}')}</p>")
    if not shown and not left:
        return []
    names = run.manifest().class_names
    said = f"<p>In reading order, again and again: {html.escape(', '.join(names))}.</p>" if 0 < len(names) <= 20 else ""
    return ["<h2>Samples of the EMA weights</h2>", said, "<div class=grids>", *shown, "</div>", *left]


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
    rows |= _measured(results)
    seconds = metrics[-1].get("seconds") if metrics else None
    if "training time" not in rows and isinstance(seconds, int | float):
        rows["training time"] = f"{seconds:,.0f} s so far"
    sessions = run.sessions()
    if sessions:
        first, last = sessions[0], sessions[-1]
        again = f", continued {last['date']} ({len(sessions)} sessions)" if len(sessions) > 1 else ""
        rows |= {"begun": first["date"] + again, "command": last["command"], "versions": last["versions"]}
    return "<table>" + "".join(f"<tr><th>{k}<td>{html.escape(v)}" for k, v in rows.items()) + "</table>"


def _measured(results: dict[str, Any]) -> dict[str, str]:
    """Rows of results.json; what is no number there has none."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**62

    written = {
        "parameters": ("parameters", "{:,}"),
        "train_seconds": ("training time", "{:,.0f} s"),
        "images_per_second": ("speed", "{:,.4g} images/s"),
    }
    rows = {k: text.format(results[n]) for n, (k, text) in written.items() if number(results.get(n))}
    if number(results.get("agreement")):
        rows["3-NN agreement"] = f"{results['agreement']:.1%} of {results.get('agreement_samples')} samples"
    overhead, quartiles = results.get("lsep_overhead"), results.get("lsep_overhead_quartiles")
    if number(overhead) and isinstance(quartiles, list) and len(quartiles) == 2 and all(map(number, quartiles)):
        low, high = quartiles
        rows["LSEP overhead"] = f"{overhead:+.1%} of a step's time (quartiles {low:+.1%}, {high:+.1%})"
    if number(results.get("peak_memory_bytes")):
        rows["peak memory"] = f"{results['peak_memory_bytes'] / 2**30:.1f} GiB of the GPU's"
    return rows | {k: str(results[k])[:200] for k in ("machine", "torch") if k in results}


def _curves(metrics: list[dict[str, Any]]) -> list[str]:
    axes = {"step": "step", "training seconds": "seconds"}
    if any(m.get("gpu_seconds") for m in metrics):
        axes["GPU seconds"] = "gpu_seconds"
    losses = {
        name: [m.get(name, 0.0) for m in metrics]
        for name in ("loss", "denoising", "lsep", "align")
        if any(m.get("lsep" if name == "lsep" else "align") for m in metrics)
        or name == "denoising"
        or (name == "loss" and any(m.get("lsep") for m in metrics))
    }
    out = ["<h2>Training</h2><div class=curves>"]
    # Against time too: a method that learns more a step may learn less a second.
    out += [_plot("loss", label, [m.get(x) for m in metrics], losses, log=True) for label, x in axes.items()]
    probed = [m for m in metrics if isinstance(m.get("probe_accuracy"), float)]
    if probed:
        accuracy = {"all t": [m["probe_accuracy"] for m in probed]}
        for label, key in axes.items():
            out.append(_plot("probe accuracy, unlabelled samples", label, [m.get(key) for m in probed], accuracy))
        by_time = [m for m in probed if m.get("probe_accuracy_by_time")]
        if by_time and len({len(m["probe_accuracy_by_time"]) for m in by_time}) == 1:
            out.append(_time_bins(by_time))
    measured = [m for m in metrics if "frechet_distance" in m]
    if measured:
        distances = {"EMA": [m["frechet_distance"] for m in measured]}
        for label, key in axes.items():
            title = "Frechet distance of samples"
            out.append(_plot(title, label, [m.get(key) for m in measured], distances, log=True))
    steps = [m["step"] for m in metrics]
    out.append(_plot("images/s", "step", steps, {"images/s": [m.get("images_per_second") for m in metrics]}))
    out.append(_plot("gradient norm", "step", steps, {"before": [m.get("grad_norm") for m in metrics]}, log=True))
    return [*out, "</div>"]


def _plot(title: str, label: str, x: list[Any], curves: dict[str, list[Any]], log: bool = False) -> str:
    """Curves over x, which `label` names; None is a gap, and a point without neighbours has a mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        pairs = [(math.nan, math.nan) if None in (a, b) else (a, b) for a, b in zip(x, values, strict=True)]
        gaps = [True, *(math.isnan(b) for _, b in pairs), True]
        alone = [i for i in range(len(pairs)) if gaps[i] and not gaps[i + 1] and gaps[i + 2]]
        axes.plot(*zip(*pairs, strict=True), label=name, linewidth=1.5, marker="o", markersize=4, markevery=alone)
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
