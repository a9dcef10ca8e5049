"""What is missing is said with its reason and its remedy."""

import shutil

import pytest

from lsep import doctor


def test_missing_parts_say_why_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    by_name = {p.name: p for p in doctor.parts()}
    assert by_name["wandb"].version is None and by_name["compile, CPU"].version is None
    text = doctor.describe()
    assert "(pip install wandb)" in text and "none is found: apt install g++" in text
    assert by_name["torch"].version
