"""The one exception for what a user can put right: its text is one sentence, and the command ends with exit code 2."""

import errno
import re
import reprlib
import sys
from typing import Any

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""Numbers of the errors of a disk that takes nothing: full, over quota, limited, read-only, closed to this user."""


class UserError(Exception):
    """Bad input: says which file, field or flag, what was found and what was expected."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """`value` in a sentence: its repr, the middle left out where that is long, however deep it is nested."""
    return _SHORT.repr(value)


def one_line(path: str) -> bool:
    """Whether a path can stand in a sentence: not empty, no line breaks, not longer than a system takes."""
    return path.splitlines() == [path] and len(path) <= 4096


def told(error: BaseException) -> str:
    """Kind and text of another's error, which may quote what was read, in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '...'}"


def out_of_memory(error: BaseException) -> str | None:
    """One clause for an allocation that a device could not serve; None for any other error.

    Does not import torch: where that was not imported, it has raised nothing.
    """
    torch = sys.modules.get("torch")
    text = " ".join(str(error).split())
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"allocate ([\d.]+ [KMGT]?i?B)", text)
        whole, free = (re.search(pattern, text) for pattern in (r"capacity of ([\d.]+ \w+)", r"of which ([\d.]+ \w+)"))
        asked = f"for {wanted[1]} more" if wanted else "for one more tensor"
        left = f", of which {free[1]} were free" if free else ""
        return f"the GPU ran out of memory{f' ({whole[1]}{left})' if whole else ''} when asked {asked}"
    if isinstance(error, RuntimeError) and (found := re.search(r"DefaultCPUAllocator: .* allocate (\d+) bytes", text)):
        return f"this machine ran out of memory when asked for {int(found[1]) / 2**30:.1f} GiB more"
    return None


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names most like `word`, or the list of all where none is near."""
    from difflib import SequenceMatcher

    word = word[:80]  # the comparison takes time as the square of the length
    likeness = {name: SequenceMatcher(None, word, name).ratio() for name in known}
    close = sorted((name for name in known if likeness[name] > 0.5), key=lambda name: -likeness[name])[:3]
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known are " + ", ".join(sorted(known))
