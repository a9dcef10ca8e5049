"""The chaos bench in its short form: what it makes go wrong is found, named and survived."""

import json
from pathlib import Path
from random import Random

import pytest

from bench import chaos, fuzz, mutate
from lsep.errors import UserError


@pytest.mark.parametrize("name", chaos.SECTIONS)
def test_section(name: str, tmp_path: Path) -> None:
    files = tmp_path / "r.json", tmp_path / "r.md"
    options = ["--json", str(files[0]), "--markdown", str(files[1]), "--minutes", "0.2"]
    code = chaos.main(["--quick", "--only", name, *options])
    (section,) = json.loads(files[0].read_text())["sections"]
    assert (code, section["failures"], section["skipped"]) == (0, [], [])
    assert section["rows"] and f"## {name}: ok" in files[1].read_text()


def test_sections_that_are_not_run_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "r.json", tmp_path / "r.md"
    told = ["first"]
    for name in ("flips", "stall"):
        monkeypatch.setitem(chaos.SECTIONS, name, lambda trial, section: section.notes.append(told[-1]))
    options = ["--json", str(files[0]), "--markdown", str(files[1])]
    chaos.main(["--only", "stall", "flips", *options])
    told.append("second")
    chaos.main(["--only", "flips", *options])
    sections = json.loads(files[0].read_text())["sections"]
    assert [(s["name"], s["notes"]) for s in sections] == [("flips", ["second"]), ("stall", ["first"])]
    assert "--only flips" in sections[0]["details"]["command"] and "--only stall" in sections[1]["details"]["command"]
    assert files[1].read_text().index("second") < files[1].read_text().index("first")


def test_an_input_of_the_fuzzer_can_be_had_again() -> None:
    good = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}
    for case in range(300):
        first, again = (mutate.text(mutate.mutated(Random(f"0/{case}"), good)) for _ in range(2))
        assert first == again
    assert good == {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}


def test_the_fuzzer_sees_what_is_no_sentence() -> None:
    def fail(text: str) -> None:
        raise UserError(text)

    fuzz.attempt(lambda: fail("a: found b, expected c"))
    for text in ("a\nb", "", "x" * 5000):
        with pytest.raises(AssertionError, match="no sentence"):
            fuzz.attempt(lambda text=text: fail(text))
    with pytest.raises(ZeroDivisionError):
        fuzz.attempt(lambda: 1 // 0)
