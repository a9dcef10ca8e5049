"""From the names and entries of others' files to plain names of weights: wrappers dropped, the averaged ones found.

`module.` (DDP), `_orig_mod.` (torch.compile) and the like say how a model ran, wherever they stand; `model.` or `ema.`
before all names says which of a file's models it is, as an entry of a torch file does.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lsep.errors import UserError, shown

Tensors = dict[str, Tensor]

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ANCHORS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
"""What every SiT or DiT has, in its own code and in diffusers."""
_TRAINED = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")
_OTHERS = re.compile(r"opt|optimizer.*|.*scheduler.*|lsep")


def is_average(name: str) -> bool:
    """Whether an entry or prefix is one of averaged weights: ema, model_ema, ema_model, state_dict_ema, ..."""
    return "ema" in re.split(r"[^a-z]+", name.lower())


def listed(names: Iterable[object], most: int = 6) -> str:
    """The first names in a sentence, and how many there are."""
    found = [str(name)[:80] for name in names]
    more = f", ... ({len(found)} in all)" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else "none"


def choose_entry(found: dict[Any, Any], ema: bool, path: Path) -> tuple[str, dict[Any, Any]]:
    """Of what a torch file holds the entry with the weights and its name, "" where that is the file itself.

    ema: the averaged ones where there are some. Raises UserError where more than one could be meant.
    """
    dicts = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, dict)}
    averaged = [k for k in dicts if is_average(k)]
    trained = [k for k in _TRAINED if k in dicts]
    if not averaged and not trained:
        holds = (k for k, v in dicts.items() if any(isinstance(x, Tensor) for x in v.values()))
        trained = [k for k in holds if not _OTHERS.fullmatch(k)]
    odd = [k for k, v in found.items() if isinstance(k, str) and is_average(k) and isinstance(v, list | tuple) and v]
    if ema and odd and not averaged:
        raise UserError(
            f"{path}: its averaged weights, {shown(odd[0])}, are a {type(found[odd[0]]).__name__} without names, "
            "expected tensors by name; --no-ema takes the weights in training"
        )
    chosen = _one((averaged or trained) if ema else trained, path, "entries")
    if chosen is None and averaged:
        raise UserError(f"{path}: --no-ema was given, but it holds averaged weights only ({listed(averaged)})")
    return ("", found) if chosen is None else (chosen, dicts[chosen])


def _one(names: list[str], path: Path, what: str) -> str | None:
    if len(names) > 1:
        raise UserError(
            f"{path}: {what} {listed(map(repr, names))} could all be the weights, expected one: save that one alone"
        )
    return names[0] if names else None


def plain(tensors: Tensors, ema: bool, path: Path) -> tuple[Tensors, str, list[str]]:
    """Weights without wrappers and without a prefix before all names; that prefix; and sentences on what is left out.

    ema: of prefixes that name two models, take the averaged one.
    """
    out: Tensors = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in out:
            raise UserError(f"{path}: more than one tensor is {short!r} (such as {name!r}), expected one")
        out[short] = tensor
    prefixes = [name[: -len(a)] for name in out for a in _ANCHORS if name == a or name.endswith("." + a)]
    if not prefixes or prefixes == [""]:
        return out, "", []
    averaged = [p for p in prefixes if is_average(p)]
    others = [p for p in prefixes if not is_average(p)]
    chosen = _one((averaged or others) if ema else others, path, "prefixes")
    if chosen is None:
        raise UserError(f"{path}: --no-ema was given, but it holds averaged weights only ({listed(averaged)})")
    others = [p for p in prefixes if p and p != chosen]
    kept, left = {}, []
    for name, tensor in out.items():
        if name.startswith(tuple(others)) and not (chosen and name.startswith(chosen)):
            continue
        if name.startswith(chosen):
            kept[name.removeprefix(chosen)] = tensor
        elif "" not in prefixes:
            left.append(name)
    said = [f"{len(left)} tensors outside {chosen!r} are left out: {listed(left, 3)}"] if left else []
    return kept, chosen.rstrip("."), said
