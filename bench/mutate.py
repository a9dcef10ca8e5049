"""Wrong input out of good: JSON with other values, keys and nesting, and files with other bytes; all from one seed."""

import json
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

RAW = {
    "@huge": "1" + "0" * 400,
    "@digits": "9" * 5000,
    "@infinite": "1e999",
    "@lists": "[" * 100_000 + "]" * 100_000,
    "@objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "@almost": "[" * 985 + "]" * 985,
    "@levels": '{"a":' * 400 + "1" + "}" * 400,
    "@many": "[" + "0," * 50_000 + "0]",
}
"""Text that stands for these strings, in quotes: what Python's own JSON writer could not say."""
VALUES: tuple[Any, ...] = (
    *RAW, None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**32 - 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**63), 0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), "", "0", "nan",
    "a\0b", "\ud800", "é\n\r\u2028", "%s{0}", "x" * 100_000, ".", "..", "../..", "/", "/dev/zero", "/etc/passwd",
    "a/../../outside", "C:\\x", "F32", "BF16", "F64", "U8", "I64", "auto", "float32", "files", "packed", [], {}, [0],
    [[]], [None], [1, 2, 3], [-1, 8, 8], [2**40, 2**40, 2**40], [0, 2**63], [0.5, 1.0, "1"], {"a": 1}, {"": {}},
)  # fmt: skip


def text(value: Any) -> bytes:
    """JSON in which the names of RAW are what they stand for."""
    found = json.dumps(value)
    for name, raw in RAW.items():
        found = found.replace(json.dumps(name), raw)
    return found.encode()


def mutated(draw: Random, value: Any, more: tuple[Any, ...] = ()) -> Any:
    """A copy of a JSON value with one to three changes; `more` are values to put in beside VALUES."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places or draw.random() < 0.01:
            return draw.choice(VALUES)
        holder, key = draw.choice(places)
        other = draw.choice(more) if more and draw.random() < 0.2 else draw.choice(VALUES)
        _change(draw, holder, key, deepcopy(other))  # a later change may be inside of it
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _change(draw: Random, holder: Any, key: Any, other: Any) -> None:
    old = holder[key]
    how = draw.choice(("other", "other", "other", "near", "remove", "rename", "wrap", "twice"))
    if how == "near" and isinstance(old, int | float):
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 2, old / 3, float(old), str(old), bool(old)))
    elif how == "near" and isinstance(old, str) and old:
        place = draw.randrange(len(old))
        holder[key] = old[:place] + draw.choice("aZ09 ./\\-_\0é") + old[place + draw.randrange(2) :]
    elif how == "remove":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        new = draw.choice((f"{key}_", key[:-1], key.upper(), "", "x" * 5000, "a.b", "__class__", "__metadata__"))
        holder[new] = holder.pop(key)
    elif how == "wrap":
        holder[key] = draw.choice(([old], {"a": old}, [old, old]))
    elif how == "twice" and isinstance(holder, list):
        holder.append(old)
    else:
        holder[key] = other


def damaged(draw: Random, content: bytes) -> bytes:
    """Up to four times other bytes, fewer, more, or none at all."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.choice((0, 1, 7, 8, 9, 200)))
    for _ in range(draw.choice((1, 1, 2, 4))):
        place, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 100))
        new = draw.choice((b"", draw.randbytes(length), b'"', b"{", b"]", b"\0", b"9" * length, content[:length]))
        content = content[:place] + new + content[place + draw.choice((0, len(new), length)) :]
    return content
