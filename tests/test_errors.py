"""Near names are offered, best first; what was read is quoted in short."""

import time

import pytest
import torch

from lsep import cli
from lsep.errors import nearest, one_line, out_of_memory, shown, told


def test_nearest() -> None:
    assert nearest("trian", ["sample", "train", "strain"]) == "; did you mean 'train' or 'strain'?"
    assert nearest("xyz", ["b", "a"]) == "; known are a, b"


def test_a_long_name_takes_no_time() -> None:
    start = time.process_time()
    assert nearest("x" * 10**6, ["b", "a"]) == "; known are a, b"
    assert time.process_time() - start < 0.5


def test_values_are_shown_in_short() -> None:
    assert [shown(v) for v in ("x", 3, [4, 8], None)] == ["'x'", "3", "[4, 8]", "None"]
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep]
    for value in ("x" * 10**6, 10**4000, list(range(10**6)), {"a" * 10**6: "b" * 10**6}, deep):
        assert len(shown(value)) < 400
    assert told(ValueError("a\nb\u2028c")) == "ValueError: a b c"
    assert len(told(KeyError("x" * 10**6))) < 300


def test_a_path_in_a_sentence() -> None:
    assert one_line("runs/é 1") and one_line("x" * 4096)
    assert not any(map(one_line, ("", "a\nb", "a\n", "a\u2028", "x" * 4097)))


def test_memory_that_runs_out_is_one_clause() -> None:
    """The figures of torch's own text; other errors are left to others."""
    text = (
        "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.65 GiB of which 1.20 GiB is "
        "free. Process 12 has 78.4 GiB memory in use.\nOf the allocated memory 70 GiB is allocated by PyTorch."
    )
    clause = out_of_memory(torch.OutOfMemoryError(text))
    assert clause == "the GPU ran out of memory (79.65 GiB, of which 1.20 GiB were free) when asked for 2.25 GiB more"
    assert out_of_memory(torch.OutOfMemoryError("other words")) == (
        "the GPU ran out of memory when asked for one more tensor"
    )
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "this machine ran out of memory when asked for 1073741824.0 GiB more" in str(out_of_memory(failed.value))
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access")) is None
    assert out_of_memory(ValueError("allocate 5 bytes")) is None


def test_a_command_out_of_memory_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(argv: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setitem(cli.COMMANDS, "sample", full)
    assert cli.main(["sample", "runs/x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lsep: error: the GPU ran out of memory when asked for 2.00 MiB more: use a smaller batch")
    assert said.count("\n") == 1
