"""How everything of a training step is compiled: one graph, fixed shapes, and sums in an order that no timing decides.

    torch.compile(function, **COMPILE)

By itself Inductor times several configurations of a reduction where it first runs, on the machine at hand, and takes
the fastest: the order of its sums, and with it the last bits of a run, would differ from machine to machine and from
run to run. Pointwise kernels are timed still: they give the same bits in every configuration.
"""

from typing import Any

COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}
"""Keywords of `torch.compile` and `nn.Module.compile`."""
