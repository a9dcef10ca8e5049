"""Inception score (arXiv 1606.03498): exp of the mean divergence of an image's class distribution from that of all.

As ADM's evaluator does: over consecutive chunks of 5000 images in the order of the file, averaged. Images sorted by
class therefore score low: shuffle them before they are saved.
"""

import torch
from torch import Tensor

CHUNK = 5000


def inception_scores(logits: Tensor, chunk: int = CHUNK) -> Tensor:
    """The score of every chunk, float64, from logits `(N, classes)`; the last chunk may be shorter."""
    scores = []
    for part in logits.split(chunk):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).nan_to_num(0)  # 0 log 0
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores)
