"""What is missing is said with its reason and its remedy."""

import shutil
from typing import get_args, get_type_hints

import pytest

from lsep import doctor
from lsep.config import BackendConfig


def test_missing_parts_say_why_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    by_name = {p.name: p for p in doctor.parts()}
    assert by_name["wandb"].version is None and by_name["compile, CPU"].version is None
    text = doctor.describe()
    assert "(pip install wandb)" in text and "none is found: apt install g++" in text
    assert by_name["torch"].version


def test_every_backend_is_listed_with_what_auto_means() -> None:
    parts = {p.name: p for p in doctor.parts()}
    for kind, field in get_type_hints(BackendConfig).items():
        names = [f"{kind} {choice}" for choice in get_args(field) if choice != "auto"]
        assert sum(parts[name].version == "auto" for name in names) == 1
        for name in names:
            assert parts[name].version in ("auto", "ready") or len(parts[name].note) > 20
    assert parts["optimizer torch"].version is not None
