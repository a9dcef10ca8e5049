"""Reading a command line: leading arguments, flags by tyro, and every error as one sentence."""

import contextlib
import io
import re
from dataclasses import fields
from typing import Any

from lsep.errors import UserError, nearest

Args = list[str]


def wants_help(argv: Args) -> bool:
    return bool({"-h", "--help"} & set(argv))


def first_arguments(command: str, names: tuple[str, ...], argv: Args) -> tuple[tuple[str, ...], Args]:
    """The arguments `names` that come before all flags, and the rest; with --help their names stand for them."""
    if wants_help(argv):
        return names, ["--help"]
    given = tuple(argv[: len(names)])
    if len(given) < len(names) or any(a.startswith("-") for a in given):
        found = " ".join(argv) or "nothing"
        raise UserError(f"lsep {command}: expected {' '.join(names)} first, then flags; found {found!r}")
    return given, argv[len(names) :]


def no_flags(usage: str, description: str, argv: Args) -> None:
    """For a command without flags: print its help and end, or refuse what is left of `argv`."""
    if wants_help(argv):
        print(f"usage: lsep {usage}\n\n{description}")
        raise SystemExit(0)
    if argv:
        raise UserError(f"lsep {usage} takes no argument {argv[0]!r}")


def parse(kind: type, argv: Args, prog: str, description: str, default: Any = None) -> Any:
    """tyro's parser for the dataclass `kind`; its errors as one sentence, unknown flags with the nearest names."""
    import tyro

    given = {} if default is None else {"default": default}
    argv = _either_name(argv, {field.name for field in fields(kind)})
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args, unknown = tyro.cli(
                kind, args=argv, prog=prog, description=description, return_unknown_args=True, **given
            )
    except SystemExit as end:
        if not end.code:
            print(out.getvalue(), end="")
            raise
        raise UserError(_one_sentence(err.getvalue() + out.getvalue())) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"argument {flag!r} is unexpected, expected flags")
        raise UserError(f"flag {flag!r} is unknown{_near_flags(flag, kind, prog, given)}")
    return args


def _either_name(argv: Args, known: set[str]) -> Args:
    """--step where a command has --checkpoint, and the other way round: both name a checkpoint by its step."""
    pair = ("--step", "--checkpoint")
    for other, own in (pair, pair[::-1]):
        if own[2:] in known and other[2:] not in known:
            return [own + a.removeprefix(other) if a == other or a.startswith(f"{other}=") else a for a in argv]
    return argv


def _one_sentence(text: str) -> str:
    """The message inside tyro's error: a framed box on a terminal, a title and ruled sections elsewhere."""
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"\n[─-]{5,}\n", "\n".join(lines))
    message = sections[0] if "╭" in text else sections[min(1, len(sections) - 1)]
    return " ".join(message.split()).rstrip(".")


def _near_flags(flag: str, kind: type, prog: str, given: dict[str, Any]) -> str:
    import tyro

    completions = io.StringIO()
    with contextlib.redirect_stdout(completions), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, **given)
    known = sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", completions.getvalue())) - {"--help"})
    return nearest(flag, known)
