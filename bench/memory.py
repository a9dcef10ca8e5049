"""The peak of the allocator's memory in a training step, measured, beside `lsep.cost.memory`'s.

    python -m bench.memory [--cases NAME ...] [--json FILE] [--markdown FILE]

On a GPU, or on a stand-in for one whose allocator is real. A case is PRESET:BATCH, followed by any number of
+SECTION.FIELD=VALUE; where none is given, those of `CASES` are measured. Each runs the steps of a training up to the
captured one, with weights that nobody has drawn: what they are changes no size. `reserved` is what the allocator held
at its most, for `lsep.cost.fit`. The exit code is 1 where a case failed or is off by more than `--within`.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from bench.section import Section, plain, sentence, show
from bench.step import facts
from bench.variants import configuration, with_data
from lsep import backends
from lsep import step as training
from lsep.config import Config, override
from lsep.cost.memory import step_memory
from lsep.errors import UserError
from lsep.graphs import WARM_UP
from lsep.objective import Objective
from lsep.step import open_loader, setup, train_step

PRESETS, BATCHES = ("sit-xl-2-256", "sit-l-2-256", "sit-b-2-256"), (32, 128, 256)
POLICIES = ("keep", "recompute-elementwise", "recompute-blocks")
FURTHER = (
    "probe.enabled=false", "probe.branch=paper", "probe.branch=paper+probe.pool_before_fc2=false",
    "probe.extra_fraction=0.0", "optim.accumulate=2", "optim.accumulate=4", "train.weights=fp32",
    "backend.modulation=block", "backend.mlp=cublaslt", "backend.mlp=torch", "train.fp8=true",
    "train.fp32_residual=true", "backend.attention=cudnn", "backend.optimizer=torch", "optim.ema_extra=[0.999]",
    "optim.accumulate=2+train.memory=recompute-elementwise", "optim.accumulate=2+train.memory=recompute-blocks",
    "train.compile=off", "train.graphs=off",
)  # fmt: skip
CASES = (
    *(f"{preset}:{batch}+train.memory={memory}" for preset in PRESETS for memory in POLICIES for batch in BATCHES),
    *(f"sit-xl-2-256:256+{change}" for change in FURTHER),
)

STAND_IN = ", played by a stand-in: no kernel ran, and the allocator is torch's own"


def case(name: str) -> Config:
    """The configuration that a case names, its data still open."""
    head, *changes = name.split("+")
    preset, _, batch = head.partition(":")
    values: dict[str, Any] = {"train.batch_size": int(batch)} if batch else {}
    for change in changes:
        field, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"case {name!r} is changed by {change!r}, expected SECTION.FIELD=VALUE")
        try:
            values[field] = json.loads(value)
        except ValueError:
            values[field] = value
    return override(configuration(preset), values)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Modules are made on the device and their weights are left as they come: half a minute less for XL/2."""

    class Undrawn(Objective):
        def __init__(self, *args: Any, **given: Any) -> None:
            with device:
                super().__init__(*args, **given)

        def initialize(self, seed: int) -> None:
            pass

    before = training.Objective
    training.Objective = Undrawn  # type: ignore[misc]
    try:
        yield
    finally:
        training.Objective = before  # type: ignore[misc]


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """One case: bytes of the allocator after the setup, at the peak of a step and reserved, and those computed."""
    with tempfile.TemporaryDirectory() as folder, undrawn(device):
        state = setup(with_data(case(name), Path(folder)))
        after = torch.cuda.memory_allocated(device)
        batches = list(islice(open_loader(state, 0, 2), 2))
        torch.cuda.reset_peak_memory_stats(device)
        for step in range(WARM_UP + 2):
            train_step(state, step, batches[step % 2])
        torch.cuda.synchronize(device)
        reserved = torch.cuda.max_memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
    config = state.config
    parts = step_memory(
        config, backends.decide(config, device), state.source.manifest.probe_classes, config.probe.enabled
    )  # fmt: skip
    return {
        "case": name, "after setup": after, "peak": peak, "reserved": reserved, "computed": sum(parts.values()),
        "parts": parts,
    }  # fmt: skip


def clear() -> None:
    """Drop what a case has left."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In GB, with what the computed peak is off by."""
    return [
        {
            "case": row["case"], "after setup": f"{row['after setup'] / 1e9:.2f}", "peak": f"{row['peak'] / 1e9:.2f}",
            "computed": f"{row['computed'] / 1e9:.2f}", "off by": f"{row['computed'] / row['peak'] - 1:+.1%}",
            "reserved": f"{row['reserved'] / 1e9:.2f}",
        }
        for row in found
    ]  # fmt: skip


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All figures, and the table."""
    if not torch.cuda.is_available():
        raise UserError("bench.memory needs a GPU, or a stand-in for one, and torch finds neither")
    device, found, failed = torch.device("cuda"), [], {}
    torch._dynamo.config.recompile_limit = 64
    for name in args.cases:
        try:
            found.append(measure(name, device))
        except UserError:
            raise
        except Exception as error:
            failed[name] = sentence(error)
        else:
            if abs(found[-1]["computed"] / found[-1]["peak"] - 1) > args.within:
                failed[name] = f"computed {found[-1]['computed']:,} bytes, the allocator had {found[-1]['peak']:,}"
        print(table(found[-1:])[0] if name not in failed else f"{name}: {failed[name]}", file=sys.stderr, flush=True)
        clear()
    about = facts(device)
    if "libcuda" in os.environ.get("LD_PRELOAD", ""):
        about["GPU"] += STAND_IN
    result = {**about, "capability": list(torch.cuda.get_device_capability()), "cases": found, "failed": failed}
    notes = [f"{key}: {value}" for key, value in result.items() if key not in ("cases", "failed")]
    notes.append("GB are 10^9 bytes: the peak of torch's allocator in a step, and what `lsep.cost.memory` computes")
    return result, show(Section("bench.memory", table(found), notes, [f"{n}: {why}" for n, why in failed.items()]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NAME", help="all where not given")
    parser.add_argument("--within", type=float, default=0.05, metavar="SHARE", help="0.05 where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, not to the terminal")
    args = parser.parse_args(arguments)
    try:
        result, text = run(args)
    except UserError as error:
        print(f"bench.memory: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(plain(result), indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
