"""Label maps: PNG files whose values (not colors) are labels."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import PngImagePlugin
from torch import Tensor

from pretrain.data.decode import BrokenImage, check_png
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError

UNKNOWN = -1  # in a table of labels: the set has no such value
MAX_MPX = 200.0  # million pixels, as of images
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # PIL spreads gray of 2 and 4 bits over 0 .. 255


def read_map(file: Path) -> NDArray[np.integer]:
    """The stored values [H, W] of a label map: gray levels (1 to 16 bits), or indices of a palette.

    Raises:
        UserError: names a file that is missing, broken, no PNG, or of several channels.
    """
    if not file.exists():
        raise UserError(f"no label map {file}")
    try:
        data = read_file(os.fsencode(file))
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_MPX * 1e6:
                raise BrokenImage(
                    f"declares {image.width} x {image.height} pixels, more than {MAX_MPX:g} million"
                )
            step = GRAY_STEPS.get(str(image.tile[0][3]), 1)
            check_png(data)
            values = np.array(image)
    except Exception as error:  # PIL raises many kinds
        raise UserError(
            f"{file} cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    if values.ndim != 2:
        raise UserError(f"{file} is no label map: it has {values.shape[-1]} channels")
    return values.astype(np.uint8) if values.dtype == bool else values // step if step > 1 else values


def nearest(labels: NDArray[np.int32], rows_px: int, columns_px: int | None = None) -> Tensor:
    """[H, W] -> int32 [rows, columns], square without ``columns_px``: the label at the center of each new
    pixel."""
    size = rows_px, columns_px or rows_px
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n, side in zip(labels.shape, size))
    return torch.from_numpy(labels[rows[:, None], columns[None]])
