"""Correctness, determinism, speed and training on a GPU, in one command and one report.

    python -m bench.gpu [--json FILE] [--markdown FILE] [--only SECTION ...] [--seed N]

Takes under 8 minutes on one H200, without the sections `step` (the step table of SiT-XL/2) and `pretraining` (three
minutes of real training): these run when `--only` names them, and take about 8 and 5 minutes. The exit code is 1 when a
check failed or a section could not run to its end (the others still do); targets of speed are marked in the tables and
fail nothing. `--smoke` runs the same code at tiny sizes, on a CPU in Triton's interpreter: it tests this suite, not the
kernels.

A section is a function that fills an empty `Section` of its name: to add one, write it and add it to `sections`.
"""

import argparse
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from bench.section import ROOT, Context, Section, plain, sentence, show

BUDGET = 420.0
"""Seconds after which optional work stops; the whole may take 480."""
Run = Callable[[Context, Section], None]
_REST = "LSEP_BENCH_REST"  # set for a process that does what another could not


ON_REQUEST = ("step", "pretraining")
"""Sections that only `--only` runs."""


def sections() -> list[Run]:
    """All of them, in the order they run; `machine` always does. What is optional comes last."""
    from bench.candidates import candidates
    from bench.kernel_checks import correctness, determinism
    from bench.kernel_times import kernels
    from bench.machine import machine
    from bench.pretraining import pretraining
    from bench.sanitizer import csrc
    from bench.step_table import step
    from bench.training import training

    return [machine, correctness, determinism, kernels, csrc, training, candidates, step, pretraining]


def prepare(smoke: bool) -> torch.device | None:
    """The device; None where there is no GPU to run on. Comes before any import of the kernels."""
    if importlib.util.find_spec("lsep_kernels") is None:  # run from a tree that was not installed
        sys.path.append(str(ROOT / ".ci" / "typings"))
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not smoke:
        return None
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def run_all(context: Context, wanted: list[str]) -> list[Section]:
    """The sections called `wanted`, and `machine`; one that fails is reported, and the others still run."""
    chosen = [s for s in sections() if s.__name__ in wanted or s.__name__ == "machine"]
    done: list[Section] = []
    for i, function in enumerate(chosen):
        print(f"{function.__name__} ...", file=sys.stderr, flush=True)
        done.append(run_one(function, context))
        print(f"{function.__name__}: {done[-1].state}, {done[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        if not alive(context):
            done[-1].failures.append("after it the GPU could not be used any more by its process")
            rest = [s.__name__ for s in chosen[i + 1 :]]
            return done + elsewhere(context, rest) if rest else done
    return done


def run_one(function: Run, context: Context) -> Section:
    """One section, with its time; where it raises an error, with that and what it had so far."""
    section, start = Section(function.__name__), time.monotonic()
    try:
        function(context, section)
    except Exception as error:
        text = traceback.format_exc()
        section.failures.append(f"it ended early: {sentence(error)}")
        section.details["traceback"] = text
        print(text, file=sys.stderr)
    section.seconds = time.monotonic() - start
    if alive(context):
        context.free()
    return section


def alive(context: Context) -> bool:
    """Whether the GPU still works for this process: after an illegal access to memory it does not."""
    try:
        context.synchronize()
    except RuntimeError:
        return False
    return True


def elsewhere(context: Context, rest: list[str]) -> list[Section]:
    """The sections `rest` by a fresh process, with its exit code for what it could not say."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rest.json"
        command = [sys.executable, "-m", "bench.gpu", "--seed", str(context.seed), "--json", str(file), "--only", *rest]
        command += ["--smoke"] if context.smoke else []
        left = str(context.seconds_left(BUDGET))
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {_REST: left}, stdout=subprocess.DEVNULL)
        if not file.exists():
            text = f"the GPU failed in the section before, and a fresh process ended with {done.returncode}"
            return [Section(name, failures=[text]) for name in rest]
        found = json.loads(file.read_text())["sections"]
    return [Section(**s) for s in found if s["name"] in rest]


def report(done: list[Section]) -> str:
    """Everything in Markdown, the machine on top."""
    failed = [f"{s.name} ({len(s.failures)})" for s in done if s.failures]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "All checks passed"
    total = sum(s.seconds for s in done)
    return f"# bench.gpu\n\n{verdict}; {total:.0f} s.\n\n" + "\n".join(show(s) for s in done)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, after machine")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn where not given, and reported")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU if there is no GPU: tests the suite")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, write, and return the exit code: 1 for a failed check, 2 for a command that cannot run here."""
    args = parse(arguments)
    device = prepare(args.smoke)
    if device is None:
        print("bench.gpu needs a CUDA GPU and finds none (--smoke runs tiny sizes on a CPU)", file=sys.stderr)
        return 2
    names = [s.__name__ for s in sections()]
    unknown = sorted(set(args.only or []) - set(names))
    if unknown:
        print(f"--only {' '.join(unknown)} is unknown, expected some of {', '.join(names)}", file=sys.stderr)
        return 2
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    context = Context(device, args.smoke, seed, deadline=time.monotonic() + float(os.environ.get(_REST, BUDGET)))
    done = run_all(context, args.only or [name for name in names if name not in ON_REQUEST])
    text = report(done)
    for path in (args.json, args.markdown):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        found = {"failed": any(s.failures for s in done), "sections": [asdict(s) for s in done]}
        args.json.write_text(json.dumps(plain(found), indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text)
    return 1 if any(s.failures for s in done) else 0


if __name__ == "__main__":
    sys.exit(main())
