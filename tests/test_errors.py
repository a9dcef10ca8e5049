"""Near names are offered, best first; what was read is quoted in short."""

import time

from lsep.errors import nearest, one_line, shown, told


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
