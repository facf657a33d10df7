"""Which patches of the student's global crops lose their content or their position (paper 3.3, METHOD.md 4).

Each global crop is content-masked, position-masked or unmasked, never two of these. Content masks are boxes, as DINOv2's;
position masks are crosses: full row and column bands around drawn centres.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHAPES = ("box", "cross")
KINDS_OVER = ("batch", "image")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskRule:
    """Shares, ratios and shapes of the masks."""

    content_share: float = 0.5
    position_share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)  # share of a crop's patches
    content_shape: str = "box"
    position_shape: str = "cross"
    kinds_over: str = "batch"  # batch: drawn over all global crops (DINOv2's collate) | image: both crops of an image alike
    min_box_patches: int = 4
    min_aspect: float = 0.3


@dataclass(frozen=True)
class Masks:
    """Masks of a batch's global crops, view-major like the crops: both [n_global * B, N] bool, never both set in one crop."""

    content: Tensor
    position: Tensor

    def to(self, device: torch.device) -> "Masks":
        """The same masks on another device."""
        return Masks(self.content.to(device, non_blocking=True), self.position.to(device, non_blocking=True))


def box_mask(grid: tuple[int, int], target: int, rule: MaskRule, rng: np.random.Generator) -> Mask:
    """Box-wise mask of exactly ``target`` patches, [h, w]: DINOv2's boxes, then single patches at random (ours) for the rest."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    low, high = math.log(rule.min_aspect), -math.log(rule.min_aspect)
    while (left_over := target - int(mask.sum())) > 0:
        if not _add_box(mask, left_over, rule, (low, high), rng):
            break
    if left_over > 0:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, size=left_over, replace=False)] = True
    return mask


def _add_box(mask: Mask, room: int, rule: MaskRule, log_aspect: tuple[float, float], rng: np.random.Generator) -> bool:
    """Try ten boxes; mask the first that adds between 1 and ``room`` patches."""
    height, width = mask.shape
    for _ in range(10):
        area = rng.uniform(min(rule.min_box_patches, room), room)
        aspect = math.exp(rng.uniform(*log_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        box = mask[top : top + h, left : left + w]
        if 0 < box.size - int(box.sum()) <= room:
            box[:] = True
            return True
    return False


def cross_mask(grid: tuple[int, int], target: int, rng: np.random.Generator) -> Mask:
    """Cross-wise mask of exactly ``target`` patches, [h, w] (paper Fig. 4; the exact reading is ours, METHOD.md 4).

    A centre is drawn; its full row band and column band are masked, one patch thick, or two when the target is at least twice the
    cells of a cross one patch thick; again until the target is reached. Of the last cross's new cells, those farthest from its
    centre are dropped, to hit the target exactly.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    cross = height + width - 1  # cells of a cross one patch thick
    thickness = 2 if min(grid) > 1 and target >= 2 * cross else 1
    rows, columns = np.indices(grid)
    while (room := target - int(mask.sum())) > 0:
        top, left = int(rng.integers(0, height - thickness + 1)), int(rng.integers(0, width - thickness + 1))
        in_rows = (rows >= top) & (rows < top + thickness)
        in_columns = (columns >= left) & (columns < left + thickness)
        new = np.flatnonzero((in_rows | in_columns) & ~mask)
        if len(new) > room:
            middle = (top + (thickness - 1) / 2, left + (thickness - 1) / 2)
            distance = np.maximum(abs(rows - middle[0]), abs(columns - middle[1])).flat[new]
            new = new[np.argsort(distance, kind="stable")[:room]]
        mask.flat[new] = True
    return mask


def mask_of_shape(shape: str, grid: tuple[int, int], target: int, rule: MaskRule, rng: np.random.Generator) -> Mask:
    """``box`` or ``cross`` mask of exactly ``target`` patches, [h, w]."""
    if shape == "box":
        return box_mask(grid, target, rule, rng)
    return cross_mask(grid, target, rng)


def draw_targets(n_crops: int, n_patches: int, ratio: tuple[float, float], rng: np.random.Generator) -> list[int]:
    """Masked patches of each crop of one kind, in random order: ratios stratified over the crops, as DINOv2's collate."""
    edges = np.linspace(*ratio, n_crops + 1)
    targets = [int(n_patches * rng.uniform(a, b)) for a, b in zip(edges[:-1], edges[1:])]
    rng.shuffle(targets)  # crops come in the order of their views: the strata must not follow it
    return targets


def draw_kinds(n_images: int, n_global: int, rule: MaskRule, rng: np.random.Generator) -> list[str]:
    """The kind of each global crop, view-major: ``content``, ``position`` or ``none``."""
    n = n_images if rule.kinds_over == "image" else n_images * n_global
    # Rounded up or down at random, so that a share holds on average in small batches too; whole shares stay exact.
    content, both, u = rule.content_share, rule.content_share + rule.position_share, rng.uniform()
    n_content = min(int(n * content + u + 1e-9), n) if content else 0
    n_position = min(int(n * both + u + 1e-9), n) - n_content if rule.position_share else 0
    kinds = ["content"] * n_content + ["position"] * n_position + ["none"] * (n - n_content - n_position)
    rng.shuffle(kinds)
    return kinds * n_global if rule.kinds_over == "image" else kinds


def draw_masks(
    n_images: int, n_global: int, grid: tuple[int, int], rule: MaskRule, key: Sequence[int], images: slice | None = None
) -> Masks:
    """Masks for the global crops of a batch.

    Kinds and targets are drawn for the whole batch, each crop's mask from a stream of its own: a rank that asks for its ``images``
    alone gets the same rows as if it had drawn them all (METHOD.md 5, ``exact``).

    Args:
        n_images: images of the global batch, over all ranks.
        grid: (h, w), patches of a global crop.
        key: seeds the draw, e.g. (seed, iteration).
        images: which images' rows to return, all without it.

    Returns:
        masks of [n_global * len(images), h * w], view-major.
    """
    rng = np.random.default_rng([*key])
    kinds = draw_kinds(n_images, n_global, rule, rng)
    targets = {kind: draw_targets(kinds.count(kind), grid[0] * grid[1], rule.ratio, rng) for kind in ("content", "position")}
    chosen = range(n_images)[images or slice(None)]
    drawn = {kind: np.zeros((n_global, len(chosen), *grid), dtype=bool) for kind in targets}
    shapes = {"content": rule.content_shape, "position": rule.position_shape}
    for crop, kind in enumerate(kinds):
        view, image = divmod(crop, n_images)
        if kind == "none":
            continue
        target = targets[kind].pop()
        if image in chosen:
            crop_rng = np.random.default_rng([*key, 1 + crop])  # NumPy pads seeds with zeros: (key, 0) would be the batch's own
            drawn[kind][view, image - chosen.start] = mask_of_shape(shapes[kind], grid, target, rule, crop_rng)
    content, position = (torch.from_numpy(drawn[kind]).flatten(0, 1).flatten(1) for kind in ("content", "position"))
    return Masks(content, position)
