"""lsep/diagnose.py judges the losses that a step has, whatever the model predicts."""

from pathlib import Path

import pytest
import torch
from conftest import tiny

from lsep.diagnose import judged, not_finite
from lsep.plan import BranchPlan
from lsep.step import open_loader, setup


@pytest.mark.parametrize("prediction", ["v", "eps", "x"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_loss_that_is_judged_is_the_step_s(store: Path, prediction: str, path: str) -> None:
    config = tiny(
        data__path=str(store), probe__enabled=False, interpolant__prediction=prediction, interpolant__path=path
    )
    state = setup(config)
    (batch,) = next(iter(open_loader(state, 3, 4)))
    _, causes = judged(state, 3, batch)
    # The zero weights of the initialisation predict 0: the loss is the mean square of what is to be predicted.
    every_label = BranchPlan(len(batch.y), null=0, extra=0, probe=False)
    losses = state.learning(batch, every_label, torch.tensor(3), torch.tensor(0))
    assert causes["denoising loss"].shape == (10,)
    torch.testing.assert_close(causes["denoising loss"].mean(), losses.denoising)
    assert "are finite" in not_finite(state, 3, [batch])
