"""What `lsep probe` writes: probe.json, pictures, and one page that shows several runs side by side."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from lsep.report import PAGE
from lsep.run import write_atomic
from lsep.separability.measure import Measured

NAMES = {
    "pooled": "mean of all tokens", "windowed": "mean of a window", "token": "each token by itself",
    "control": "control: the label is in the conditioning",
}  # fmt: skip


def table(found: list[Measured]) -> str:
    """Accuracy by run, kind and depth, each at its best time."""
    lines = [f"{'run':24}{'features':12}{'best block':>11}{'t':>6}{'accuracy':>10}{'spread':>9}"]
    for run in found:
        for kind, values in run.accuracy.items():
            mean = values.mean(2)
            i, j = np.unravel_index(mean.argmax(), mean.shape)
            lines.append(
                f"{run.name[:23]:24}{kind:12}{run.depths[i]:11}{run.times[j]:6.2f}{mean[i, j]:10.1%}"
                f"{values[i, j].std():9.1%}"
            )
        for which, values in run.likeness.items():
            mean = values.mean(2)
            i, j = np.unravel_index(mean.argmax(), mean.shape)
            lines.append(f"{run.name[:23]:24}{which:12}{run.depths[i]:11}{run.times[j]:6.2f}{mean[i, j]:10.3f}")
    return "\n".join(lines)


def write(found: list[Measured], out: Path) -> list[Path]:
    """probe.json, one PNG a figure and probe.html in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "probe.json"]
    write_atomic(files[0], json.dumps({"runs": [run.plain() for run in found]}, indent=1) + "\n")
    shown = []
    for name, (caption, figure) in _figures(found).items():
        file = out / f"{name}.png"
        temporary = file.with_suffix(".png.tmp")
        figure.savefig(temporary, format="png", dpi=90)
        temporary.replace(file)
        files.append(file)
        data = base64.b64encode(file.read_bytes()).decode()
        shown.append(
            f'<h2>{caption}</h2><img style="max-width:100%" alt="{caption}" src="data:image/png;base64,{data}">'
        )
    seen = "held-out data" if found[0].held_out else "images that the denoiser was trained on, but the probes were not"
    text = f"<p>Linear probes, judged on {found[0].test_images} {seen}; fitted to {found[0].train_images}; "
    text += f"mean over {next(iter(found[0].accuracy.values())).shape[2]} seeds; t = 1 is noise; chance is "
    text += f"{1 / found[0].probe_classes:.1%}.</p><pre>{html.escape(table(found))}</pre>"
    title = html.escape("linear separability: " + ", ".join(run.name for run in found))
    files.append(out / "probe.html")
    write_atomic(files[-1], PAGE.format(title=title, body="\n".join([text, *shown])))
    return files


def _figures(found: list[Measured]) -> dict[str, tuple[str, Any]]:
    figures = {f"map-{kind}": (f"Accuracy, {NAMES[kind]}", _maps(found, kind)) for kind in found[0].accuracy}
    figures["curves"] = ("Accuracy by depth, mean of all tokens; bars are the range over seeds", _curves(found))
    figures["tokens"] = ("Where tokens are classified rightly, at the best depth and time of each run", _places(found))
    for which in found[0].likeness:
        figures[which.lower()] = (f"{which} with the encoder's features", _maps(found, which))
    return figures


def _row(count: int, width: float = 4.2) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + 0.6, 3.6), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def _maps(found: list[Measured], kind: str) -> Any:
    """Heat maps over depth and time with one scale."""
    figure, panels = _row(len(found))
    values = [(run.accuracy | run.likeness)[kind].mean(2) for run in found if kind in run.accuracy | run.likeness]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    for axes, run in zip(panels, found, strict=True):
        if kind not in run.accuracy | run.likeness:
            axes.set_axis_off()
            continue
        grid = (run.accuracy | run.likeness)[kind].mean(2)
        image = axes.imshow(grid, aspect="auto", origin="lower", vmin=low, vmax=high, cmap="viridis")
        axes.set_xticks(range(len(run.times)), [f"{t:g}" for t in run.times])
        step = max(1, len(run.depths) // 14)
        axes.set_yticks(range(0, len(run.depths), step), [str(d) for d in run.depths[::step]])
        axes.set(title=run.name, xlabel="t", ylabel="block")
        figure.colorbar(image, ax=axes)
    return figure


def _curves(found: list[Measured]) -> Any:
    """Accuracy against depth: one panel a time, one curve a run."""
    figure, panels = _row(len(found[0].times), 3.2)
    for j, (axes, t) in enumerate(zip(panels, found[0].times, strict=True)):
        for run in found:
            values = run.accuracy["pooled"][:, j]
            mean = values.mean(1)
            spread = np.stack([mean - values.min(1), values.max(1) - mean])
            axes.errorbar(run.depths, mean, spread, marker=".", capsize=2, label=run.name)
        axes.set(title=f"t = {t:g}", xlabel="block", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


def _places(found: list[Measured]) -> Any:
    figure, panels = _row(len(found))
    for axes, run in zip(panels, found, strict=True):
        mean = run.accuracy["token"].mean(2)
        i, j = np.unravel_index(mean.argmax(), mean.shape)
        image = axes.imshow(run.token_map[i, j], cmap="viridis")
        axes.set(title=f"{run.name}: block {run.depths[i]}, t = {run.times[j]:g}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes)
    return figure
