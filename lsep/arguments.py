"""Reading a command line: leading arguments, flags by tyro, and every error as one sentence."""

import contextlib
import io
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lsep.errors import UserError, nearest, shown

Args = list[str]


def wants_help(argv: Args) -> bool:
    return bool({"-h", "--help"} & set(argv))


def first_arguments(command: str, names: tuple[str, ...], argv: Args) -> tuple[tuple[str, ...], Args]:
    """The arguments `names` that come before all flags, and the rest; with --help their names stand for them."""
    if wants_help(argv):
        return names, ["--help"]
    given = tuple(argv[: len(names)])
    if "" in given:
        raise UserError(f"lsep {command}: {names[given.index('')]} is empty, expected a path")
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

    _require_values(argv)
    given = {} if default is None else {"default": default}
    typed, argv = argv, _either_name(argv, {field.name for field in fields(kind)})
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
        raise UserError(_as_typed(_plain(_one_sentence(err.getvalue() + out.getvalue()), kind, argv), typed)) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"argument {flag!r} is unexpected, expected flags")
        raise UserError(f"flag {flag!r} is unknown{_near_flags(flag, kind, prog, given)}")
    for name, hint in _flags(kind).items():
        if type(None) in get_args(hint) and getattr(args, name[2:].replace("-", "_"), None) == ():
            raise UserError(f"{name} is empty, expected at least one value, or the flag left out")
    return args


_EITHER = ("--step", "--checkpoint")
"""Both name a checkpoint by its step, and a command that has one takes the other for it."""


def _as_typed(sentence: str, typed: Args) -> str:
    """A sentence about the flag that stands on the command line."""
    for other, own in (_EITHER, _EITHER[::-1]):
        if sentence.startswith(f"{own} ") and any(a.partition("=")[0] == other for a in typed):
            return other + sentence.removeprefix(own)
    return sentence


def _either_name(argv: Args, known: set[str]) -> Args:
    """--step where a command has --checkpoint, and the other way round."""
    for other, own in (_EITHER, _EITHER[::-1]):
        if own[2:] in known and other[2:] not in known:
            return [own + a.removeprefix(other) if a == other or a.startswith(f"{other}=") else a for a in argv]
    return argv


def _require_values(argv: Args) -> None:
    """Raise UserError for an empty string: as a path it would be the folder one stands in, as a name nothing."""
    for before, argument in zip(["", *argv], argv, strict=False):
        flag, _, value = argument.partition("=")
        if argument == "":
            raise UserError(f"{before.partition('=')[0] or 'an argument'} is empty, expected a value")
        if flag.startswith("--") and "=" in argument and not value:
            raise UserError(f"{flag} is empty, expected a value")


def _flags(kind: type) -> dict[str, Any]:
    """The flags of the dataclass `kind` and their types; those of a section as `--section.field`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        flag = "--" + name.replace("_", "-")
        if not is_dataclass(hint):
            found[flag] = hint
            continue
        assert isinstance(hint, type)
        # What stands under no name of its own, as `config` of `lsep train`, has its sections there.
        inside = {k.removeprefix("--"): v for k, v in _flags(hint).items()}
        found |= (
            {f"--{k}": v for k, v in inside.items()}
            if name == "config"
            else {f"{flag}.{k}": v for k, v in inside.items()}
        )
    return found


_WANTED = {int: "a whole number", float: "a number", Path: "a path", bool: "True or False", str: "a value"}


def _plain(text: str, kind: type, argv: Args) -> str:
    """A sentence of tyro's without its parser's words: the flag, what was found, what its type wants."""
    text = re.sub(r"[.,]? Expected 1 values", ", expected one", text)
    required = re.findall(r"(--[a-z][a-z0-9.-]*) \S+ .*?\(required\)", text)
    if text.startswith("Missing from") and required:
        return f"{required[0]} is missing, expected {_wanted(_flags(kind).get(required[0], str))}"
    choice = re.match(r"invalid choice (.*) for argument '(--[^']*)'", text)
    if choice:
        hint = _flags(kind).get(choice[2])
        known = [c for c in _choices(hint) if c is not None]
        return f"{choice[0]}. Expected one of {', '.join(map(repr, known))}" if known else text
    parsed = re.match(r"Error parsing (--[a-z][a-z0-9.-]*):", text)
    if parsed is None:
        return text
    flag = parsed[1]
    found = shown(" ".join(_given(flag, argv)))
    return f"{flag} is {found}, expected {_wanted(_flags(kind).get(flag))}"


def _choices(hint: Any) -> list[Any]:
    """Of a Literal, or a union or tuple of one, in the order they are declared in."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _wanted(hint: Any) -> str:
    parts = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    if get_origin(hint) is tuple:
        return f"{_WANTED.get(parts[0], 'a value').removeprefix('a ')}s"
    if parts:
        return _wanted(parts[0])
    return _WANTED.get(hint, "a value of its type")


def _given(flag: str, argv: Args) -> Args:
    """What stands behind `flag`."""
    for i, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            return [argument.partition("=")[2]]
        if argument == flag:
            rest = argv[i + 1 :]
            # A negative number looks like a flag.
            stop = (k for k, a in enumerate(rest) if a.startswith("-") and not a[1:2].isdigit())
            return rest[: next(stop, len(rest))]
    return []


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
