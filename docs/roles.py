"""For mkdocstrings: the roles of our docstrings, such as ``:class:`pretrain.backbones.vit.ViT```, as code."""

import re
from typing import Any

from griffe import Extension, Object


class Roles(Extension):
    """Takes the roles away and leaves the names."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Of every object with a docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`[~!]?([^`]+)`", r"`\1`", obj.docstring.value)
