"""The chaos bench in its short form: what it makes go wrong is found, named and survived."""

import json
from pathlib import Path

import pytest

from bench import chaos


@pytest.mark.parametrize("name", chaos.SECTIONS)
def test_section(name: str, tmp_path: Path) -> None:
    files = tmp_path / "r.json", tmp_path / "r.md"
    code = chaos.main(["--quick", "--only", name, "--json", str(files[0]), "--markdown", str(files[1])])
    (section,) = json.loads(files[0].read_text())["sections"]
    assert (code, section["failures"], section["skipped"]) == (0, [], [])
    assert section["rows"] and f"## {name}: ok" in files[1].read_text()
