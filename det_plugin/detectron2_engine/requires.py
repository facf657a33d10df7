"""Detectron2 is optional. This says what to do where it is needed and absent."""

from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import UserError


@contextmanager
def detectron2_installed() -> Iterator[None]:
    """Turn a failed import of Detectron2 into a :class:`UserError` that says what to do."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"Detectron2 is not installed: see its INSTALL guide (it is not on PyPI), or take --engine torchvision ({error})"
        ) from error
