"""Which patches of the student's global crops lose their content or their position (paper 3.3, METHOD.md 4).

Each global crop is content-masked, position-masked or unmasked, never two of these. Content masks are boxes,
as DINOv2's; position masks are crosses: full row and column bands around drawn centers. MAE's masks are
patches at random.

While it is drawn, a mask is a Python integer whose bit ``row * width + column`` is a patch. Shifting, uniting
and counting bits takes a fraction of a microsecond; with 14 x 14 arrays it takes several. Single numbers of
NumPy's generators are as slow, so Python's are used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from pretrain.settings import Settings, rising, setting
from pretrain.views.records import Record

Ratio = Annotated[float, Field(ge=0, le=1 - 1e-9)]
Shape = Literal["box", "cross", "random"]
SHAPES = get_args(Shape)

Mask = NDArray[np.bool_]
Numbers = Random | np.random.Generator  # either has random(), uniform in [0, 1)


class MaskSettings(Settings):
    """Which global crops lose content or positions, and in which shapes (paper 3.3)."""

    content_share: float = setting(0.5, "share of the global crops that lose content", "Table 6", ge=0, le=1)
    position_share: float = setting(
        0.5, "share of the global crops that lose positions", "Table 6", ge=0, le=1
    )
    ratio: tuple[Ratio, Ratio] = setting((0.1, 0.5), "share of a crop's patches, from and to", "Table 6")
    content_shape: Shape = setting(
        "box", "of the content masks: box | cross | random (single patches; MAE)", "Table 6"
    )
    position_shape: Shape = setting("cross", "of the position masks: box | cross | random", "Table 6")
    kinds_over: Literal["batch", "image"] = setting(
        "batch", "kinds are drawn over: batch (as DINOv2's collate) | image (its crops alike; footnote 3)"
    )
    min_box_patches: int = setting(4, "smallest box in patches", "DINOv2", ge=1, le=65536)
    min_aspect: float = setting(0.3, "smallest aspect ratio of a box", "DINOv2", ge=1e-6, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        rising("masks", self, "ratio")
        if self.content_share + self.position_share > 1:
            raise ValueError("masks.content_share + masks.position_share is more than 1; lower one of them")
        return self


@dataclass(frozen=True)
class Masks(Record):
    """Masks of a batch's global crops, view-major; and as lists, so that a step knows all sizes beforehand.

    Attributes:
        content, position: [n_global * B, N] bool, never both set in one crop.
        content_index, position_index: [M] int64, the masked patches in the flattened [n_global * B * N],
            rising.
        content_weight, position_weight: [M] float32, 1 / masked patches of the patch's crop.
    """

    content: Tensor
    position: Tensor
    content_index: Tensor
    content_weight: Tensor
    position_index: Tensor
    position_weight: Tensor

    @staticmethod
    def of(content: Mask, position: Mask) -> "Masks":
        """From two arrays [n_global * B, N]."""
        values: list[NDArray[Any]] = [content, position]
        for mask in (content, position):
            counts = mask.sum(1)
            weights = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
            values += [np.flatnonzero(mask), weights]
        return Masks(*map(torch.from_numpy, values))


def box_mask(grid: tuple[int, int], target: int, rule: MaskSettings, rng: Numbers) -> Mask:
    """Mask of exactly ``target`` patches, [h, w]: DINOv2's boxes, then random single patches (ours)."""
    mask, left_over = 0, target
    while left_over > 0 and (box := _box(grid, mask, left_over, rule, rng)):
        mask |= box
        left_over = target - mask.bit_count()
    free = [place for place in range(grid[0] * grid[1]) if not mask >> place & 1] if left_over else []
    return _array(mask | _some(free, left_over, rng), grid)


def random_mask(grid: tuple[int, int], target: int, rng: Numbers) -> Mask:
    """Mask of exactly ``target`` patches, [h, w]; all sets of this size are equally likely (MAE, sec. 3)."""
    return _array(_some(range(grid[0] * grid[1]), target, rng), grid)


def _some(places: Sequence[int], n: int, rng: Numbers) -> int:
    """The bits of ``n`` places: each place draws a number, and the smallest win."""
    return sum(1 << place for place in sorted(places, key=lambda _: rng.random())[:n])


def _box(grid: tuple[int, int], mask: int, room: int, rule: MaskSettings, rng: Numbers) -> int:
    """The first of ten boxes that adds between 1 and ``room`` patches to the mask; 0 if none does."""
    height, width = grid
    smallest, log_aspect = min(rule.min_box_patches, room), math.log(rule.min_aspect)
    for _ in range(10):
        area = smallest + (room - smallest) * rng.random()
        aspect = math.exp(log_aspect * (1 - 2 * rng.random()))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
        box = _rectangle(h, w, width) << (top * width + left)
        if 0 < (box & ~mask).bit_count() <= room:
            return box
    return 0


def cross_mask(grid: tuple[int, int], target: int, rng: Numbers) -> Mask:
    """Cross-wise mask of exactly ``target`` patches, [h, w] (paper Fig. 4; the exact reading is ours,
    METHOD.md 4).

    Crosses are drawn until the target is reached: the full row band and column band of a random center. The
    bands are one patch thick, or two if the target is at least twice the cells of a cross one patch thick. To
    hit the target exactly, the new cells of the last cross that are farthest from its center are dropped. A
    random bit decides whether ties drop the first or the last cells in reading order, so that masks lean to
    no side: turned by 180 degrees, one choice is the other.
    """
    height, width = grid
    mask = 0
    cells = height + width - 1  # of a cross one patch thick
    thickness = 2 if min(grid) > 1 and target >= 2 * cells else 1
    while (room := target - mask.bit_count()) > 0:
        top, left = int(rng.random() * (height - thickness + 1)), int(rng.random() * (width - thickness + 1))
        rows = _rectangle(thickness, width, width) << (top * width)
        columns = _rectangle(height, thickness, width) << left
        new = (rows | columns) & ~mask
        if new.bit_count() > room:
            new = _nearest(new, room, (top, left), thickness, grid, keep_first=rng.random() < 0.5)
        mask |= new
    return _array(mask, grid)


def _nearest(
    cells: int, n: int, center: tuple[int, int], thickness: int, grid: tuple[int, int], *, keep_first: bool
) -> int:
    """The ``n`` cells nearest to a cross's center, by the larger distance of rows and columns.

    Ties keep the first cells in reading order, or the last.
    """
    inner, radius = 0, 0
    while (outer := cells & _square(center, radius, thickness, grid)).bit_count() < n:
        inner, radius = outer, radius + 1
    ring = outer & ~inner
    for _ in range(n - inner.bit_count()):
        bit = ring & -ring if keep_first else 1 << (ring.bit_length() - 1)
        inner |= bit
        ring ^= bit
    return inner


@cache
def _square(center: tuple[int, int], radius: int, thickness: int, grid: tuple[int, int]) -> int:
    """The bits within ``radius`` of a center of thickness x thickness cells."""
    top, left = (max(place - radius, 0) for place in center)
    bottom, right = (min(place + thickness + radius, side) for place, side in zip(center, grid))
    return _rectangle(bottom - top, right - left, grid[1]) << (top * grid[1] + left)


@cache
def _rectangle(height: int, width: int, grid_width: int) -> int:
    """The bits of a rectangle at the top left of a grid."""
    return sum(((1 << width) - 1) << (row * grid_width) for row in range(height))


def _array(bits: int, grid: tuple[int, int]) -> Mask:
    """A mask's bits as [h, w] bool."""
    n = grid[0] * grid[1]
    packed = np.frombuffer(bits.to_bytes(-(-n // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=n, bitorder="little").view(np.bool_).reshape(grid)


def mask_of_shape(shape: str, grid: tuple[int, int], target: int, rule: MaskSettings, rng: Numbers) -> Mask:
    """A mask of exactly ``target`` patches, [h, w], one of :data:`SHAPES`."""
    if shape == "box":
        return box_mask(grid, target, rule, rng)
    return (random_mask if shape == "random" else cross_mask)(grid, target, rng)


def draw_targets(
    n_crops: int, n_patches: int, ratio: tuple[float, float], rng: np.random.Generator
) -> list[int]:
    """The number of masked patches in each crop of one kind, in random order, rounded down; ratios are
    stratified over the crops, as in DINOv2."""
    edges = np.linspace(*ratio, n_crops + 1)
    targets = (n_patches * (edges[:-1] + np.diff(edges) * rng.random(n_crops))).astype(np.int64)
    # Crops come in the order of their views: the strata must not follow it.
    return rng.permutation(targets).tolist()


def draw_kinds(n_images: int, n_global: int, rule: MaskSettings, rng: np.random.Generator) -> list[str]:
    """The kind of each global crop, view-major: ``content``, ``position`` or ``none``."""
    n = n_images if rule.kinds_over == "image" else n_images * n_global
    # Rounded up or down at random, so that shares hold on average in small batches, too; whole shares stay
    # exact.
    content, both, u = rule.content_share, rule.content_share + rule.position_share, rng.random()
    n_content = min(int(n * content + u + 1e-9), n) if content else 0
    n_position = min(int(n * both + u + 1e-9), n) - n_content if rule.position_share else 0
    counts = [n_content, n_position, n - n_content - n_position]
    kinds: list[str] = rng.permutation(np.repeat(["content", "position", "none"], counts)).tolist()
    return kinds * n_global if rule.kinds_over == "image" else kinds


def draw_masks(
    n_images: int,
    n_global: int,
    grid: tuple[int, int],
    rule: MaskSettings,
    key: Sequence[int],
    images: slice | None = None,
) -> Masks:
    """Masks for the global crops of a batch.

    Kinds and targets are drawn for the whole batch, each crop's mask from its own stream. A rank that draws
    only its ``images`` gets the same rows as if it had drawn all (METHOD.md 5, ``exact``).

    Args:
        n_images: images of the global batch, over all ranks.
        grid: (h, w), patches of a global crop.
        key: seeds the draw, e.g. (seed, iteration).
        images: the images whose rows to return; None: all.

    Returns:
        masks of [n_global * len(images), h * w], view-major.
    """
    rng = np.random.default_rng([*key])
    kinds, n_patches = np.array(draw_kinds(n_images, n_global, rule, rng)), grid[0] * grid[1]
    targets = np.zeros(len(kinds), np.int64)
    for kind in ("content", "position"):
        of_kind = kinds == kind
        targets[of_kind] = draw_targets(int(of_kind.sum()), n_patches, rule.ratio, rng)
    seeds = rng.integers(2**63, size=len(kinds)).tolist()  # a stream for each crop
    chosen = range(n_images)[images or slice(None)]
    crops = [view * n_images + image for view in range(n_global) for image in chosen]
    drawn = {kind: np.zeros((len(crops), n_patches), dtype=bool) for kind in ("content", "position")}
    shapes = {"content": rule.content_shape, "position": rule.position_shape}
    for row, crop in enumerate(crops):
        if (kind := str(kinds[crop])) != "none":
            target, rng_of_crop = int(targets[crop]), Random(seeds[crop])
            drawn[kind][row] = mask_of_shape(shapes[kind], grid, target, rule, rng_of_crop).ravel()
    return Masks.of(drawn["content"], drawn["position"])
