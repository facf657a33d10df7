"""A file to pixels."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class BrokenImage(Exception):
    """The file is no image that can be read; ``args[0]`` says why."""


def decode(path: str | Path) -> Tensor:
    """An image file as uint8 RGB [3, H, W], upright by its EXIF orientation.

    Raises:
        BrokenImage: whatever is wrong with the file.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, ValueError, DecompressionBombError, struct.error
        raise BrokenImage(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
