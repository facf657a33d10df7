"""Where the views of an image are: one description for pixels, positions and masks (METHOD.md 1 and 3).

Boxes are (x0, y0, x1, y1) in image units [0, 1]. A view has two: its box in the image, which crops the
pixels, and its position box, which crops the position field. Without position and scale augmentation both are
equal.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from pretrain.settings import Settings, rising, setting
from pretrain.views.records import Record

TRIES = 10  # as torchvision, which then falls back to a central crop

Share = Annotated[float, Field(ge=1e-6, le=1)]
Aspect = Annotated[float, Field(ge=1e-3, le=1e3)]
Positive = Annotated[float, Field(ge=1e-6)]

Array = NDArray[np.float64]


class CropSettings(Settings):
    """Where the crops of an image lie: torchvision's RandomResizedCrop with DINOv2's scales, and a flip. One
    geometry for pixels and positions (METHOD.md 1).

    With a ``local_rule`` other than ``image``, local crop l belongs to the global crop l mod G, its parent.
    """

    n_global: int = setting(2, "global crops of an image", "sec. 4.1", ge=1, le=64)
    n_local: int = setting(8, "local crops of an image", "sec. 4.1", ge=0, le=1024)
    global_px: int = setting(224, "side of a global crop in pixels", "footnote 4", ge=1, le=65536)
    local_px: int = setting(96, "side of a local crop in pixels", "footnote 4", ge=1, le=65536)
    global_scale: tuple[Share, Share] = setting(
        (0.32, 1.0), "share of the image's area, from and to", "DINOv2"
    )
    local_scale: tuple[Share, Share] = setting(
        (0.05, 0.32),
        "share of the image's area, from and to; with local_rule=inside of the parent's area",
        "DINOv2",
    )
    ratio: tuple[Aspect, Aspect] = setting((3 / 4, 4 / 3), "aspect ratio, from and to", "DINOv2")
    flip_p: float = setting(0.5, "probability of a horizontal flip", "DINOv2", ge=0, le=1)
    plain_globals: bool = setting(
        False,
        "global crops are not flipped and keep their colors (PaKA: the teacher sees no augmentation)",
        "DINOv2",
    )
    local_rule: Literal["image", "inside", "same"] = setting(
        "image",
        "local crops lie: image (anywhere) | inside (in a global crop each; PaKA) | same (on it; DINOv3's Gram)",
        "DINOv2",
    )
    local_inside: float = setting(
        0.9, "least share of a local crop within its parent, with local_rule=inside", "PaKA", ge=0, le=1
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        rising("crops", self, "global_scale", "local_scale", "ratio")
        return self


class PositionSettings(Settings):
    """Positions: how the backbone encodes them, and which ones a view reads (paper 3.2; METHOD.md 2 and 3)."""

    encoding: Literal["field", "standard", "rotary"] = setting(
        "field",
        "field | standard (one learned grid for every view, as the DINOv2 baseline) | rotary (DINOv3)",
        "sec. 3.2.1",
    )
    grid: int = setting(50, "side of the field, or of the learned grid", "Table 6", ge=2, le=4096)
    interpolation: Literal["bicubic", "bilinear", "dinov2", "bicubic_antialias"] = setting(
        "bicubic",
        "field: bicubic (Keys, a = -0.5) | bilinear; standard: dinov2 | bicubic | bicubic_antialias",
    )
    augment: bool = setting(
        True, "position and scale augmentation t_s, of positions that follow crops", "sec. 3.2.2"
    )
    scale: Literal["beta", "uniform", "constant"] = setting("beta", "distribution of the area s", "Table 6")
    beta: tuple[Positive, Positive] = setting((2.0, 5.0), "parameters of the beta distribution", "Table 6")
    s_min: float = setting(0.2, "smallest s", "Table 6", ge=1e-6, le=1)
    s_max: float = setting(1.0, "largest s", "Table 6", ge=1e-6, le=1)
    reference: Literal["crops", "image"] = setting(
        "crops",
        "what s scales: crops (the rectangle around them, as the formula) | image (as Fig. 2's caption)",
        "sec. 3.2.2",
    )
    surround: Literal["all", "globals"] = setting("all", "which crops the rectangle surrounds")
    tied: bool = setting(
        True, "rotary positions are those of the crop; else each crop spans the image (DINOv3)"
    )
    rescale: float = setting(
        2.0,
        "training multiplies untied rotary positions by a factor from 1 / this to this",
        "DINOv3",
        ge=1,
        le=1e3,
    )
    init: Literal["normal", "smooth", "sincos"] = setting(
        "normal",
        "start of a new field: normal (white noise) | smooth (coarse noise, interpolated) | sincos (waves)",
    )
    init_grid: int = setting(7, "side of the coarse noise of init=smooth", ge=2, le=4096)
    init_scale: float = setting(1.0, "amplitude of the waves of init=sincos; MAE's table has 1", gt=0, le=1e3)
    learnable: bool = setting(True, "whether the field learns")

    @property
    def follows_crops(self) -> bool:
        """Whether a view's positions are those of its crop; a learned grid ignores crops."""
        return self.encoding == "field" or (self.encoding == "rotary" and self.tied)

    @property
    def is_augmented(self) -> bool:
        """Whether position boxes are moved."""
        return self.augment and self.follows_crops

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.s_min > self.s_max:
            raise ValueError(f"positions.s_min={self.s_min} is more than positions.s_max={self.s_max}")
        if self.init == "smooth" and self.init_grid > self.grid:
            more = f"positions.init_grid={self.init_grid} is more than positions.grid={self.grid}"
            raise ValueError(f"{more}: coarse noise has fewer samples; lower it")
        of_field = {"init": self.init != "normal", "learnable": not self.learnable}
        idle = {
            "augment": self.augment and not self.follows_crops,
            "tied": not self.tied and self.encoding != "rotary",
        }
        idle |= {key: is_set and self.encoding != "field" for key, is_set in of_field.items()}
        for key in (key for key, is_idle in idle.items() if is_idle):
            untied = ", tied=false" if key == "augment" and self.encoding == "rotary" else ""
            told = f"positions.{key} has no effect with positions.encoding={self.encoding}{untied}"
            warnings.warn(f"config: {told}", stacklevel=2)
        return self


@dataclass(frozen=True)
class Views(Record):
    """The views of a batch.

    Attributes:
        boxes: [B, V, 4] in image units; the ``n_global`` global views first.
        flips: [B, V] bool, horizontal.
        position_boxes: [B, V, 4] after position and scale augmentation, in units of the field.
        n_global: number of global views.
        tied: positions follow the crops; else each position box is the whole field, and flips do not mirror
            it.
    """

    boxes: Tensor
    flips: Tensor
    position_boxes: Tensor
    n_global: int
    tied: bool = True

    def of(self, views: slice) -> tuple[Tensor, Tensor]:
        """Position boxes [n * B, 4] and flips of positions [n * B] of some views, view-major as crops."""
        flips, boxes = (x[:, views].transpose(0, 1).flatten(0, 1) for x in (self.flips, self.position_boxes))
        return boxes, flips if self.tied else torch.zeros_like(flips)

    @property
    def globals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the global views."""
        return self.of(slice(0, self.n_global))

    @property
    def locals(self) -> tuple[Tensor, Tensor]:
        """:meth:`of` the local views."""
        return self.of(slice(self.n_global, None))


def draw_crops(sizes_px: Array, scales: Array, ratio: tuple[float, float], u: Array) -> Array:
    """Crops (left, top, right, bottom) in whole pixels, [B, V, 4], distributed as torchvision's
    RandomResizedCrop.

    Each of ten tries draws an area and a log-uniform aspect ratio. The first one that fits the image is
    taken, at a uniform place. If none fits, it is the largest central crop of an allowed ratio.

    Args:
        sizes_px: [B, 2], height and width of each image.
        scales: [V, 2], smallest and largest share of an image's area.
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
    for image, view in np.argwhere(~drawn):
        crops[image, view] = central_crop(int(sizes_px[image, 0]), int(sizes_px[image, 1]), ratio)
    return crops


def central_crop(height_px: int, width_px: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's fallback, the largest central crop of an allowed ratio: (left, top, right, bottom)."""
    h = max(1, min(round(width_px / ratio[0]), height_px))
    w = max(1, min(round(height_px * ratio[1]), width_px))
    left, top = (width_px - w) // 2, (height_px - h) // 2
    return left, top, left + w, top + h


def draw_inside(parents: Array, sizes_px: Array, rule: CropSettings, u: Array) -> Array:
    """Local crops (left, top, right, bottom) in whole pixels, [B, L, 4], each nearly inside its parent.

    Global-local intersection maximization (PaKA): the area is a share of the parent's, the ratio is drawn as
    usual, and at least ``local_inside`` of the crop lies within the parent, all of it in the image. **Ours**,
    without further tries: a crop may stick out by the same part of its width and its height, at a uniform
    place. Sides longer than the parent's are cut to it.

    Args:
        parents: [B, L, 4], the global crop of each local one, in whole pixels.
        sizes_px: [B, 2], height and width of each image.
        u: [B, L, 22] uniform numbers as for :func:`draw_crops`; the first of the ten tries is used.
    """
    corner, parent = parents[..., :2], parents[..., 2:] - parents[..., :2]  # [B, L, 2], (x, y)
    share = rule.local_scale[0] + (rule.local_scale[1] - rule.local_scale[0]) * u[..., 0]
    aspect = np.exp(math.log(rule.ratio[0]) + math.log(rule.ratio[1] / rule.ratio[0]) * u[..., TRIES])
    area = parent.prod(-1) * share
    size = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], -1))).clip(1, parent)
    # sticking out by it on both axes leaves local_inside
    slack = np.floor(size * (1 - math.sqrt(rule.local_inside)))
    low = np.maximum(corner - slack, 0)
    high = np.minimum(corner + parent + slack, sizes_px[:, None, ::-1]) - size
    place = low + np.floor(u[..., -2:] * (high - low + 1))
    return np.concatenate([place, place + size], -1)


def draw_s(rule: PositionSettings, rng: np.random.Generator) -> float:
    """The area s of the augmented region, |P| = 1: s_min + (s_max - s_min) * Beta(2, 5) (paper 4.3)."""
    if rule.scale == "constant":
        return rule.s_max
    share = rng.uniform() if rule.scale == "uniform" else rng.beta(*rule.beta)
    return rule.s_min + (rule.s_max - rule.s_min) * share


def draw_move(rule: PositionSettings, rng: np.random.Generator) -> tuple[float, float, float]:
    """The draw of t_s for one image: the area s, and the region's place (x, y), in [0, 1) of all."""
    return draw_s(rule, rng), rng.random(), rng.random()


def augment_positions(boxes: Array, rule: PositionSettings, n_global: int, moves: Array) -> Array:
    """t_s: shift and scale the boxes of each image together inside the field (paper 3.2.2).

    ``reference: crops``: the smallest rectangle A around the views is scaled by sqrt(s / |A|), at most to the
    field's size, then placed uniformly in [0, 1]^2. ``reference: image``: the whole image takes area s at a
    uniform place (Fig. 2's caption).

    Args:
        boxes: [B, V, 4] in image units, global views first.
        moves: [B, 3] of :func:`draw_move`.

    Returns:
        [B, V, 4] in units of the field. With ``surround: globals`` a local view may extend beyond [0, 1],
        where the field's border is replicated.
    """
    corners = boxes.reshape(*boxes.shape[:2], 2, 2)
    around = corners if rule.surround == "all" else corners[:, :n_global]
    if rule.reference == "image":
        around = np.broadcast_to([[0.0, 0.0], [1.0, 1.0]], corners.shape)
    corner = around[:, :, 0].min(1)
    size = around[:, :, 1].max(1) - corner  # [B, 2]
    # [B, 1]
    factor = np.minimum(np.sqrt(moves[:, :1] / size.prod(1, keepdims=True)), 1 / size.max(1, keepdims=True))
    place = moves[:, 1:] * np.maximum(1 - factor * size, 0)
    moved: Array = (corners - corner[:, None, None]) * factor[:, None, None] + place[:, None, None]
    return moved.reshape(boxes.shape)


def draw_views(
    sizes_px: Array,
    crops: CropSettings,
    positions: PositionSettings,
    rngs: Sequence[np.random.Generator],
    tied: bool = True,
) -> Views:
    """All views of some images, each image from its own generator, in whole pixels of the image.

    The augmentation of positions is drawn last, so that boxes and flips are the same with and without it.
    Every rule takes the same random numbers: a rule for local crops, or for positions, changes nothing else.

    Args:
        sizes_px: [B, 2], height and width of each image.
        rngs: one for each image.
        tied: as of :class:`Views`.
    """
    n_views = crops.n_global + crops.n_local
    u = np.stack([rng.random((n_views, 2 * TRIES + 3)) for rng in rngs])  # [B, V, 23]
    flips = u[..., 0] < crops.flip_p
    if crops.plain_globals:
        flips[:, : crops.n_global] = False
    boxes = draw_boxes(sizes_px, crops, u[..., 1:]) / sizes_px[:, None, [1, 0, 1, 0]]
    position_boxes = boxes
    if not tied:
        position_boxes = np.broadcast_to([0.0, 0.0, 1.0, 1.0], boxes.shape)
    elif positions.is_augmented:
        moves = np.array([draw_move(positions, rng) for rng in rngs])
        position_boxes = augment_positions(boxes, positions, crops.n_global, moves)
    return Views(
        torch.from_numpy(boxes.astype(np.float32)),
        torch.from_numpy(flips),
        torch.from_numpy(position_boxes.astype(np.float32)),
        crops.n_global,
        tied,
    )


def parents(n_global: int, n_local: int, device: torch.device | str = "cpu") -> Tensor:
    """[L] int64: of each local crop the global one in or on which it is drawn (``local_rule``)."""
    return torch.arange(n_local, device=device) % n_global


def draw_boxes(sizes_px: Array, rule: CropSettings, u: Array) -> Array:
    """Global crops, then local ones by ``rule.local_rule``, [B, V, 4] in pixels; ``u`` is [B, V, 22]."""
    n_global = rule.n_global
    if rule.local_rule == "image":
        scales = np.array([rule.global_scale] * n_global + [rule.local_scale] * rule.n_local)
        return draw_crops(sizes_px, scales, rule.ratio, u)
    global_crops = draw_crops(sizes_px, np.array([rule.global_scale] * n_global), rule.ratio, u[:, :n_global])
    own = global_crops[:, parents(n_global, rule.n_local).numpy()]
    local_crops = own if rule.local_rule == "same" else draw_inside(own, sizes_px, rule, u[:, n_global:])
    return np.concatenate([global_crops, local_crops], 1)


def pixel_boxes(boxes: Tensor, height_px: int | Tensor, width_px: int | Tensor) -> Tensor:
    """Boxes [..., 4] in image units as whole pixels (left, top, right, bottom), in floats.

    Sizes are numbers, or tensors that broadcast against ``boxes[..., 0]``. float32 holds every box of an
    image below 2^22 px.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([x0 * width_px, y0 * height_px, x1 * width_px, y1 * height_px], -1).round()
