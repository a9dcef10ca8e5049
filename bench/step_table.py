"""Section `step`: the step table of SiT-XL/2 with its budgets, as `python -m bench.step` makes it."""

from bench.section import Context, Section, show
from bench.step import parse, run
from bench.variants import VARIANTS

TARGETS: dict[tuple[str, str], tuple[str, float]] = {
    ("shared-0.8", "images/s"): ("at least", 600.0),
    ("shared-0.8", "time / plain"): ("at most", 1.22),
    ("shared-0", "time / plain"): ("at most", 1.02),
    ("fp8", "images/s"): ("at least", 700.0),
}
"""On one H200 with 256 images; a target that is missed is named and fails nothing."""


def step(context: Context, section: Section) -> None:
    """Every variant's speed, and below each budget what it is made of."""
    arguments = ["--preset", "tiny", "--steps", "1", "--rounds", "1"] if context.smoke else ["--rounds", "3"]
    result, _ = run(parse([*arguments, "--variants", *VARIANTS]))
    section.rows += [{k: v for k, v in row.items() if k != "quartiles"} for row in result["variants"]]
    section.skipped += [f"{name}: {why}" for name, why in result["skipped"].items()]
    section.failures += [f"{name}: {why}" for name, why in result["failed"].items()]
    section.details["step"] = result
    section.notes += [show(Section(f"budget of {name}", rows)) for name, rows in result["budgets"].items()]
    if not context.smoke:
        section.notes += _targets({row["variant"]: row for row in section.rows})


def _targets(rows: dict[str, dict[str, float]]) -> list[str]:
    found = []
    for (variant, figure), (kind, wanted) in TARGETS.items():
        if variant in rows:
            value = rows[variant][figure]
            met = value >= wanted if kind == "at least" else value <= wanted
            found.append(f"target {variant}, {figure} {kind} {wanted:g}: {value:.4g}, {'met' if met else 'missed'}")
    if {"shared-0.8", "paper", "authors"} <= rows.keys():
        ours, paper, authors = (rows[name]["ms"] for name in ("shared-0.8", "paper", "authors"))
        for name, ratio, wanted in (("paper", paper / ours, 1.05), ("authors", authors / ours, 3.0)):
            met = "met" if ratio >= wanted else "missed"
            found.append(f"target time of {name} / shared-0.8 at least {wanted:g}: {ratio:.4g}, {met}")
    return found
