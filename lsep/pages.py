"""What the self-contained pages share: a style, figures and pictures inside the page; and figures as files."""

import base64
import io
from pathlib import Path
from typing import Any

from lsep.errors import UserError, told
from lsep.files import read_plain, replacing

_PNG = b"\x89PNG\r\n\x1a\n"


def svg(figure: Any) -> str:
    """A matplotlib figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture(png: bytes, caption: str) -> str:
    """A PNG as an element of a page; `caption` is HTML."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def png_problem(path: Path) -> str | None:
    """What keeps the file `path` from being shown as a PNG: nothing, or a clause; no link is followed to find out."""
    import warnings

    from PIL import Image

    try:
        data = read_plain(path)
        if not data.startswith(_PNG):
            return "is no PNG"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a picture that would take too much memory
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.verify()  # the checksums of all its parts
    except FileNotFoundError:
        return "is missing"
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    except Exception as error:  # what damage raises has no common base
        return f"is damaged ({told(error)})"
    return None


def save_png(figure: Any, path: Path) -> None:
    """A matplotlib figure as a file, there as a whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def page(title: str, body: str) -> str:
    """The whole page; `title` and `body` are HTML."""
    return _PAGE.format(title=title, body=body)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: .15rem 1rem .15rem 0; }}
.curves, .grids {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
svg {{ max-width: 100%; height: auto; }} figure {{ margin: 0; }} img {{ max-width: 32rem; image-rendering: pixelated; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
