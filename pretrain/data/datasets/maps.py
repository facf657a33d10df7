"""Label maps: PNG files whose values are labels, or whose colors are."""

import io
import os
from collections.abc import Sequence
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


def read_map(file: Path, colors: Sequence[int] = ()) -> NDArray[np.integer]:
    """The stored values [H, W] of a label map: gray levels (1 to 16 bits), or indices of a palette.

    Args:
        colors: of a map whose colors are labels, sorted, each as ``0xRRGGBB``: a value is a place among them.

    Raises:
        UserError: names a file that is missing, broken, no PNG, or of several channels or another color.
    """
    if not file.exists():
        raise UserError(f"no label map {file}")
    try:
        data = read_file(os.fsencode(file))
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_MPX * 1e6:
                told = f"{image.width} x {image.height} pixels, more than {MAX_MPX:g} million"
                raise BrokenImage(f"declares {told}")
            step = GRAY_STEPS.get(str(image.tile[0][3]), 1)
            check_png(data)
            values = np.array(image.convert("RGB") if colors else image)
    except Exception as error:  # PIL raises many kinds
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read ({told})") from error
    if colors:
        red, green, blue = (values[..., channel].astype(np.uint32) for channel in range(3))
        packed, known = red << 16 | green << 8 | blue, np.array(colors, np.uint32)  # [H, W], [n]
        places = np.searchsorted(known, packed).clip(max=len(known) - 1)
        if (unknown := packed[known[places] != packed]).size:
            raise UserError(
                f"{file} holds the color #{unknown[0]:06x}, which labels.yaml does not name, nor a tool's own file"
            )
        return places
    if values.ndim != 2:
        told = f"it has {values.shape[-1]} channels; say in labels.yaml what its colors mean"
        raise UserError(f"{file} is no label map: {told}")
    return values.astype(np.uint8) if values.dtype == bool else values // step if step > 1 else values


def nearest(labels: NDArray[np.int32], rows_px: int, columns_px: int | None = None) -> Tensor:
    """[H, W] -> int32 [rows, columns (or rows)]: the label at the center of each new pixel."""
    size = rows_px, columns_px or rows_px
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n, side in zip(labels.shape, size))
    return torch.from_numpy(labels[rows[:, None], columns[None]])
