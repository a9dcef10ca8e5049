"""Near names are offered, best first."""

from lsep.errors import nearest


def test_nearest() -> None:
    assert nearest("trian", ["sample", "train", "strain"]) == "; did you mean 'train' or 'strain'?"
    assert nearest("xyz", ["b", "a"]) == "; known are a, b"
