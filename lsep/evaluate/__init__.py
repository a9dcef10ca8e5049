"""Evaluation: features of images, and the distances between two sets of them.

`commands.py` is the command, `measure.py` what it does; one file a metric. Features come from `features.py`.
"""

from typing import Literal

Metric = Literal["fid", "sfid", "is", "precision", "recall", "kid"]
METRICS: tuple[Metric, ...] = ("fid", "sfid", "is", "precision", "recall", "kid")
Precision = Literal["fp32", "fp64"]
