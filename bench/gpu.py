"""Correctness, determinism, speed and training on a GPU, in one command and one report.

    python -m bench.gpu [--minutes N] [--json FILE] [--markdown FILE] [--only SECTION ...] [--seed N]

Sections run in the order of their worth (`bench/schedule.py`): machine, the step table of SiT-XL/2, the compiled block,
every kernel, and so on. `--minutes N` plans for N minutes from the start of this process: it prints what fits, runs
that, and says in the report what was left out; without it all sections run, each with its own limit. The files are
written after every section, and while one runs, so that whoever ends this process has what was found before.

The exit code is 1 when a check failed or a section or a case could not run to its end (the others still do); targets of
speed are marked in the tables and fail nothing. `--smoke` runs the same code at tiny sizes, in Triton's interpreter
where there is no GPU: it tests this suite, not the kernels.

A section is a function that fills an empty `Section` of its name, case by case (`Context.each`): to add one, write it,
add it to `sections` in `bench/worker.py`, and its limits to the schedule.
"""

import argparse
import json
import math
import secrets
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from bench.schedule import RESERVE, SCHEDULE, process_started
from bench.section import Section, plain, show, write_whole
from bench.supervisor import NoGpu, supervise


def report(done: list[Section]) -> str:
    """Everything in Markdown, the machine on top."""
    failed = [f"{s.name} ({len(s.failures)})" for s in done if s.failures]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "All checks passed"
    out = [s.name for s in done if s.skipped and not s.begun and not s.rows]
    verdict += f"; not run: {', '.join(out)}" if out else ""
    if running := [s.name for s in done if s.running]:
        verdict = f"Not finished, {running[0]} was running" + (f"; {verdict}" if failed or out else "")
    total = sum(s.seconds for s in done)
    return f"# bench.gpu\n\n{verdict}; {total:.0f} s.\n\n" + "\n".join(show(s) for s in done)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="what fits into N minutes from the process's start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, after machine")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn where not given, and reported")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU if there is no GPU: tests the suite")
    return parser.parse_args(arguments)


def refused(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in a sentence."""
    unknown = sorted(set(args.only or []) - set(SCHEDULE))
    if unknown:
        return f"--only {' '.join(unknown)} is unknown, expected some of {', '.join(SCHEDULE)}"
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        return f"--minutes is {args.minutes:g}, expected more than 0"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run, write, and return the exit code: 1 for a failed check, 2 for a command that cannot run here."""
    args = parse(arguments)
    problem = refused(args)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    names = [name for name in SCHEDULE if not args.only or name in args.only or name == "machine"]
    end = math.inf if args.minutes is None else process_started() + 60 * args.minutes - RESERVE
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed

    def save(done: list[Section]) -> None:
        found = {
            "failed": any(s.failures for s in done), "finished": [s.name for s in done if not s.running],
            "planned": names, "minutes": args.minutes, "sections": [asdict(s) for s in done],
        }  # fmt: skip
        if args.json:
            write_whole(args.json, json.dumps(plain(found), indent=1) + "\n")
        if args.markdown:
            write_whole(args.markdown, report(done))

    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: the process that uses the GPU ends too
    try:
        done = supervise(names, args.smoke, seed, end, save)
    except NoGpu:
        print("bench.gpu needs a CUDA GPU and finds none (--smoke runs tiny sizes on a CPU)", file=sys.stderr)
        return 2
    if not args.markdown:
        print(report(done))
    return 1 if any(s.failures for s in done) else 0


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
