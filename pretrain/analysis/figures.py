"""Figures of what a pre-training does: views and their position boxes, masks, the scale s, attention of query
patches.

Each function draws one matplotlib figure. :func:`save` writes it into a run's ``figures/`` with its title and
caption, where the report finds it; :func:`as_array` gives its pixels. The images of a running training are in
:mod:`pretrain.analysis.training_images`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pretrain.analysis.attention import last_layer_attention, patch_at
from pretrain.backbones.vit import ViT
from pretrain.results.runs import Figure as Shown
from pretrain.results.runs import add_caption
from pretrain.settings import replaced
from pretrain.views.boxes import PositionSettings, Views, draw_s
from pretrain.views.masks import Masks
from pretrain.views.pixels import MEAN, STD

GLOBAL_COLOR, LOCAL_COLOR = "#d1495b", "#00798c"


def save(figure: Figure, folder: Path, name: str, title: str, caption: str, svg: bool = False) -> Path:
    """Write ``folder/name`` (PNG), with ``svg`` the same as SVG beside it, and an entry in
    ``captions.json``; closes the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=110, bbox_inches="tight")
    if svg:
        with matplotlib.rc_context(
            {"svg.hashsalt": name, "svg.fonttype": "none"}
        ):  # the same bytes each time; text stays text
            figure.savefig((folder / name).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    add_caption(folder / name, title, caption)
    return folder / name


def keep(figure: Figure, folder: Path, stem: str, title: str, caption: str) -> Shown:
    """:func:`save` as PNG and SVG, and give what a page shows."""
    return Shown(title, caption, save(figure, folder, f"{stem}.png", title, caption, svg=True).read_bytes())


def forget(folder: Path, pattern: str) -> None:
    """Remove the kept figures whose stem is like ``pattern`` (a regular expression): those of an earlier
    analysis, no others."""
    captions = folder / "captions.json"
    entries: dict[str, Any] = json.loads(captions.read_text(encoding="utf-8")) if captions.is_file() else {}
    for name in [name for name in entries if re.fullmatch(rf"({pattern})\.png", name)]:
        del entries[name]
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    if captions.is_file():
        captions.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def as_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as uint8 [H, W, 3]; closes it."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
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
    """Outlines of boxes [V, 4] in image units on an axis of this width and height: global ones red, local
    ones blue."""
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        color = GLOBAL_COLOR if i < n_global else LOCAL_COLOR
        place, size = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
        axis.add_patch(Rectangle(place, *size, fill=False, edgecolor=color, linewidth=1.6))


def views_figure(
    images: Sequence[Tensor],
    views: Sequence[Views],
    crops: Sequence[Sequence[Tensor]],
    has_field: bool = True,
) -> Figure:
    """One row an image: its boxes, its position boxes in the field (where there is one), its crops.

    Args:
        images: uint8 [3, H, W] each; views: of one image each; crops: [3, s, s] each, levels or normalized, a
            list an image.
    """
    n_crops, n_boxes = len(crops[0]), 1 + has_field
    figure, axes = plt.subplots(
        len(images),
        n_boxes + n_crops,
        figsize=(1.5 * (n_boxes + n_crops), 1.6 * len(images)),
        squeeze=False,
        layout="constrained",
    )
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
    """Global crops with their masks: content-masked ones in the first row, position-masked ones, in gray, in
    the second.

    Args:
        crops: [C, 3, S, S], levels or normalized; masks: of the same crops.
    """
    rows = [("content", masks.content, "white"), ("position", masks.position, GLOBAL_COLOR)]
    rows = [row for row in rows if row[1].any()]
    figure, axes = plt.subplots(
        max(len(rows), 1),
        n_each,
        figsize=(1.9 * n_each, 2.1 * max(len(rows), 1)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (kind, mask, color) in zip(axes, rows):
        chosen = mask.any(1).nonzero().flatten().tolist()[:n_each]
        for axis, crop in zip(row, chosen):
            axis.set_axis_on()
            n_masked = int(mask[crop].sum())
            bare(axis, f"{kind}: {n_masked} of {mask.shape[1]} patches")
            side = crops.shape[-1]
            pixels = displayable(crops[crop])
            if kind == "position":  # red is visible on gray
                pixels = pixels.mean(-1, keepdims=True).repeat(3, -1)
            axis.imshow(pixels, extent=(0, side, side, 0))
            cover = np.zeros((*grid, 4))
            cover[..., :3] = matplotlib.colors.to_rgb(color)
            cover[..., 3] = mask[crop].unflatten(0, grid).numpy() * (0.9 if kind == "content" else 0.55)
            axis.imshow(cover, extent=(0, side, side, 0), interpolation="nearest")
    return figure


def scales_figure(rule: PositionSettings, n: int = 20_000) -> Figure:
    """The three distributions of s (paper Fig. 3, Table 4a), drawn from the code that the training uses."""
    figure, axis = plt.subplots(figsize=(5, 2.4), layout="constrained")
    for scale in ("beta", "uniform"):
        rng = np.random.default_rng(0)
        drawn_from = replaced(rule, {"scale": scale})
        values = [draw_s(drawn_from, rng) for _ in range(n)]
        axis.hist(values, bins=60, range=(0, 1), density=True, histtype="step", linewidth=1.5, label=scale)
    axis.axvline(rule.s_max, color="gray", linestyle="--", label="constant")
    axis.set(xlabel="s (area of the augmented region, |P| = 1)", ylabel="density")
    axis.legend(frameon=False, fontsize=8)
    return figure


def attention_figure(backbone: ViT, images: Tensor, queries: Sequence[tuple[float, float]]) -> Figure:
    """Last-layer attention of query patches over each image, the query marked with a red dot (paper Fig. 6).

    Args:
        images: [B, 3, H, W] normalized, H and W multiples of the patch size.
        queries: places (x, y) in image units.
    """
    backbone.eval()
    attention = last_layer_attention(backbone, images).cpu()  # [B, N, N]
    figure, axes = plt.subplots(
        len(images),
        1 + len(queries),
        figsize=(1.8 * (1 + len(queries)), 1.9 * len(images)),
        squeeze=False,
        layout="constrained",
    )
    for row, image, weights in zip(axes, images, attention):
        bare(row[0]).imshow(displayable(image))
        for axis, query in zip(row[1:], queries):
            attention_of_query(bare(axis), weights, query, image.shape[1:], backbone.patch_size)
    return figure


def attention_of_query(
    axis: Any, weights: Tensor, query: tuple[float, float], size_px: Sequence[int], patch_size: int
) -> None:
    """The row of ``weights`` [N, N] of the patch at ``query`` (x, y in image units) as a map, and a red
    dot on that patch."""
    grid = (size_px[0] // patch_size, size_px[1] // patch_size)
    row, column = patch_at(query, grid)
    heat_map(axis, weights[row * grid[1] + column].unflatten(0, grid), query, size_px)


def heat_map(axis: Any, heat: Tensor, query: tuple[float, float], size_px: Sequence[int]) -> None:
    """A map [h, w] over the place of an image (height, width), and a red dot on the patch at ``query`` (x,
    y in image units)."""
    axis.imshow(heat, extent=(0, size_px[1], size_px[0], 0), cmap="viridis")
    query_dot(axis, query, (heat.shape[0], heat.shape[1]), size_px)


def query_dot(axis: Any, query: tuple[float, float], grid: tuple[int, int], size_px: Sequence[int]) -> None:
    """A red dot at the center of the patch at ``query`` (x, y in image units)."""
    row, column = patch_at(query, grid)
    axis.plot(
        (column + 0.5) / grid[1] * size_px[1],
        (row + 0.5) / grid[0] * size_px[0],
        "o",
        color="red",
        markersize=5,
    )


def plain(text: str, most: int = 40) -> str:
    """A name that matplotlib shows as it is: on one line, shortened in the middle, without mathematics. A
    leading underscore does not hide it from a legend."""
    text = " ".join(text.split())
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-most // 2 + 2 :]}"
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text
