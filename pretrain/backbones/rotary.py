"""Rotary positions of patches (DINOv3: Simeoni et al., 2025; RoFormer, Su et al., 2021), tied to crops or not.

A patch's place on an axis, in [-1, 1] over the whole image, times 2 pi and a frequency, is an angle by which pairs of its
query's and key's channels are turned; their product then depends on the distance of two patches alone. Of a head of width d
the pairs are (i, i + d / 2), i = 0 ... d / 2 - 1: first d / 4 frequencies for y, then the same for x. Only patches are
turned: [CLS], registers and patches without a position have the angle 0.

Tied to crops (ours): a patch stands where the vector field of the paper (3.2.1) would be read, the center of the patch in
its view's position box, mirrored with a flip.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.backbones.position import patch_centers
from pretrain.precision import at_least_float32

BASE = 100.0  # frequencies fall from 1 to nearly 1 / BASE


class Rotation(NamedTuple):
    """The angles of a sequence's tokens, at least float32, the same for all heads and layers."""

    cos: Tensor  # [B or 1, N, d / 2]
    sin: Tensor  # [B or 1, N, d / 2]


def frequencies(
    head_dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``BASE^(-4i / d)``, i = 0 ... d / 4 - 1, of a head of width d."""
    exponents = torch.arange(head_dim // 4, device=device, dtype=dtype) * (4 / head_dim)
    return BASE**-exponents


def rotation(
    boxes: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    flips: Tensor | None = None,
    position_mask: Tensor | None = None,
    rescale: Tensor | float = 1.0,
) -> Rotation:
    """The angles of views' patches.

    Args:
        boxes: [V, 4] (x0, y0, x1, y1), position boxes in image units: [0, 0, 1, 1] is the whole image.
        grid: (h, w), patches a view.
        flips: [V] bool, horizontal flips; None: no view is flipped.
        position_mask: [V, h * w] bool, patches without a position.
        rescale: factor on the places, about the image's center.

    Returns:
        of [V, h * w, head_dim / 2], row-major.
    """
    boxes, (height, width) = at_least_float32(boxes), grid
    x = patch_centers(boxes[:, 0], boxes[:, 2], width, flips)
    y = patch_centers(boxes[:, 1], boxes[:, 3], height)
    scale = 2 * math.pi * rescale * frequencies(head_dim, boxes.device, boxes.dtype)  # [d / 4]
    # Sines of each axis alone; the grid only repeats them. [V, h or w, d / 4]
    of_axis = [(2 * places - 1).unsqueeze(-1) * scale for places in (y, x)]
    parts = []
    for function, masked in ((torch.cos, 1.0), (torch.sin, 0.0)):
        of_y, of_x = (function(angles) for angles in of_axis)
        both = of_y.unsqueeze(2).expand(-1, -1, width, -1), of_x.unsqueeze(1).expand(-1, height, -1, -1)
        values = torch.cat(both, -1).flatten(1, 2)  # [V, h * w, d / 2]
        if position_mask is not None:
            values = values.masked_fill(position_mask.unsqueeze(-1), masked)
        parts.append(values)
    return Rotation(*parts)


def of_visible(patches: Rotation, visible: Tensor) -> Rotation:
    """The angles of some patches, ``visible`` [B, n] long, in this order."""
    index = visible.unsqueeze(-1).expand(-1, -1, patches.cos.shape[-1])
    cos, sin = (t.expand(len(visible), -1, -1).gather(1, index) for t in patches)
    return Rotation(cos, sin)


def behind_special(patches: Rotation, n_special: int) -> Rotation:
    """The same with ``n_special`` tokens before the first patch, which are not turned."""
    cos, sin = (F.pad(t, (0, 0, n_special, 0), value=float(fill)) for t, fill in zip(patches, (1, 0)))
    return Rotation(cos, sin)


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Turn queries or keys, in at least float32.

    Args:
        x: [B, N, ..., d].

    Returns:
        the same shape and dtype.
    """
    shape = (*angles.cos.shape[:2], *[1] * (x.ndim - 3), angles.cos.shape[2])
    cos, sin = (t.view(shape) for t in angles)
    first, second = at_least_float32(x).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
