"""Figures of what a pre-training does: views and position boxes, masks, the scale s, attention of patches.

Each function draws one matplotlib figure. :func:`save` writes it into a run's ``figures/`` with its title and
caption, where the report finds it; :func:`training_images` gives the pixels of those of a running training,
for TensorBoard: its views, its masks, and what the teacher makes of them.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pretrain.analysis.attention import last_layer, patch_at
from pretrain.analysis.pca import Place, pca_colors
from pretrain.backbones.vit import ViT
from pretrain.files import read_json, replacing, write_json
from pretrain.results.runs import Figure as Shown
from pretrain.results.runs import add_caption
from pretrain.settings import replaced
from pretrain.views.boxes import PositionSettings, Views, draw_s
from pretrain.views.masks import Masks
from pretrain.views.pixels import MEAN, STD

GLOBAL_COLOR, LOCAL_COLOR = "#d1495b", "#00798c"
LOCALS_SHOWN = 4  # in a running training
QUERIES = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))


def grid_of_axes(rows: int, columns: int, size_in: tuple[float, float], **more: Any) -> tuple[Figure, Any]:
    """A figure of this width and height in inches, and its axes [rows, columns]."""
    return plt.subplots(rows, columns, figsize=size_in, squeeze=False, layout="constrained", **more)


def save(figure: Figure, folder: Path, name: str, title: str, caption: str, svg: bool = False) -> Path:
    """Write ``folder/name`` (PNG), with ``svg`` an SVG beside it, and its caption; closes the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as partial:
        figure.savefig(partial, format="png", dpi=110, bbox_inches="tight")
    if svg:
        # The same bytes each time; text stays text.
        same = matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"})
        with same, replacing((folder / name).with_suffix(".svg")) as partial:
            figure.savefig(partial, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    add_caption(folder / name, title, caption)
    return folder / name


def keep(figure: Figure, folder: Path, stem: str, title: str, caption: str) -> Shown:
    """:func:`save` as PNG and SVG, and give what a page shows."""
    return Shown(title, caption, save(figure, folder, f"{stem}.png", title, caption, svg=True).read_bytes())


def forget(folder: Path, pattern: str) -> None:
    """Remove the kept figures of an earlier analysis whose stem is like ``pattern`` (a regular expression)."""
    captions = folder / "captions.json"
    if not captions.is_file():
        return
    entries = read_json(captions)
    for name in [name for name in entries if re.fullmatch(rf"({pattern})\.png", name)]:
        del entries[name]
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    write_json(captions, entries)


def as_array(figure: Figure) -> np.ndarray:
    """The figure as uint8 [H, W, 3]; closes it."""
    figure.set_dpi(100)
    canvas: Any = figure.canvas
    canvas.draw()
    plt.close(figure)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def displayable(pixels: Tensor) -> np.ndarray:
    """Levels (uint8) or normalized floats [3, H, W] to [H, W, 3] in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels.cpu().permute(1, 2, 0).numpy() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels.detach().float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def bare(axis: Any, title: str = "") -> Any:
    """The axis without ticks, with a small title."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8)
    return axis


def rectangles(axis: Any, boxes: Tensor, n_global: int, width: float = 1, height: float = 1) -> None:
    """Outlines of boxes [V, 4] in image units on an axis of this size: global ones red, local ones blue."""
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        color = GLOBAL_COLOR if i < n_global else LOCAL_COLOR
        place, size = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
        axis.add_patch(Rectangle(place, *size, fill=False, edgecolor=color, linewidth=1.6))


def views_figure(
    images: Sequence[Tensor], views: Sequence[Views], crops: Sequence[Sequence[Tensor]], has_field: bool
) -> Figure:
    """One row an image: its boxes, its position boxes in the field (where there is one), its crops.

    Args:
        images: uint8 [3, H, W] each; views: of one image each; crops: [3, s, s] each, levels or normalized, a
            list an image.
    """
    n_boxes = 1 + has_field
    columns = n_boxes + len(crops[0])
    figure, axes = grid_of_axes(len(images), columns, (1.5 * columns, 1.6 * len(images)))
    for row, image, view, pixels in zip(axes, images, views, crops):
        bare(row[0], "boxes in the image").imshow(displayable(image))
        rectangles(row[0], view.boxes[0], view.n_global, image.shape[2], image.shape[1])
        if has_field:
            bare(row[1], "position boxes in P")
            row[1].set(xlim=(0, 1), ylim=(1, 0), aspect=image.shape[1] / image.shape[2], facecolor="#f2f2f2")
            rectangles(row[1], view.position_boxes[0], view.n_global)
        for i, (axis, crop) in enumerate(zip(row[n_boxes:], pixels)):
            flipped = ", flipped" if view.flips[0, i] else ""
            bare(axis, f"{'global' if i < view.n_global else 'local'}{flipped}").imshow(displayable(crop))
    return figure


def masks_figure(crops: Tensor, masks: Masks, grid: tuple[int, int], n_each: int = 4) -> Figure:
    """Global crops with their masks: content-masked ones, and in a second row, gray, position-masked ones.

    Args:
        crops: [C, 3, S, S], levels or normalized; masks: of the same crops.
    """
    rows = [("content", masks.content, "white", 0.9), ("position", masks.position, GLOBAL_COLOR, 0.55)]
    rows = [row for row in rows if row[1].any()]
    n_rows, side = max(len(rows), 1), crops.shape[-1]
    figure, axes = grid_of_axes(n_rows, n_each, (1.9 * n_each, 2.1 * n_rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (kind, mask, color, strength) in zip(axes, rows):
        for axis, crop in zip(row, mask.any(1).nonzero().flatten().tolist()):
            axis.set_axis_on()
            bare(axis, f"{kind}: {int(mask[crop].sum())} of {mask.shape[1]} patches")
            pixels = displayable(crops[crop])
            if kind == "position":  # red is visible on gray
                pixels = pixels.mean(-1, keepdims=True).repeat(3, -1)
            axis.imshow(pixels, extent=(0, side, side, 0))
            cover = np.full((*grid, 4), matplotlib.colors.to_rgba(color))
            cover[..., 3] = mask[crop].unflatten(0, grid).numpy() * strength
            axis.imshow(cover, extent=(0, side, side, 0), interpolation="nearest")
    return figure


def scales_figure(rule: PositionSettings, n: int = 20_000) -> Figure:
    """The three distributions of s (paper Fig. 3, Table 4a), drawn from the code that the training uses."""
    figure, ((axis,),) = grid_of_axes(1, 1, (5, 2.4))
    for scale in ("beta", "uniform"):
        rng, drawn_from = np.random.default_rng(0), replaced(rule, {"scale": scale})
        values = [draw_s(drawn_from, rng) for _ in range(n)]
        axis.hist(values, bins=60, range=(0, 1), density=True, histtype="step", linewidth=1.5, label=scale)
    axis.axvline(rule.s_max, color="gray", linestyle="--", label="constant")
    axis.set(xlabel="s (area of the augmented region, |P| = 1)", ylabel="density")
    axis.legend(frameon=False, fontsize=8)
    return figure


def attention_figure(
    images: Tensor, maps: Tensor, queries: Sequence[Place], whole: Tensor | None = None,
    titles: tuple[str, str, str] = ("", "", ""),
) -> Figure:  # fmt: skip
    """One row an image: last-layer attention of query patches, marked with a red dot (paper Fig. 6).

    Args:
        images: [B, 3, H, W], levels or normalized; maps: [B, Q, h, w] of Q queries.
        whole: [B, h, w], a map before these that belongs to no patch.
        titles: of the columns of images, of this map, and of the queries.
    """
    columns = 1 + (whole is not None) + len(queries)
    figure, axes = grid_of_axes(len(images), columns, (2 * columns, 2.2 * len(images)))
    height, width = images.shape[2:]
    for i, (row, image) in enumerate(zip(axes, images)):
        bare(row[0], titles[0]).imshow(displayable(image))
        if whole is not None:
            bare(row[1], titles[1]).imshow(whole[i], extent=(0, width, height, 0), cmap="viridis")
        for axis, query, heat in zip(row[-len(queries) :], queries, maps[i]):
            heat_map(bare(axis, titles[2]), heat, query, (height, width))
    return figure


def heat_map(axis: Any, heat: Tensor, query: Place, size_px: Sequence[int]) -> None:
    """A map [h, w] in the place of an image (height, width); a red dot at ``query`` (x, y in image units)."""
    axis.imshow(heat, extent=(0, size_px[1], size_px[0], 0), cmap="viridis")
    query_dot(axis, query, (heat.shape[0], heat.shape[1]), size_px)


def query_dot(axis: Any, query: Place, grid: tuple[int, int], size_px: Sequence[int]) -> None:
    """A red dot at the center of the patch at ``query`` (x, y in image units)."""
    row, column = patch_at(query, grid)
    x, y = (column + 0.5) / grid[1] * size_px[1], (row + 0.5) / grid[0] * size_px[0]
    axis.plot(x, y, "o", color="red", markersize=5)


def plain(text: str, most: int = 40) -> str:
    """A name as matplotlib shows it: on one line, shortened in the middle, no mathematics, never hidden by "_"."""
    text = " ".join(text.split())
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-most // 2 + 2 :]}"
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def training_images(
    teacher: ViT, global_crops: Tensor, local_crops: Tensor, views: Views, masks: Masks | None, *,
    n_images: int = 3, autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Images, uint8 [H, W, 3], of the first images of a batch: ``views``, ``attention``, ``pca``, ``masks`` if any.

    The teacher sees ``n_images`` pairs of crops once, in evaluation mode, which it leaves; draws no random number.

    Args:
        teacher: on the device of the crops.
        global_crops: [G * B, 3, S, S] normalized, view-major; local_crops: [L * B, 3, s, s]; L may be 0.
        views, masks: of the same batch.
    """
    batch_size = len(views.boxes)
    n = min(n_images, batch_size)
    big, small = (crops.unflatten(0, (-1, batch_size))[:, :n] for crops in (global_crops, local_crops))
    # [G, n, 3, S, S]
    of_globals = (t.unflatten(0, (-1, batch_size))[:2, :n].flatten(0, 1) for t in views.globals)
    boxes, flips = (t.to(big.device) for t in of_globals)
    was_training = teacher.training
    teacher.eval()
    with autocast or nullcontext():
        seen = last_layer(teacher, big[:2].flatten(0, 1), boxes, flips)
    teacher.train(was_training)
    grid = (big.shape[3] // teacher.patch_size, big.shape[4] // teacher.patch_size)
    is_tied = teacher.pos_encoding in ("field", "rotary") and views.tied
    places = [row * grid[1] + column for row, column in (patch_at(query, grid) for query in QUERIES)]
    maps = seen.patches[:n, places].float().cpu().unflatten(2, grid)
    cls = seen.cls[:n].float().cpu().unflatten(1, grid)
    of_cls = "attention of [CLS]" if teacher.has_cls else "mean attention"
    titles = ("global 1", of_cls, "attention of the red patch")
    colors = torch.stack(pca_colors(list(seen.features))).unflatten(1, grid).unflatten(0, (-1, n))
    figures = {
        "views": crops_figure(big, small[:LOCALS_SHOWN], views, is_tied),
        "attention": attention_figure(big[0], maps, QUERIES, cls, titles),
        "pca": pca_figure(big[:2], colors),
    }
    if masks is not None and (masks.content.any() or masks.position.any()):  # a post-training masks nothing
        figures["masks"] = masks_figure(global_crops, masks.to(torch.device("cpu")), grid)
    return {name: as_array(figure) for name, figure in figures.items()}


def crops_figure(global_crops: Tensor, local_crops: Tensor, views: Views, is_tied: bool) -> Figure:
    """One row an image: crops at their boxes, at their position boxes in the field (where tied to it), and single.

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
    figure, axes = grid_of_axes(n, len(widths), (1.5 * sum(widths), 2.6 * n), width_ratios=widths)
    for image, row in enumerate(axes):
        crops = [displayable(crop) for crop in (*global_crops[:, image], *local_crops[:, image])]
        flips = views.flips[image].tolist()
        for axis, (title, places) in zip(row, boxes.items()):
            for crop, flip, (x0, y0, x1, y1) in zip(crops, flips, places[image, shown].tolist()):
                turned = crop[:, ::-1] if flip else crop
                axis.imshow(turned, extent=(x0, x1, y1, y0), interpolation="bilinear")
            bare(axis, title).set(xlim=(0, 1), ylim=(1, 0), aspect="equal", facecolor="#f2f2f2")
            rectangles(axis, places[image, shown], n_global)
        for view, axis, crop in zip(shown, row[len(boxes) :], crops):
            number = f"global {view + 1}" if view < n_global else f"local {view - n_global + 1}"
            bare(axis, number + (", flipped" if flips[view] else "")).imshow(crop)
    return figure


def pca_figure(crops: Tensor, rgb: Tensor) -> Figure:
    """One row an image: its global crops, each with the colors of its patches; one PCA over all of them.

    Args:
        crops: [v, n, 3, S, S]; rgb: [v, n, h, w, 3] in [0, 1].
    """
    n_views, n = crops.shape[:2]
    figure, axes = grid_of_axes(n, 2 * n_views, (4 * n_views, 2.2 * n))
    for view in range(n_views):
        for image, (left, right) in enumerate(axes[:, 2 * view : 2 * view + 2]):
            bare(left, f"global {view + 1}").imshow(displayable(crops[view, image]))
            bare(right, "PCA of its patches").imshow(rgb[view, image].numpy(), interpolation="nearest")
    return figure
