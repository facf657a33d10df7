"""Texts from the templates beside this file; html pages load no script and no file, and every text is escaped."""

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, pass_eval_context
from markupsafe import Markup

LARGE_BYTES = 30_000


def data_uri(png: bytes) -> str:
    """An image as part of a page: photographs, which PNG keeps badly, as WebP in a quarter of the bytes."""
    kind, pixels = "png", png
    if len(png) >= LARGE_BYTES and (smaller := _as_webp(png)) and len(smaller) < len(png) / 2:
        kind, pixels = "webp", smaller
    return f"data:image/{kind};base64,{base64.b64encode(pixels).decode('ascii')}"


def _as_webp(png: bytes) -> bytes:
    """Nothing for what WebP cannot hold (sides over 16,383 px) or Pillow cannot read: no picture stops a page."""
    from PIL import Image

    file = io.BytesIO()
    try:
        Image.open(io.BytesIO(png)).save(file, "WEBP", quality=90)
    except Exception:  # on damaged bytes the decoder may raise anything; without WebP a KeyError
        return b""
    return file.getvalue()


@pass_eval_context
def _escaped(context: Any, value: Any) -> Any:
    """As Python's own library escapes it: the texts of tables are compared byte for byte."""
    is_plain = context.autoescape and not hasattr(value, "__html__")
    return Markup(html.escape(str(value))) if is_plain else value


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=lambda name: str(name).endswith(".html"),
    finalize=_escaped,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
FILTERS = _TEMPLATES.filters
FILTERS |= {"data_uri": data_uri, "braced": "{{{}}}".format}


def from_template(name: str, **values: Any) -> str:
    """A file of ``templates/`` with these values; those that are no :class:`~markupsafe.Markup` are escaped."""
    return _TEMPLATES.get_template(name).render(values)


def page(title: str, sections: Mapping[str, str]) -> str:
    """A page with its style: the sections {head (one word): html} that are not empty, and links to them."""
    marked = {head: Markup(body) for head, body in sections.items()}
    return from_template("base.html", title=title, sections=marked)
