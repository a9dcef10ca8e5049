"""Batches come as `order` says, ahead of the step, and errors of the reader reach the caller."""

import numpy as np
import pytest
import torch

from lsep.data.digits import Digits
from lsep.data.loader import open_source, steps_of_batches
from lsep.data.manifest import Manifest, Rows
from lsep.data.order import batch_ids
from lsep.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("prefetch", [1, 4, 100])
def test_batches_are_those_of_the_order(prefetch: int) -> None:
    source = Digits()
    for step, batches in zip(range(12, 17), steps_of_batches(source, 3, 128, 2, 12, 17, CPU, prefetch), strict=True):
        assert len(batches) == 2
        for shard, batch in enumerate(batches):
            ids = batch_ids(step, 1797, 128, 3, shard, 2)
            rows = source.read(ids)
            assert batch.id.tolist() == ids.tolist()
            np.testing.assert_array_equal(batch.x.numpy(), rows.x)
            np.testing.assert_array_equal(batch.y.numpy(), rows.y)


class Failing:
    manifest = Manifest("broken", "samples", (1, 2, 2), 40, 2, 2)

    def read(self, ids: np.ndarray) -> Rows:
        if 7 in ids:
            raise UserError("row 7 is bad")
        return Rows(np.zeros((len(ids), 1, 2, 2), np.float32), ids % 2, ids % 2)


def test_reader_errors_arrive() -> None:
    with pytest.raises(UserError, match="row 7 is bad"):
        list(steps_of_batches(Failing(), 0, 4, 1, 0, 10, CPU, 3))


def test_open_source() -> None:
    assert open_source("digits").manifest.num_classes == 10
    with pytest.raises(UserError, match="--data.path is missing"):
        open_source(None)
    with pytest.raises(UserError, match="--data.path /nowhere: no manifest.json there"):
        open_source("/nowhere")
