"""Detectron2 is optional: what a user reads who asks for it where it is absent."""

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import UserError


@contextmanager
def detectron2_installed() -> Iterator[None]:
    """Around the imports of Detectron2: a failed one becomes a :class:`UserError` that says what to do."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"Detectron2 is not installed: see its INSTALL guide (it is not on PyPI), or take --engine torchvision ({error})"
        ) from error
