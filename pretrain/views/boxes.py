"""Where the views of an image are: the one description that pixels, positions and masks read (METHOD.md 1 and 3).

Boxes are (x0, y0, x1, y1) in image units [0, 1]. A view has two: its box in the image, which crops the pixels, and its position
box, which crops the position field. Without position and scale augmentation the two are the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALES = ("beta", "uniform", "constant")
REFERENCES = ("crops", "image")
SURROUNDED = ("all", "globals")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CropRule:
    """How boxes are drawn: torchvision's RandomResizedCrop with DINOv2's scales, and a flip."""

    n_global: int = 2
    n_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5


@dataclass(frozen=True)
class PositionRule:
    """Position and scale augmentation t_s (paper 3.2.2; METHOD.md 3)."""

    enabled: bool = True
    scale: str = "beta"  # distribution of s
    beta: tuple[float, float] = (2.0, 5.0)
    s_min: float = 0.2
    s_max: float = 1.0
    reference: str = "crops"  # what s scales: the rectangle around the crops, or the whole image
    surround: str = "all"  # which crops the rectangle surrounds


@dataclass(frozen=True)
class Views:
    """The views of a batch.

    Attributes:
        boxes: [B, V, 4] in image units; the ``n_global`` global views first.
        flips: [B, V] bool, horizontal.
        position_boxes: [B, V, 4] after position and scale augmentation, in units of the field.
        n_global: number of global views.
    """

    boxes: Tensor
    flips: Tensor
    position_boxes: Tensor
    n_global: int

    def of(self, views: slice) -> tuple[Tensor, Tensor]:
        """Position boxes [n * B, 4] and flips [n * B] of some views, view-major, as the crops are collated."""
        return self.position_boxes[:, views].transpose(0, 1).flatten(0, 1), self.flips[:, views].T.flatten()

    @property
    def globals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the global views."""
        return self.of(slice(0, self.n_global))

    @property
    def locals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the local views."""
        return self.of(slice(self.n_global, None))

    @staticmethod
    def stack(views: Sequence["Views"]) -> "Views":
        """Views of single images to those of their batch."""
        return Views(
            torch.cat([v.boxes for v in views]),
            torch.cat([v.flips for v in views]),
            torch.cat([v.position_boxes for v in views]),
            views[0].n_global,
        )

    def to(self, device: torch.device) -> "Views":
        """The same views on another device."""
        boxes, flips, position_boxes = (t.to(device, non_blocking=True) for t in (self.boxes, self.flips, self.position_boxes))
        return Views(boxes, flips, position_boxes, self.n_global)


def draw_crop(
    height_px: int, width_px: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """One crop (left, top, right, bottom) in whole pixels, distributed as torchvision's RandomResizedCrop.

    Ten tries of an area and a log-uniform aspect ratio, then the largest central crop of an allowed ratio.
    """
    area = height_px * width_px
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width_px and 0 < h <= height_px:
            top, left = int(rng.integers(0, height_px - h + 1)), int(rng.integers(0, width_px - w + 1))
            return left, top, left + w, top + h
    in_ratio = width_px / height_px
    if in_ratio < ratio[0]:
        w, h = width_px, round(width_px / ratio[0])
    elif in_ratio > ratio[1]:
        w, h = round(height_px * ratio[1]), height_px
    else:
        w, h = width_px, height_px
    w, h = max(1, min(w, width_px)), max(1, min(h, height_px))
    left, top = (width_px - w) // 2, (height_px - h) // 2
    return left, top, left + w, top + h


def draw_s(rule: PositionRule, rng: np.random.Generator) -> float:
    """The area s of the augmented region, |P| = 1: s_min + (s_max - s_min) * Beta(2, 5) by default (paper 4.3)."""
    if rule.scale == "constant":
        return rule.s_max
    share = rng.uniform() if rule.scale == "uniform" else rng.beta(*rule.beta)
    return rule.s_min + (rule.s_max - rule.s_min) * share


def augment_positions(boxes: Array, rule: PositionRule, n_global: int, rng: np.random.Generator) -> Array:
    """t_s: shift and scale the boxes of one image together inside the field (paper 3.2.2).

    ``reference: crops``: the smallest rectangle A around the views is scaled by sqrt(s / |A|), at most to the field's size, then
    placed uniformly in [0, 1]^2. ``reference: image``: the whole image takes area s at a uniform place (Fig. 2's caption).

    Args:
        boxes: [V, 4] in image units, global views first.

    Returns:
        [V, 4] in units of the field. With ``surround: globals`` a local view may reach outside [0, 1]; the field's border is
        replicated there.
    """
    if not rule.enabled:
        return boxes
    s = draw_s(rule, rng)
    if rule.reference == "image":
        corner, size = np.zeros(2), np.ones(2)
    else:
        around = boxes if rule.surround == "all" else boxes[:n_global]
        corner = around[:, :2].min(0)
        size = around[:, 2:].max(0) - corner
    factor = min(math.sqrt(s / size.prod()), 1 / size[0], 1 / size[1])
    place = rng.uniform(size=2) * np.maximum(1 - factor * size, 0)
    moved: Array = (boxes.reshape(-1, 2, 2) - corner) * factor + place
    return moved.reshape(-1, 4)


def draw_views(height_px: int, width_px: int, crops: CropRule, positions: PositionRule, rng: np.random.Generator) -> Views:
    """All views of one image, B = 1; every box is a whole number of pixels of the image."""
    scales = [crops.global_scale] * crops.n_global + [crops.local_scale] * crops.n_local
    pixels = np.array([draw_crop(height_px, width_px, scale, crops.ratio, rng) for scale in scales], dtype=np.float64)
    boxes = pixels / np.array([width_px, height_px, width_px, height_px])
    flips = rng.uniform(size=len(scales)) < crops.flip_p
    position_boxes = augment_positions(boxes, positions, crops.n_global, rng)
    return Views(
        torch.from_numpy(boxes).float()[None],
        torch.from_numpy(flips)[None],
        torch.from_numpy(position_boxes).float()[None],
        crops.n_global,
    )


def pixel_box(box: Tensor, height_px: int, width_px: int) -> tuple[int, int, int, int]:
    """A box [4] in image units as the whole pixels (left, top, right, bottom) that it was drawn from."""
    x0, y0, x1, y1 = box.double().tolist()
    return round(x0 * width_px), round(y0 * height_px), round(x1 * width_px), round(y1 * height_px)
