"""Data: what a set holds (`manifest`), where its rows come from (`store`), their order, and the loaders."""

from typing import Literal, get_args

Form = Literal["repa", "edm2", "lightningdit", "fast-dit", "speedrundit", "imagefolder", "digits"]
"""Forms in which users bring data, see `forms`."""
FORMS: tuple[str, ...] = get_args(Form)
Labels = Literal["auto", "folders", "names", "none"]
"""Where the labels of images are, see `pictures.open_pictures`."""
