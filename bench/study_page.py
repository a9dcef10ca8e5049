"""The page of the study, `docs/study.md`, and its plots, from the rows in bench/results/study/*.json.

What follows from the figures is written by hand, in findings.md beside them, and comes first on the page.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bench.study_row import MAIN, VARIANTS

Rows = list[dict[str, Any]]
AGAIN = "--results runs/again --docs runs/again"
"""What makes a command run a row that is kept already."""


def render(results: Path, docs: Path) -> None:
    """Write study.md and study-*.png into `docs` from all files of rows in `results`."""
    findings = results / "findings.md"
    parts = [_HEAD, *([findings.read_text()] if findings.exists() else [])]
    for file in sorted(results.glob("*.json")):
        parts.append(_chapter(json.loads(file.read_text()), results, docs))
    (docs / "study.md").write_text("\n".join(parts))


def _chapter(found: dict[str, Any], results: Path, docs: Path) -> str:
    rows, name, distance = list(found["rows"].values()), found["task"], found["distance"]
    plots = {
        "steps": _curves(rows, distance, "step", "steps"),
        "seconds": _curves(timed(rows), distance, "seconds", "seconds"),
        "scatter": _scatter(rows, distance),
    }
    if strips := _at_equal_time(rows, results):
        plots["samples"] = strips
    lines = [f"## {name}", "", found["note"], "", *_sizes(found["sizes"]), "", *_table(rows, distance), "", _NOTES, ""]
    if disturbed := [key for key, row in found["rows"].items() if row.get("disturbed")]:
        lines += [f"Without the seconds of rows whose core had other work: {'; '.join(disturbed)}.", ""]
    lines += [*_times(timed(rows), distance), "", correlation(rows, distance), ""]
    for kind, figure in plots.items():
        file = docs / f"study-{name}-{kind}.png"
        figure.savefig(file, dpi=90)
        lines += [f"![{_CAPTIONS[kind]}]({file.name})", "", f"{_CAPTIONS[kind]}.", ""]
    lines += ["| machine and versions | rows |", "|---|---|"]
    machines = [row["machine"] for row in rows]
    lines += [f"| {m} | {machines.count(m)} |" for m in sorted(set(machines))]
    lines += ["", "Every row again; one that is kept in the folder of `--results` is not run:", "", "```sh"]
    lines += [f"{row['command']} {AGAIN}" for row in rows]
    return "\n".join([*lines, "```", ""])


_CAPTIONS = {
    "steps": "Distance and probe accuracy against steps; mean and range over seeds",
    "seconds": "The same against measured training seconds",
    "scatter": "Probe accuracy against distance, every row's last checkpoint",
    "samples": "Samples of seed 0 at equal training time, from the same noise: each variant's last checkpoint by then, "
    "or less than 5 % later",
}
_NOTES = (
    "Distances are means over sampling seeds and training seeds, in brackets the range over both; accuracies and "
    "seconds have the range over training seeds. Seconds are those of training steps alone, on a machine that others "
    "use too; the FLOPs are what a quiet one would follow."
)


def _sizes(sizes: dict[str, Any]) -> list[str]:
    lines = ["| setting | |", "|---|---|"]
    return lines + [
        f"| `{key}` | {value if isinstance(value, str) else json.dumps(value)} |" for key, value in sizes.items()
    ]


def _of(rows: Rows, variant: str) -> Rows:
    return [r for r in rows if r["variant"] == variant]


def timed(rows: Rows) -> Rows:
    """Those whose seconds mean something; a row is marked as `disturbed` by hand where its core had other work."""
    return [r for r in rows if not r.get("disturbed")]


def _seconds(row: dict[str, Any]) -> float:
    return float(row["points"][-1]["seconds"])


def _table(rows: Rows, distance: str) -> list[str]:
    head = ["variant", "training seeds", f"{distance} (test set: {rows[0]['floor']:.3f})", "probe accuracy"]
    head += ["training seconds", "/ plain's", "FLOPs / plain's"]
    plain = timed(_of(rows, MAIN[0]))
    all_seconds, all_flops = ([f(r) for r in plain] for f in (_seconds, lambda r: r["flops"]))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in VARIANTS:
        if own := _of(rows, variant):
            seconds = [_seconds(r) for r in timed(own)]
            ratios = [
                f"{statistics.mean(own_values) / statistics.mean(values):.2f}" if values and own_values else ""
                for own_values, values in ((seconds, all_seconds), ([r["flops"] for r in own], all_flops))
            ]
            cells = [variant, str(len(own)), spread([d for r in own for d in r["final"]])]
            cells += [spread([r["final_accuracy"] for r in own]), spread(seconds, 0), *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _times(rows: Rows, distance: str) -> list[str]:
    """A table of the first variants at three times that all of their rows have seen."""
    main = [r for r in rows if r["variant"] in MAIN]
    if not main:
        return []
    last = shared_time(main)
    times = [t for t in (last / 2, last * 3 / 4, last) if t >= max(r["points"][0]["seconds"] for r in main)]
    head = [f"{distance} after", *(f"{t:.0f} s" for t in times)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in MAIN:
        if own := _of(rows, variant):
            lines.append(f"| {' | '.join([variant, *(spread([at(r, t) for r in own]) for t in times)])} |")
    note = "Between checkpoints the logarithm of the distance is interpolated; samples of each checkpoint, one seed:"
    return [note, "", *lines]


def shared_time(rows: Rows) -> float:
    """Seconds that every row has trained for."""
    return min(_seconds(r) for r in rows)


def at(row: dict[str, Any], seconds: float) -> float:
    """Distance after `seconds`, its logarithm linear between the points."""
    points = row["points"]
    x, y = [p["seconds"] for p in points], [math.log(p["distance"]) for p in points]
    return math.exp(float(np.interp(seconds, x, y)))


def correlation(rows: Rows, distance: str) -> str:
    """One sentence on how probe accuracy and distance rank the rows."""
    if len(rows) < 3:
        return ""
    accuracy = [r["final_accuracy"] for r in rows]
    ranks = [_ranks(v) for v in (accuracy, [statistics.mean(r["final"]) for r in rows])]
    rho = float(np.corrcoef(*ranks)[0, 1])
    return f"Rank correlation of probe accuracy and {distance} over the {len(rows)} rows: {rho:+.2f}."


def _ranks(values: list[float]) -> Any:
    """Places in ascending order, ties sharing their mean."""
    v = np.array(values)
    return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, their range; nothing of none."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _curves(rows: Rows, distance: str, key: str, label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2), ("distance", "accuracy"), (distance, "probe accuracy"), strict=True
    ):
        for variant in MAIN:
            runs = [r["points"] for r in _of(rows, variant)]
            if not runs:
                continue
            x = [statistics.mean(p[key] for p in points) for points in zip(*runs, strict=True)]
            y = [[p[what] for p in points] for points in zip(*runs, strict=True)]
            (line,) = axes.plot(x, [statistics.mean(v) for v in y], marker=".", label=variant)
            axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], alpha=0.15, color=line.get_color())
        floor = rows[0]["floor"]
        if what == "distance" and floor > axes.get_ylim()[0] / 10:  # further down it would flatten the curves
            axes.axhline(floor, color="gray", linestyle=":", label="test set")
        axes.set(title=title, xlabel=label, yscale="log" if what == "distance" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _scatter(rows: Rows, distance: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(VARIANTS):
        if own := _of(rows, variant):
            x, y = [r["final_accuracy"] for r in own], [statistics.mean(r["final"]) for r in own]
            axes.scatter(x, y, label=variant, marker="o" if i < 10 else "^")
    axes.set(xlabel="probe accuracy", ylabel=distance)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _at_equal_time(rows: Rows, results: Path) -> Any:
    """The strips of samples of the first variants' seed 0, one below the other; None where there are none."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    kept = [r for r in rows if r.get("strips")]
    if not kept:
        return None
    until = 1.05 * shared_time(kept)
    figure = Figure(figsize=(10, 0.8 * len(kept)), layout="constrained")
    for axes, row in zip(figure.subplots(len(kept), 1, squeeze=False)[:, 0], kept, strict=True):
        point = [p for p in row["points"] if p["seconds"] <= until][-1:] or row["points"][:1]
        axes.imshow(imread(results / row["strips"] / f"{point[0]['step']}.png"), cmap="gray")
        axes.set_title(
            f"{row['variant']}: step {point[0]['step']}, {point[0]['seconds']:.0f} s", fontsize=8, loc="left", pad=2
        )
        axes.axis("off")
    return figure


_HEAD = """# LSEP in miniature, against time

Small models on small images, trained, sampled, judged and probed by this project's own commands: quality against steps
and against measured seconds, and whether separability goes with quality. Everything is reported as it came out.
"""
