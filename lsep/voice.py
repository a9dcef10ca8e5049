"""What is said on the way, by level: progress (info), warnings, and nothing but errors.

`lsep --log-level warning COMMAND ...`, `lsep --quiet COMMAND ...` or LSEP_LOG_LEVEL. What a command is asked for, such
as the names of the files it has written, is its result and said at every level.
"""

import os

from lsep.errors import UserError

LEVELS = ("info", "warning", "error")
_VARIABLE = "LSEP_LOG_LEVEL"


def heard(level: str) -> bool:
    """Whether what has this level is said."""
    return LEVELS.index(level) >= LEVELS.index(_chosen())


def take_flags(argv: list[str]) -> list[str]:
    """`argv` without `--quiet`, which is `--log-level warning`, and `--log-level LEVEL`, which count from here on.

    Also for processes that are started from here. Raises UserError for a level that is none.
    """
    rest, level, words = [], None, iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if word == "--quiet":
            level = "warning"
        elif name == "--log-level":
            level = value if "=" in word else next(words, "")
            if level not in LEVELS:
                raise UserError(f"--log-level is {level!r}, expected one of {', '.join(LEVELS)}")
        else:
            rest.append(word)
    if level is not None:
        os.environ[_VARIABLE] = level
    _chosen()
    return rest


def _chosen() -> str:
    level = os.environ.get(_VARIABLE) or "info"
    if level not in LEVELS:
        raise UserError(f"{_VARIABLE} is {level[:80]!r}, expected one of {', '.join(LEVELS)}")
    return level
