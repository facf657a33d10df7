"""Images of a running training for TensorBoard: its views, its masks, and what the teacher makes of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.analysis.attention import last_layer
from pretrain.analysis.figures import (
    as_array,
    attention_of_query,
    bare,
    displayable,
    masks_figure,
    rectangles,
)
from pretrain.analysis.pca import pca_colors
from pretrain.backbones.vit import ViT
from pretrain.views.boxes import Views
from pretrain.views.masks import Masks

LOCALS_SHOWN = 4
QUERIES = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))


def training_images(
    teacher: ViT,
    global_crops: Tensor,
    local_crops: Tensor,
    views: Views,
    masks: Masks | None,
    *,
    n_images: int = 3,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, np.ndarray]:
    """Images of the first images of a batch, each uint8 [H, W, 3]: ``views``, ``attention``, ``pca``, and
    ``masks`` if any.

    The teacher sees ``n_images`` pairs of crops once, in evaluation mode, which it leaves again; no random
    number is drawn.

    Args:
        teacher: on the device of the crops.
        global_crops: [G * B, 3, S, S] normalized, view-major; local_crops: [L * B, 3, s, s]; L may be 0.
        views, masks: of the same batch.
    """
    batch_size = len(views.boxes)
    n = min(n_images, batch_size)
    big, small = (
        crops.unflatten(0, (-1, batch_size))[:, :n] for crops in (global_crops, local_crops)
    )  # [G, n, 3, S, S]
    boxes, flips = (
        t.unflatten(0, (-1, batch_size))[:2, :n].flatten(0, 1).to(big.device) for t in views.globals
    )
    was_training = teacher.training
    teacher.eval()
    with autocast or nullcontext():
        seen = last_layer(teacher, big[:2].flatten(0, 1), boxes, flips)
    teacher.train(was_training)
    grid = (big.shape[3] // teacher.patch_size, big.shape[4] // teacher.patch_size)
    figures = {
        "views": crops_figure(
            big, small[:LOCALS_SHOWN], views, teacher.pos_encoding == "field" and views.tied
        ),
        "attention": teacher_attention_figure(
            big[0],
            seen.cls[:n].float().cpu(),
            seen.patches[:n].float().cpu(),
            teacher.patch_size,
            teacher.has_cls,
        ),
        "pca": pca_figure(
            big[:2], torch.stack(pca_colors(list(seen.features))).unflatten(1, grid).unflatten(0, (-1, n))
        ),
    }
    if masks is not None and (masks.content.any() or masks.position.any()):  # a post-training masks nothing
        figures["masks"] = masks_figure(global_crops, masks.to(torch.device("cpu")), grid)
    return {name: as_array(figure) for name, figure in figures.items()}


def crops_figure(global_crops: Tensor, local_crops: Tensor, views: Views, is_tied: bool) -> Figure:
    """One row an image: crops at their boxes, crops at their position boxes in the field (where they are tied
    to it), single crops.

    Args:
        global_crops: [G, n, 3, S, S]; local_crops: [l, n, 3, s, s], the first local views.
        views: of n images or more.
    """
    n_global, n = global_crops.shape[:2]
    shown = [*range(n_global), *range(n_global, n_global + len(local_crops))]
    boxes = {"crops at their boxes in the image": views.boxes}
    if is_tied:
        boxes["crops at their position boxes in P"] = views.position_boxes
    widths = [1.6] * len(boxes) + [1.0] * len(shown)
    size = (1.5 * sum(widths), 2.6 * n)
    figure, axes = plt.subplots(
        n, len(widths), figsize=size, squeeze=False, layout="constrained", width_ratios=widths
    )
    for image, row in enumerate(axes):
        crops = [displayable(crop) for crop in (*global_crops[:, image], *local_crops[:, image])]
        flips = views.flips[image].tolist()
        for axis, (title, places) in zip(row, boxes.items()):
            _paste(bare(axis, title), crops, flips, places[image, shown].cpu(), n_global)
        for view, axis, crop in zip(shown, row[len(boxes) :], crops):
            number = f"global {view + 1}" if view < n_global else f"local {view - n_global + 1}"
            bare(axis, number + (", flipped" if flips[view] else "")).imshow(crop)
    return figure


def _paste(axis: Any, crops: list[np.ndarray], flips: list[bool], boxes: Tensor, n_global: int) -> None:
    """Crops, turned back where they were flipped, at their boxes in the unit square."""
    for crop, flip, (x0, y0, x1, y1) in zip(crops, flips, boxes.tolist()):
        axis.imshow(crop[:, ::-1] if flip else crop, extent=(x0, x1, y1, y0), interpolation="bilinear")
    axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", facecolor="#f2f2f2")
    rectangles(axis, boxes, n_global)


def teacher_attention_figure(
    crops: Tensor, cls: Tensor, patches: Tensor, patch_size: int, has_cls: bool = True
) -> Figure:
    """One row a crop: the crop, last-layer attention of [CLS] (of a ViT without, the patches' mean), and of
    some query patches, marked with a red dot.

    Args:
        crops: [n, 3, S, S]; cls: [n, N]; patches: [n, N, N].
    """
    side = crops.shape[-1]
    columns = 2 + len(QUERIES)
    figure, axes = plt.subplots(
        len(crops), columns, figsize=(2 * columns, 2.2 * len(crops)), squeeze=False, layout="constrained"
    )
    for row, crop, of_cls, of_patches in zip(axes, crops, cls, patches):
        bare(row[0], "global 1").imshow(displayable(crop))
        grid = (side // patch_size, side // patch_size)
        bare(row[1], "attention of [CLS]" if has_cls else "mean attention").imshow(
            of_cls.unflatten(0, grid), extent=(0, side, side, 0), cmap="viridis"
        )
        for axis, query in zip(row[2:], QUERIES):
            attention_of_query(
                bare(axis, "attention of the red patch"), of_patches, query, (side, side), patch_size
            )
    return figure


def pca_figure(crops: Tensor, rgb: Tensor) -> Figure:
    """One row an image: its global crops, each with the colors of its patches; one PCA over all of them.

    Args:
        crops: [v, n, 3, S, S]; rgb: [v, n, h, w, 3] in [0, 1].
    """
    n_views, n = crops.shape[:2]
    figure, axes = plt.subplots(
        n, 2 * n_views, figsize=(4 * n_views, 2.2 * n), squeeze=False, layout="constrained"
    )
    for image, row in enumerate(axes):
        for view in range(n_views):
            bare(row[2 * view], f"global {view + 1}").imshow(displayable(crops[view, image]))
            bare(row[2 * view + 1], "PCA of its patches").imshow(
                rgb[view, image].numpy(), interpolation="nearest"
            )
    return figure
