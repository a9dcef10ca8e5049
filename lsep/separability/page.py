"""The page of one or several runs, and its figures as PNG files: heat maps, curves against depth, maps over the grid.

All runs share the axes and the colours, so that they can be compared by eye.
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lsep.pages import page, save_png, svg
from lsep.run import write_atomic
from lsep.separability.measure import Figures

TITLES = {
    "pooled": "pooled over all tokens",
    "windowed": "pooled over a random window",
    "token": "each token by itself",
    "control": "control: pooled, labelled",
    "cka": "linear CKA with the encoder",
    "cknna": "CKNNA with the encoder",
}
_MOST_CELLS = 160  # with a number written in each
_MOST_MAPS = 6  # rows of maps over the grid


@dataclass(frozen=True)
class Measured:
    """A run and its figures."""

    name: str
    """How the run is called on the page; no two alike."""
    step: int
    probe_depth: int | None
    """Block that the LSEP term reads, None without it."""
    seen: bool
    """Whether the denoiser has seen the testing rows in training."""
    figures: Figures

    @property
    def label(self) -> str:
        """The name as matplotlib shows it, which would take what stands between two $ for mathematics."""
        return self.name.replace("$", r"\$")

    @property
    def about(self) -> str:
        """The data behind the figures, in a sentence."""
        f = self.figures
        of = "; the denoiser has seen the testing images in training" if self.seen else "; testing images are held out"
        return (
            f"step {self.step}, {f.rows[0]} images ({f.tokens} tokens) train and {f.rows[1]} test, "
            f"seeds: {len(f.accuracy['pooled'])}, most common class {f.chance:.1%}{of}"
        )


def write(measured: list[Measured], out: Path) -> list[Path]:
    """Write `probe.html` and a PNG of every figure into the folder `out`; returns the paths."""
    figures = _figures(measured)
    for name, figure in figures.items():
        save_png(figure, out / f"{name}.png")
    target = out / "probe.html"
    write_atomic(target, page("Linear separability", "\n".join(_body(measured, figures))))
    return [target, *(out / f"{name}.png" for name in figures)]


def _figures(measured: list[Measured]) -> dict[str, Any]:
    first = measured[0].figures
    accuracies = [kind for kind in TITLES if any(kind in m.figures.accuracy for m in measured)]
    figures = {"accuracy": _heat_maps(measured, accuracies)}
    figures |= {f"curves-{kind}": _curves(measured, kind) for kind in accuracies if kind != "control"}
    figures["tokens"] = _token_maps(measured)
    if first.alike:
        figures["alike"] = _heat_maps(measured, list(first.alike))
    return figures


def _body(measured: list[Measured], figures: dict[str, Any]) -> list[str]:
    rows = [f"<tr><th>{html.escape(m.name)}<td>{html.escape(m.about)}" for m in measured]
    headings = {
        "accuracy": "Accuracy of linear probes by depth and t",
        "curves-pooled": "Accuracy against depth",
        "tokens": "Accuracy of each token by its place in the grid",
        "alike": "Likeness to the encoder's features",
    }
    parts = [
        "<p>Softmax regression on frozen features of the EMA weights, without a label in the conditioning but in the "
        "control, whose accuracy says nothing about separability. t = 1 is noise. Bars and &plusmn; are the standard "
        "deviation over seeds; the dotted line is the most common class, the dashed one the block the LSEP term reads."
        "</p>",
        "<table>" + "".join(rows) + "</table>",
    ]
    for name, figure in figures.items():
        parts.append((f"<h2>{headings[name]}</h2>" if name in headings else "") + svg(figure))
    return parts


def _values(m: Measured, kind: str) -> np.ndarray | None:
    """Mean over seeds `(depths, times)`, None where the run has no such figure."""
    found = (m.figures.accuracy | m.figures.alike).get(kind)
    return None if found is None else found.mean(0)


def _grid_of_axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.8, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _heat_maps(measured: list[Measured], kinds: list[str]) -> Any:
    """A row for each run, a column for each kind."""
    depths = sorted({d for m in measured for d in m.figures.depths})
    figure, axes = _grid_of_axes(len(measured), len(kinds), 3.2, max(2.2, 0.9 + 0.24 * len(depths)))
    shown = [v for m in measured for kind in kinds if kind != "control" if (v := _values(m, kind)) is not None]
    top = max(float(v.max()) for v in shown)
    mesh = None
    for row, m in zip(axes, measured, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            values = _values(m, kind)
            if values is None:
                ax.set_axis_off()
                continue
            whole = np.full((len(depths), values.shape[1]), np.nan)
            whole[[depths.index(d) for d in m.figures.depths]] = values
            mesh = ax.imshow(whole, vmin=0, vmax=top, cmap="viridis", aspect="auto", origin="lower")
            ax.set_xticks(range(len(m.figures.times)), [f"{t:g}" for t in m.figures.times])
            ax.set_yticks(range(len(depths)), [str(d) for d in depths])
            ax.set_title(_title(measured, m, kind), fontsize=9)
            ax.set(xlabel="t", ylabel="depth")
            _write_cells(ax, whole, top)
    figure.colorbar(mesh, ax=axes, extend="max" if "control" in kinds else "neither")
    return figure


def _title(measured: list[Measured], m: Measured, kind: str) -> str:
    return TITLES[kind] if len(measured) == 1 else f"{m.label}\n{TITLES[kind]}"


def _write_cells(ax: Any, values: np.ndarray, top: float) -> None:
    if values.size > _MOST_CELLS:
        return
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > 0.6 * top else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)


def _curves(measured: list[Measured], kind: str) -> Any:
    """A panel for each run; bars are the standard deviation over seeds."""
    from matplotlib import colormaps

    figure, axes = _grid_of_axes(1, len(measured), 4.4, 3.2)
    deepest = max(max(m.figures.depths) for m in measured)
    for ax, m in zip(axes[0], measured, strict=True):
        f = m.figures
        mean, spread = f.accuracy[kind].mean(0), _spread(f.accuracy[kind])
        for j, t in enumerate(f.times):
            colour = colormaps["viridis"](0.9 * j / max(len(f.times) - 1, 1))
            bars = None if spread is None else spread[:, j]
            ax.errorbar(f.depths, mean[:, j], bars, label=f"t = {t:g}", color=colour, marker="o", ms=3, capsize=2)
        ax.axhline(f.chance, color="0.5", linestyle=":", linewidth=1)
        if m.probe_depth is not None:
            ax.axvline(m.probe_depth, color="0.5", linestyle="--", linewidth=1)
        ax.set_title(_title(measured, m, kind), fontsize=9)
        ax.set(xlabel="depth", ylabel="accuracy", xlim=(0.5, deepest + 0.5), ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0, -1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _token_maps(measured: list[Measured]) -> Any:
    """For some depths and all times, the accuracy at each place of the token grid; runs below each other."""
    times, rows = measured[0].figures.times, []
    for m in measured:
        places = np.unique(np.linspace(0, len(m.figures.depths) - 1, _MOST_MAPS).round().astype(int))
        rows += [(m, int(i)) for i in places[::-1]]
    figure, axes = _grid_of_axes(len(rows), len(times), 1.5, 1.6)
    top = max(float(m.figures.token_map.max()) for m in measured)
    mesh = None
    for k, (m, i) in enumerate(rows):
        for j, t in enumerate(times):
            ax = axes[k, j]
            mesh = ax.imshow(m.figures.token_map[i, j], vmin=0, vmax=top, cmap="viridis")
            ax.set(xticks=[], yticks=[])
            if k == 0:
                ax.set_title(f"t = {t:g}", fontsize=9)
        name = f"depth {m.figures.depths[i]}"
        axes[k, 0].set_ylabel(name if len(measured) == 1 else f"{m.label}\n{name}", fontsize=8)
    figure.colorbar(mesh, ax=axes, shrink=min(1.0, 3 / len(rows)))
    return figure


def _spread(values: np.ndarray) -> np.ndarray | None:
    """Standard deviation over seeds; None for one."""
    return values.std(0, ddof=1) if len(values) > 1 else None
