"""A folder of images, nested or flat, as a source of pre-training images."""

import os
from pathlib import Path

from pretrain.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_images(root: str | Path) -> list[str]:
    """Paths of all images under ``root``, relative to it, sorted: the same on every machine and rank.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not str(root):
        raise UserError("data.root: no folder of images is given")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.root: no folder {root}")
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        relative = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(relative, n)) for n in names if n.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"data.root: no image ({', '.join(SUFFIXES)}) in {root}")
    return sorted(found)
