"""The page of the study, `docs/study.md`, and its plots, from the rows in bench/results/study/*.json."""

import json
import statistics
from pathlib import Path
from typing import Any

from bench.study_row import MAIN, VARIANTS

Rows = list[dict[str, Any]]


def render(results: Path, docs: Path) -> None:
    """Write study.md and study-*.png into `docs` from all files of rows in `results`."""
    parts = [_HEAD]
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text())
        parts.append(_chapter(found, docs))
    (docs / "study.md").write_text("\n".join(parts))


def _chapter(found: dict[str, Any], docs: Path) -> str:
    rows, name, distance = list(found["rows"].values()), found["task"], found["distance"]
    plots = {
        "steps": _curves(rows, distance, "step", "steps"),
        "seconds": _curves(rows, distance, "seconds", "seconds"),
    }
    plots["scatter"] = _scatter(rows, distance)
    lines = [f"## {name}", "", found["note"], ""]
    lines += [f"* {key}: {value}" for key, value in found["sizes"].items()]
    lines += ["", *_table(rows, distance), ""]
    for kind, figure in plots.items():
        file = docs / f"study-{name}-{kind}.png"
        figure.savefig(file, dpi=90)
        lines += [f"![{_CAPTIONS[kind]}]({file.name})", "", f"{_CAPTIONS[kind]}.", ""]
    machines = sorted({row["machine"] for row in rows})
    lines += ["Machines and versions:", "", *[f"* {m}" for m in machines], "", "Any row again:", "", "```sh"]
    lines += [row["command"] for row in rows[:1]]
    return "\n".join([*lines, "```", ""])


_CAPTIONS = {
    "steps": "Distance and probe accuracy against steps; mean and range over seeds",
    "seconds": "The same against measured training seconds",
    "scatter": "Probe accuracy against distance, every row's last checkpoint",
}


def _table(rows: Rows, distance: str) -> list[str]:
    floor = rows[0]["floor"]
    head = [
        "variant",
        "seeds",
        f"{distance} (floor {floor:.3f})",
        "probe accuracy",
        "training seconds",
        "a step / plain's",
    ]
    plain = [r["points"][-1]["seconds"] for r in rows if r["variant"] == MAIN[0]]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in VARIANTS:
        own = [r for r in rows if r["variant"] == variant]
        if own:
            seconds = [r["points"][-1]["seconds"] for r in own]
            ratio = f"{statistics.mean(seconds) / statistics.mean(plain):.2f}" if plain else ""
            distances = [statistics.mean(r["final"]) for r in own]
            cells = [variant, str(len(own)), spread(distances), spread([r["final_accuracy"] for r in own])]
            lines.append(f"| {' | '.join([*cells, spread(seconds, 0), ratio])} |")
    return lines


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, their range."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _curves(rows: Rows, distance: str, key: str, label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2), ("distance", "accuracy"), (distance, "probe accuracy"), strict=True
    ):
        for variant in MAIN:
            runs = [r["points"] for r in rows if r["variant"] == variant]
            if not runs:
                continue
            x = [statistics.mean(p[key] for p in points) for points in zip(*runs, strict=True)]
            y = [[p[what] for p in points] for points in zip(*runs, strict=True)]
            (line,) = axes.plot(x, [statistics.mean(v) for v in y], marker=".", label=variant)
            axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], alpha=0.15, color=line.get_color())
        axes.set(title=title, xlabel=label, yscale="log" if what == "distance" else "linear")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _scatter(rows: Rows, distance: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(VARIANTS):
        own = [r for r in rows if r["variant"] == variant]
        if own:
            x, y = [r["final_accuracy"] for r in own], [statistics.mean(r["final"]) for r in own]
            axes.scatter(x, y, label=variant, marker="o" if i < 10 else "^")
    axes.set(xlabel="probe accuracy", ylabel=distance)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    return figure


_HEAD = """# LSEP in miniature, against time

Small models on small images, trained, sampled, judged and probed by this project's own commands: quality against steps
and against measured seconds, and whether separability goes with quality. Everything is reported as it came out.
"""
