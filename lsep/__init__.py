"""LSEP: fast training of flow transformers whose features are linearly separable (arXiv 2509.21565).

Importing the package is cheap: torch is loaded by the rooms that compute, not here.
"""

__version__ = "0.1.0"
