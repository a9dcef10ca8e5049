"""Sections `step` and `variants`: the step table of SiT-XL/2 with its budgets, as `python -m bench.step` makes it.

`step` has the rows that decide most; `variants` the others, each a case that may be left out when time is short.
"""

import statistics
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.section import Context, Section, show
from bench.step import floors, peak, prepared, row
from bench.variants import Measured, configuration, measure
from lsep.config import Config, from_dict

FIRST = (
    "plain", "shared-0.8", "shared-0.8+backend.attention=cudnn", "shared-0.8+backend.mlp=cublaslt",
)  # fmt: skip
"""What a training costs, with LSEP and without; and the two libraries that compete with its kernels."""
OTHERS = (
    "authors", "paper", "shared-0", "shared-0.2", "fp8", "shared-0.8+train.graphs=off", "shared-0.8+backend.mlp=torch",
    "shared-0.8+train.compile=model", "shared-0.8+train.memory=recompute-elementwise",
    "shared-0.8+train.memory=recompute-blocks",
)  # fmt: skip
ROUNDS, STEPS = 3, 10
TARGETS: dict[tuple[str, str], tuple[str, float]] = {
    ("shared-0.8", "images/s"): ("at least", 600.0),
    ("shared-0.8", "time / plain"): ("at most", 1.22),
    ("shared-0", "time / plain"): ("at most", 1.02),
    ("fp8", "images/s"): ("at least", 700.0),
}
"""On one H200 with 256 images; a target that is missed is named and fails nothing."""


def step(context: Context, section: Section) -> None:
    """The rows that decide most: speed, the program that ran, and what a step is made of."""
    _table(context, section, FIRST, {})


def variants(context: Context, section: Section) -> None:
    """The other variants, beside those of `step`."""
    before = {n: _restored(n, v) for n, v in context.details.get("step", {}).get("measured", {}).items()}
    # Tiny, the others would compile for a minute and test nothing that these do not.
    few = ("authors", "fp8") if context.cuda else OTHERS[:5]
    _table(context, section, few if context.smoke else OTHERS, before)


def _table(context: Context, section: Section, names: tuple[str, ...], before: dict[str, Measured]) -> None:
    """A row a variant; `before` are others that were measured in this run, which the ratios are of."""
    base = configuration("tiny" if context.smoke else "sit-xl-2-256")
    known = section.details.setdefault("measured", {})  # of a process that was ended, too
    found = before | {name: _restored(name, values) for name, values in known.items()}
    steps, rounds = (1, 1) if context.smoke else (STEPS, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:

        def one(name: str) -> None:
            configs, skipped = prepared([name], base, "auto", context.device, Path(folder))
            section.skipped += [f"{name}: {why}" for name, why in skipped.items()]
            seen, failed = measure(configs, steps, rounds, interleaved=False, budget=context.cuda)
            section.failures += [f"{name}: {why}" for name, why in failed.items()]
            for name, measured in seen.items():
                found[name] = measured
                known[name] = asdict(measured)
                _add(context, section, name, found)

        context.each(section, [(name, name) for name in names], one)
    section.notes += _ratios(found, before)
    if not context.smoke:
        section.notes += _targets(context, found, names)


def _add(context: Context, section: Section, name: str, found: dict[str, Measured]) -> None:
    """The row of `name`, its program and its budget."""
    measured = found[name]
    figures = row(name, found, context.matrix_rate, peak(context.device))
    del figures["quartiles"]
    section.rows.append(figures | {k: v for k, v in measured.program.items() if k not in figures})
    if measured.cut:
        section.notes.append(f"{name} runs in micro-batches: {measured.cut}.")
    if not context.cuda:
        return
    if measured.rooms:
        rows = floors(measured, context.copy_rate, context.matrix_rate)
        section.notes.append(show(Section(f"budget of {name}", rows)))
        section.details.setdefault("budgets", {})[name] = rows
    else:
        section.skipped.append(f"the budget of {name}: the profiler saw no kernel on this machine")


def _restored(name: str, values: dict[str, Any]) -> Measured:
    """A variant as the JSON file has it."""
    config: Config = from_dict(values["config"], name)
    return Measured(config, **{f.name: values[f.name] for f in fields(Measured) if f.name != "config"})


def _ratios(found: dict[str, Measured], before: dict[str, Measured]) -> list[str]:
    """Of the rows of an earlier section, beside the authors' step."""
    if "authors" not in found:
        return []
    authors = found["authors"].seconds
    return [
        f"{name}: time / authors {statistics.median(a / b for a, b in zip(m.seconds, authors, strict=True)):.3g}, "
        f"FLOPs / authors {m.flops / found['authors'].flops:.3g}"
        for name, m in before.items()
    ]


def _targets(context: Context, found: dict[str, Measured], names: tuple[str, ...]) -> list[str]:
    out = []
    for (variant, figure), (kind, wanted) in TARGETS.items():
        if variant in names and variant in found:
            value = row(variant, found, context.matrix_rate, None).get(figure)
            if value is None:  # what it is a ratio to did not run
                continue
            met = value >= wanted if kind == "at least" else value <= wanted
            out.append(f"target {variant}, {figure} {kind} {wanted:g}: {value:.4g}, {'met' if met else 'missed'}")
    for name, wanted in (("paper", 1.05), ("authors", 3.0)):
        if name in names and {name, "shared-0.8"} <= found.keys():
            ratio = found[name].median / found["shared-0.8"].median
            met = "met" if ratio >= wanted else "missed"
            out.append(f"target time of {name} / shared-0.8 at least {wanted:g}: {ratio:.4g}, {met}")
    return out
