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

from pretrain.views.records import Record

LOCAL_RULES = ("image", "inside", "same")  # local crops lie anywhere in the image, in a global crop each, or on it
TRIES = 10  # torchvision's, before it falls back to a central crop
SCALES = ("beta", "uniform", "constant")
REFERENCES = ("crops", "image")
SURROUNDED = ("all", "globals")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CropRule:
    """How boxes are drawn: torchvision's RandomResizedCrop with DINOv2's scales, and a flip.

    With a ``local_rule`` other than ``image``, local crop l belongs to the global crop l mod G, its parent.
    """

    n_global: int = 2
    n_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # ``inside``: of its parent's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    plain_globals: bool = False  # no flips and colours of the global crops
    local_rule: str = "image"
    local_inside: float = 0.9  # ``inside``: least share of a local crop within its parent


@dataclass(frozen=True)
class PositionRule:
    """Which positions a view reads: those of its crop, after position and scale augmentation t_s (paper 3.2.2; METHOD.md 3)."""

    tied: bool = True  # False: those of a whole image, unflipped, whatever the crop, as at inference
    enabled: bool = True
    scale: str = "beta"  # distribution of s
    beta: tuple[float, float] = (2.0, 5.0)
    s_min: float = 0.2
    s_max: float = 1.0
    reference: str = "crops"  # what s scales: the rectangle around the crops, or the whole image
    surround: str = "all"  # which crops the rectangle surrounds


@dataclass(frozen=True)
class Views(Record):
    """The views of a batch.

    Attributes:
        boxes: [B, V, 4] in image units; the ``n_global`` global views first.
        flips: [B, V] bool, horizontal.
        position_boxes: [B, V, 4] after position and scale augmentation, in units of the field.
        n_global: number of global views.
        tied: positions are those of the crops; else position boxes are all the whole field, and a flip does not mirror them.
    """

    boxes: Tensor
    flips: Tensor
    position_boxes: Tensor
    n_global: int
    tied: bool = True

    def of(self, views: slice) -> tuple[Tensor, Tensor]:
        """Position boxes [n * B, 4] and flips of positions [n * B] of some views, view-major, as the crops are collated."""
        flips = self.flips[:, views].T.flatten()
        return self.position_boxes[:, views].transpose(0, 1).flatten(0, 1), flips if self.tied else torch.zeros_like(flips)

    @property
    def globals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the global views."""
        return self.of(slice(0, self.n_global))

    @property
    def locals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the local views."""
        return self.of(slice(self.n_global, None))

    def to(self, device: torch.device) -> "Views":
        """The same views on another device."""
        return self.moved(device)


def draw_crops(sizes_px: Array, scales: Array, ratio: tuple[float, float], u: Array) -> Array:
    """Crops (left, top, right, bottom) in whole pixels, [B, V, 4], distributed as torchvision's RandomResizedCrop.

    Ten tries of an area and a log-uniform aspect ratio; the first that fits the image stands, at a uniform place. Where none does:
    the largest central crop of an allowed ratio.

    Args:
        sizes_px: [B, 2], height and width of each image.
        scales: [V, 2], from and to which share of an image's area.
        u: [B, V, 22] uniform numbers in [0, 1).
    """
    height, width = sizes_px[:, 0, None], sizes_px[:, 1, None]  # [B, 1]
    share = scales[:, :1] + (scales[:, 1:] - scales[:, :1]) * u[..., :TRIES]  # [B, V, 10]
    area = (height * width)[..., None] * share
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[..., TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    images, views = np.ogrid[: len(sizes_px), : len(scales)]
    of_first = images, views, fits.argmax(-1)
    w, h, drawn = w[of_first], h[of_first], fits[of_first]  # [B, V]
    left, top = np.floor(u[..., -2] * (width - w + 1)), np.floor(u[..., -1] * (height - h + 1))
    crops = np.stack([left, top, left + w, top + h], -1)
    if not drawn.all():
        for image, view in np.argwhere(~drawn):
            crops[image, view] = central_crop(int(sizes_px[image, 0]), int(sizes_px[image, 1]), ratio)
    return crops


def central_crop(height_px: int, width_px: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's fallback: the largest central crop of an allowed ratio, (left, top, right, bottom)."""
    in_ratio = width_px / height_px
    w, h = width_px, height_px
    if in_ratio < ratio[0]:
        h = max(1, min(round(width_px / ratio[0]), height_px))
    elif in_ratio > ratio[1]:
        w = max(1, min(round(height_px * ratio[1]), width_px))
    left, top = (width_px - w) // 2, (height_px - h) // 2
    return left, top, left + w, top + h


def draw_inside(parents: Array, sizes_px: Array, rule: CropRule, u: Array) -> Array:
    """Local crops (left, top, right, bottom) in whole pixels, [B, L, 4], each nearly inside its parent.

    Global-local intersection maximisation (PaKA): the area is a share of the parent's, the ratio is as ever, and at least
    ``local_inside`` of the crop lies within the parent, all of it in the image. **Ours**, without trying again: a crop may stick
    out by the same part of its width and of its height, at a uniform place, and is cut to its parent's sides if it is longer.

    Args:
        parents: [B, L, 4], each local crop's global one, in whole pixels.
        sizes_px: [B, 2], height and width of each image.
        u: [B, L, 22] uniform numbers, as for :func:`draw_crops`: of the ten tries it takes the first.
    """
    corner, parent = parents[..., :2], parents[..., 2:] - parents[..., :2]  # [B, L, 2], (x, y)
    share = rule.local_scale[0] + (rule.local_scale[1] - rule.local_scale[0]) * u[..., 0]
    aspect = np.exp(math.log(rule.ratio[0]) + math.log(rule.ratio[1] / rule.ratio[0]) * u[..., TRIES])
    area = parent.prod(-1) * share
    size = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], -1)
    size = np.rint(size).clip(1, parent)
    slack = np.floor(size * (1 - math.sqrt(rule.local_inside)))  # sticking out by it on both axes leaves local_inside
    low = np.maximum(corner - slack, 0)
    high = np.minimum(corner + parent + slack, sizes_px[:, None, ::-1]) - size
    place = low + np.floor(u[..., -2:] * (high - low + 1))
    return np.concatenate([place, place + size], -1)


def draw_s(rule: PositionRule, rng: np.random.Generator) -> float:
    """The area s of the augmented region, |P| = 1: s_min + (s_max - s_min) * Beta(2, 5) by default (paper 4.3)."""
    if rule.scale == "constant":
        return rule.s_max
    share = rng.uniform() if rule.scale == "uniform" else rng.beta(*rule.beta)
    return rule.s_min + (rule.s_max - rule.s_min) * share


def draw_move(rule: PositionRule, rng: np.random.Generator) -> tuple[float, float, float]:
    """The draw of t_s for one image: the area s, and the place (x, y) of the scaled region among those possible, in [0, 1)."""
    s = draw_s(rule, rng)
    x, y = rng.random(2).tolist()
    return s, x, y


def augment_positions(boxes: Array, rule: PositionRule, n_global: int, moves: Array) -> Array:
    """t_s: shift and scale the boxes of each image together inside the field (paper 3.2.2).

    ``reference: crops``: the smallest rectangle A around the views is scaled by sqrt(s / |A|), at most to the field's size, then
    placed uniformly in [0, 1]^2. ``reference: image``: the whole image takes area s at a uniform place (Fig. 2's caption).

    Args:
        boxes: [B, V, 4] in image units, global views first.
        moves: [B, 3] of :func:`draw_move`.

    Returns:
        [B, V, 4] in units of the field. With ``surround: globals`` a local view may reach outside [0, 1]; the field's border is
        replicated there.
    """
    corners = boxes.reshape(*boxes.shape[:2], 2, 2)
    if rule.reference == "image":
        corner, size = np.zeros((len(boxes), 2)), np.ones((len(boxes), 2))
    else:
        around = corners if rule.surround == "all" else corners[:, :n_global]
        corner = around[:, :, 0].min(1)
        size = around[:, :, 1].max(1) - corner  # [B, 2]
    factor = np.minimum(np.sqrt(moves[:, :1] / size.prod(1, keepdims=True)), 1 / size.max(1, keepdims=True))  # [B, 1]
    place = moves[:, 1:] * np.maximum(1 - factor * size, 0)
    moved: Array = (corners - corner[:, None, None]) * factor[:, None, None] + place[:, None, None]
    return moved.reshape(boxes.shape)


def draw_views(sizes_px: Array, crops: CropRule, positions: PositionRule, rngs: Sequence[np.random.Generator]) -> Views:
    """All views of some images, each image from a generator of its own; every box is a whole number of pixels of its image.

    The augmentation of positions is drawn last: boxes and flips are the same with and without it. Every rule takes the same
    random numbers: one that concerns the local crops, or the positions, changes nothing else.

    Args:
        sizes_px: [B, 2], height and width of each image.
        rngs: one an image.
    """
    n_views = crops.n_global + crops.n_local
    u = np.stack([rng.random((n_views, 2 * TRIES + 3)) for rng in rngs])  # [B, V, 23]
    flips = u[..., 0] < crops.flip_p
    if crops.plain_globals:
        flips[:, : crops.n_global] = False
    boxes = draw_boxes(sizes_px, crops, u[..., 1:]) / sizes_px[:, None, [1, 0, 1, 0]]
    position_boxes = boxes
    if not positions.tied:
        position_boxes = np.broadcast_to([0.0, 0.0, 1.0, 1.0], boxes.shape)
    elif positions.enabled:
        moves = np.array([draw_move(positions, rng) for rng in rngs])
        position_boxes = augment_positions(boxes, positions, crops.n_global, moves)
    return Views(
        torch.from_numpy(boxes.astype(np.float32)),
        torch.from_numpy(flips),
        torch.from_numpy(position_boxes.astype(np.float32)),
        crops.n_global,
        positions.tied,
    )


def parents(n_global: int, n_local: int, device: torch.device | str = "cpu") -> Tensor:
    """[L] int64: the global crop that each local one is drawn in or on (``local_rule``), its parent."""
    return torch.arange(n_local, device=device) % n_global


def draw_boxes(sizes_px: Array, rule: CropRule, u: Array) -> Array:
    """Global crops, then local ones as ``rule.local_rule`` says, [B, V, 4] in whole pixels; ``u`` is [B, V, 22]."""
    n_global = rule.n_global
    if rule.local_rule == "image":
        scales = np.array([rule.global_scale] * n_global + [rule.local_scale] * rule.n_local)
        return draw_crops(sizes_px, scales, rule.ratio, u)
    global_crops = draw_crops(sizes_px, np.array([rule.global_scale] * n_global), rule.ratio, u[:, :n_global])
    own = global_crops[:, parents(n_global, rule.n_local).numpy()]
    local_crops = own if rule.local_rule == "same" else draw_inside(own, sizes_px, rule, u[:, n_global:])
    return np.concatenate([global_crops, local_crops], 1)


def pixel_boxes(boxes: Tensor, height_px: int | Tensor, width_px: int | Tensor) -> Tensor:
    """Boxes [..., 4] in image units as the whole pixels (left, top, right, bottom) that they were drawn from, as floats.

    Sizes are numbers, or tensors that broadcast against ``boxes[..., 0]``. float32 holds every box of an image below 2^22 px.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([x0 * width_px, y0 * height_px, x1 * width_px, y1 * height_px], -1).round()
