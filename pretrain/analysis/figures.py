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

from pretrain.analysis.attention import LastLayer, last_layer, patch_at
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
LOCALS_SHOWN = 4
STRIPES = (0.1, 0.95)  # gray levels of masked content
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


def rectangles(axis: Any, boxes: Tensor, n_global: int) -> None:
    """Outlines of boxes [V, 4], global ones red, local ones blue, with a white edge."""
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        color = GLOBAL_COLOR if i < n_global else LOCAL_COLOR
        for edge, width in (("white", 3.2), (color, 1.6)):
            line: dict[str, Any] = {"fill": False, "edgecolor": edge, "linewidth": width}
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **line))


def views_figure(
    global_crops: Tensor, local_crops: Tensor, views: Views, is_tied: bool, images: Sequence[Tensor] = ()
) -> Figure:
    """One row an image: its boxes, its position boxes in the field (where tied to it), and the crops, single.

    The boxes stand on the image where it is given, else on the crops at their places.

    Args:
        global_crops: [G, n, 3, S, S]; local_crops: [l, n, 3, s, s], the first local views.
        views: of n images or more.
        images: uint8 [3, H, W] each, none or n.
    """
    n_global, n = global_crops.shape[:2]
    chosen = [*range(n_global), *range(n_global, n_global + len(local_crops))]
    boxes = {"boxes in the image" if images else "crops at their boxes in the image": views.boxes}
    if is_tied:
        boxes["crops at their position boxes in P"] = views.position_boxes
    widths = [1.6] * len(boxes) + [1.0] * len(chosen)
    figure, axes = grid_of_axes(n, len(widths), (1.5 * sum(widths), 2.6 * n), width_ratios=widths)
    for image, row in enumerate(axes):
        crops = [displayable(crop) for crop in (*global_crops[:, image], *local_crops[:, image])]
        flips = views.flips[image].tolist()
        aspect = images[image].shape[1] / images[image].shape[2] if images else 1.0
        for i, (axis, (title, places)) in enumerate(zip(row, boxes.items())):
            if images and i == 0:
                axis.imshow(displayable(images[image]), extent=(0, 1, 1, 0))
            else:
                for crop, flip, (x0, y0, x1, y1) in zip(crops, flips, places[image, chosen].tolist()):
                    turned = crop[:, ::-1] if flip else crop
                    axis.imshow(turned, extent=(x0, x1, y1, y0), interpolation="bilinear")
            bare(axis, title).set(xlim=(0, 1), ylim=(1, 0), aspect=aspect, facecolor="#f2f2f2")
            rectangles(axis, places[image, chosen], n_global)
        for view, axis, crop in zip(chosen, row[len(boxes) :], crops):
            number = f"global {view + 1}" if view < n_global else f"local {view - n_global + 1}"
            bare(axis, number + (", flipped" if flips[view] else "")).imshow(crop)
    return figure


def masks_figure(crops: Tensor, masks: Masks, grid: tuple[int, int], n_each: int = 4) -> Figure:
    """Global crops with their masks: content-masked ones, hatched, and in a second row, gray, position-masked ones in red.

    Args:
        crops: [C, 3, S, S], levels or normalized; masks: of the same crops.
    """
    kinds = {"content": masks.content, "position": masks.position}
    chosen = {kind: mask.any(1).nonzero().flatten().tolist()[:n_each] for kind, mask in kinds.items()}
    chosen = {kind: found for kind, found in chosen.items() if found}
    n_rows, n_columns = max(len(chosen), 1), max(map(len, chosen.values()), default=1)
    figure, axes = grid_of_axes(n_rows, n_columns, (1.9 * n_columns, 2.1 * n_rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (kind, found) in zip(axes, chosen.items()):
        for axis, crop in zip(row, found):
            mask = kinds[kind][crop]
            axis.set_axis_on()
            bare(axis, f"{kind}: {int(mask.sum())} of {len(mask)} patches")
            axis.imshow(masked(crops[crop], mask.unflatten(0, grid), kind))
    return figure


def masked(crop: Tensor, mask: Tensor, kind: str) -> np.ndarray:
    """A crop with its masked patches, float [H, W, 3] in [0, 1]. Masked content is hatched in black and white, which is
    seen on any picture; masked positions are red on the gray picture, for their content stays.

    Args:
        crop: [3, H, W], levels or normalized; mask: [h, w] bool.
    """
    pixels = displayable(crop)
    size = pixels.shape[:2]
    rows, columns = (np.arange(side) * n // side for side, n in zip(size, mask.shape))
    covered = mask.cpu().numpy()[rows][:, columns][..., None]
    if kind == "content":
        stripes = np.where(np.indices(size).sum(0) // max(size[0] // 40, 1) % 2, *STRIPES)[..., None]
        return np.where(covered, stripes, pixels)
    gray = pixels.mean(-1, keepdims=True).repeat(3, -1)
    red = np.array(matplotlib.colors.to_rgb(GLOBAL_COLOR))
    return np.where(covered, 0.4 * gray + 0.6 * red, gray)


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
    titles: tuple[str, str] = ("image and queries", ""),
) -> Figure:  # fmt: skip
    """One row an image with its query patches, marked by numbered dots, and a panel of what each attends to in the last
    layer (paper Fig. 6).

    Args:
        images: [B, 3, H, W], levels or normalized; maps: [B, Q, h, w] of Q queries.
        whole: [B, h, w], a map before these that belongs to no patch.
        titles: of the images, and of that map.
    """
    columns = 1 + (whole is not None) + len(queries)
    figure, axes = grid_of_axes(len(images), columns, (2 * columns, 2.2 * len(images)))
    height, width = images.shape[2:]
    grid = (maps.shape[2], maps.shape[3])
    for i, (row, image) in enumerate(zip(axes, images)):
        bare(row[0], titles[0]).imshow(displayable(image), extent=(0, width, height, 0))
        for number, query in enumerate(queries, 1):
            query_dot(row[0], query, grid, (height, width), str(number))
        if whole is not None:
            bare(row[1], titles[1]).imshow(whole[i], extent=(0, width, height, 0), cmap="viridis")
        for number, (axis, query, heat) in enumerate(zip(row[-len(queries) :], queries, maps[i]), 1):
            heat_map(bare(axis, f"attention of query {number}"), heat, query, (height, width), str(number))
    return figure


def heat_map(axis: Any, heat: Tensor, query: Place, size_px: Sequence[int], number: str = "") -> None:
    """A map [h, w] in the place of an image (height, width), and its query."""
    axis.imshow(heat, extent=(0, size_px[1], size_px[0], 0), cmap="viridis")
    query_dot(axis, query, (heat.shape[0], heat.shape[1]), size_px, number)


def query_dot(
    axis: Any, query: Place, grid: tuple[int, int], size_px: Sequence[int], number: str = ""
) -> None:
    """A red dot with a white edge at the center of the patch at ``query`` (x, y in image units), with its number."""
    row, column = patch_at(query, grid)
    x, y = (column + 0.5) / grid[1] * size_px[1], (row + 0.5) / grid[0] * size_px[0]
    size, edge = (9, 1.0) if number else (5, 0.6)
    axis.plot(x, y, "o", color="#d00000", markersize=size, markeredgecolor="white", markeredgewidth=edge)
    axis.text(x, y, number, color="white", fontsize=6, weight="bold", ha="center", va="center_baseline")


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
    """:func:`training_figures` of the first images of a batch as pixels, uint8 [H, W, 3].

    Args:
        teacher: on the device of the crops.
    """
    n = min(n_images, len(views.boxes))
    is_tied = teacher.pos_encoding in ("field", "rotary") and views.tied
    with autocast or nullcontext():
        seen = look(teacher, global_crops, views, n)
    figures = training_figures(
        seen, global_crops, local_crops, views, masks, is_tied, n, has_cls=teacher.has_cls
    )
    return {name: as_array(figure) for name, figure in figures.items()}


def look(teacher: ViT, global_crops: Tensor, views: Views, n: int) -> LastLayer:
    """What the last layer makes of the first two global crops of n images, [2 * n, ...] view-major (one crop: [n, ...]).

    The teacher sees them once, in evaluation mode, which it leaves; draws no random number.

    Args:
        global_crops: [G * B, 3, S, S] normalized, view-major; views: of the same batch.
    """
    batch_size = len(views.boxes)
    crops, boxes, flips = (
        t.to(global_crops.device).unflatten(0, (-1, batch_size))[:2, :n].flatten(0, 1)
        for t in (global_crops, *views.globals)
    )
    was_training = teacher.training
    teacher.eval()
    seen = last_layer(teacher, crops, boxes, flips)
    teacher.train(was_training)
    return seen


def training_figures(
    seen: LastLayer | None, global_crops: Tensor, local_crops: Tensor, views: Views, masks: Masks | None,
    is_tied: bool, n: int, *, images: Sequence[Tensor] = (), has_cls: bool = True, like: Tensor | None = None,
) -> dict[str, Figure]:  # fmt: skip
    """What a pre-training sees and makes of n images: ``views``, ``masks`` if any, ``attention`` and ``pca``.

    Args:
        seen: of :func:`look`; none: the last two are left out.
        global_crops: [G * B, 3, S, S] normalized, view-major; local_crops: [L * B, 3, s, s]; L may be 0.
        views, masks: of the same batch.
        is_tied: whether the position boxes mean places in the field.
        images: uint8 [3, H, W] each, none or n.
        like: the features of another network for the same crops, to which the colors of ``pca`` come near.
    """
    batch_size = len(views.boxes)
    big, small = (crops.unflatten(0, (-1, batch_size))[:, :n] for crops in (global_crops, local_crops))
    figures = {"views": views_figure(big, small[:LOCALS_SHOWN], views, is_tied, images)}
    if masks is not None and (masks.content.any() or masks.position.any()):  # a post-training masks nothing
        side = round(masks.content.shape[1] ** 0.5)
        figures["masks"] = masks_figure(global_crops, masks.to(torch.device("cpu")), (side, side))
    if seen is None:
        return figures
    n_patches = seen.patches.shape[1]
    grid = (round(n_patches**0.5),) * 2  # global crops are squares
    places = [row * grid[1] + column for row, column in (patch_at(query, grid) for query in QUERIES)]
    maps = seen.patches[:n, places].float().cpu().unflatten(2, grid)
    cls = seen.cls[:n].float().cpu().unflatten(1, grid)
    titles = ("global 1", "attention of [CLS]" if has_cls else "mean attention")
    figures["attention"] = attention_figure(big[0], maps, QUERIES, cls, titles)
    colors = pca_colors(list(seen.features), like=None if like is None else list(like))
    figures["pca"] = pca_figure(big[:2], torch.stack(colors).unflatten(1, grid).unflatten(0, (-1, n)))
    return figures


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
