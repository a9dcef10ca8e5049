"""lsep/inductor.py: everything of a step is compiled with its keywords, whatever the backbone."""

from typing import Any

import pytest
import torch
from conftest import MANIFEST, tiny
from torch import nn

from lsep.checks import resolve
from lsep.inductor import COMPILE
from lsep.objective import Objective
from lsep.step import _compiled

UNET = {"model__backbone": "unet", "model__patch_size": 1, "probe__depth": 1, "model__depth": 1}


@pytest.mark.parametrize(("what", "changes"), [("block", {}), ("model", {}), ("block", UNET)], ids=str)
def test_compiled_with_one_set_of_keywords(what: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if changes:
        pytest.importorskip("diffusers")
    given: list[dict[str, Any]] = []

    def compile_function(function: Any, **keywords: Any) -> Any:
        given.append(keywords)
        return function

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(nn.Module, "compile", compile_function)
    _compiled(Objective(resolve(tiny(**changes), MANIFEST), MANIFEST), what)
    assert given and all(keywords == COMPILE for keywords in given)
    assert COMPILE["options"] == {"deterministic": True}


def test_inductor_knows_the_option() -> None:
    """Of the same numbers, compiled for a CPU."""
    x = torch.randn(4, 8, 33)
    assert torch.allclose(torch.compile(lambda x: (2 * x).sum(1), **COMPILE)(x), (2 * x).sum(1))
