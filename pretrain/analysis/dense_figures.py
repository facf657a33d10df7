"""Figures of a dense evaluation: labels and clusters over their images, principal components of the patches.

The colors of classes differ as much as their number allows, also for eyes with a color vision deficiency.
Pixels that are not counted are hatched in gray.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.analysis.colors import HATCHED, distinct_colors
from pretrain.analysis.feature_figures import pca_figure
from pretrain.analysis.figures import bare, forget, grid_of_axes, plain, save
from pretrain.analysis.pca import pca_colors
from pretrain.backbones.vit import Tokens, ViT
from pretrain.data.datasets.maps import nearest
from pretrain.data.images import resized

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int32]
Colors = Mapping[int, tuple[float, float, float]]
OUTLINED = "clustering"  # the map over which the labels' outlines are drawn: it was made without labels
OUTLINED_CAPTION = (
    " Clustering: patches by K-means without labels, each cluster in the color of the class that it was matched to; "
    "lines are the labels' outlines."
)
MOST_IN_LEGEND = 32
COLUMN_IN, SIDE_PX = 2.6, 360  # of an image: width in inches; longer side in pixels
SHARE = 0.75  # of the colors over the gray image


class Features(Protocol):
    """:class:`pretrain.evaluation.features.Features`, held frozen by the caller."""

    @property
    def backbone(self) -> ViT: ...
    def __call__(self, images: Tensor) -> Iterator[Tokens]: ...


def write(
    folder: Path, images: Sequence[Pixels], labels: Sequence[Labels], maps: Mapping[str, Sequence[Labels]],
    classes: Sequence[str], features: Sequence[tuple[str, Features]], image_px: int,
) -> None:  # fmt: skip
    """Draw ``folder/figures/{segmentation,components}.png``, as far as there is data, and their captions.

    Figures of these names that an earlier evaluation left are removed.

    Args:
        images: [H, W, 3] each; labels: [S, S] each, 0 .. C, of the whole image squeezed to a square.
        maps: by the evaluation's name, :class:`~pretrain.evaluation.Outcome`; one an image, at any
            side.
        classes: names of the labels 1 .. C.
        features: (name, features) of one checkpoint, or of several to compare: before and after a
            post-training. Held frozen.
        image_px: side of the squares that the features are taken of.
    """
    figures = folder / "figures"
    forget(figures, "segmentation|clusters|components")
    shown = {name: found for name, found in maps.items() if found}
    if images and shown:
        caption = "Images of the validation part, their labels, and what was predicted from frozen features."
        if OUTLINED in shown:
            caption += OUTLINED_CAPTION
        if any((part == 0).any() for part in labels):
            caption += " Hatched gray: not counted."
        figure = labels_figure(images, labels, shown, classes)
        save(figure, figures, "segmentation.png", "Segmentation and clusters", caption)
    if images and features:
        caption = "The first three principal components of the patches of all images together, as red, green and blue."
        if len(features) > 1:
            turned = "turned so that the colors come nearest to those of"
            caption += f" Each row has its own, {turned} {features[0][0]}."
        pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]
        figure = pca_figure(pictures, components(images, features, image_px))
        save(figure, figures, "components.png", "Principal components of the patches", caption)


def components(
    images: Sequence[Pixels], features: Sequence[tuple[str, Features]], image_px: int
) -> dict[str, list[Tensor]]:
    """The colors of the patches of every image by checkpoint, [h, w, 3] in [0, 1] each; of images [H, W, 3]
    squeezed to squares of ``image_px``, rounded to whole patches."""
    first: Tensor | None = None
    found: dict[str, list[Tensor]] = {}
    for name, seen in features:
        patch = seen.backbone.patch_size
        side = max(1, round(image_px / patch))
        squares = torch.stack([resized(image, (side * patch, side * patch)) for image in images])
        with torch.no_grad():
            own = torch.cat([tokens.patches.cpu() for tokens in seen(squares)])  # [n, N, D]
        colors = pca_colors(list(own), like=None if first is None else list(first))
        first = own if first is None else first
        found[name] = [part.unflatten(0, (side, side)) for part in colors]
    return found


def labels_figure(
    images: Sequence[Pixels],
    labels: Sequence[Labels],
    maps: Mapping[str, Sequence[Labels]],
    classes: Sequence[str],
    colors: Colors | None = None,
) -> Figure:
    """One row an image: itself, and over it its labels and each map; below, the classes that occur. The arguments
    are those of :func:`write`; without ``colors`` of the labels they are those that tell these images' best apart."""
    in_labels, in_maps = _shares(labels), _shares([part for found in maps.values() for part in found])
    # Classes of the labels come first, so that their colors do not depend on what was predicted.
    present = [*sorted(in_labels), *sorted(in_maps.keys() - in_labels.keys())]
    colors = colors or dict(zip(present, distinct_colors(len(present))))
    columns = ["image", "labels", *maps]
    width = COLUMN_IN * len(columns)
    often = [k for k, _ in (in_labels + in_maps).most_common()]
    names = [Patch(facecolor=colors[k], label=plain(classes[k - 1], 28)) for k in often]
    if len(names) > MOST_IN_LEGEND:
        names[MOST_IN_LEGEND:] = [Patch(alpha=0, label=f"and {len(names) - MOST_IN_LEGEND} more")]
    longest = max((len(str(patch.get_label())) for patch in names), default=0)
    n_columns = max(1, int(width / (0.5 + 0.075 * longest)))
    ratios = [min(image.shape[0] / image.shape[1], 1.0) for image in images]
    size = (width, COLUMN_IN * sum(ratios) + 0.3 + 0.1 * len(images) + 0.2 * -(-len(names) // n_columns))
    figure, axes = grid_of_axes(len(images), len(columns), size, height_ratios=ratios)
    for i, (row, image, truth) in enumerate(zip(axes, images, labels)):
        bare(row[0]).imshow(image)
        bare(row[1]).imshow(painted(image, truth, colors))
        for axis, (name, found) in zip(row[2:], maps.items()):
            bare(axis).imshow(painted(image, found[i], colors, truth if name == OUTLINED else None))
    for axis, title in zip(axes[0], columns):
        axis.set_title(title.replace("_", " "), fontsize=10)
    if names:
        figure.legend(handles=names, loc="outside lower center", ncols=n_columns, fontsize=8, frameon=False)
    return figure


def _shares(maps: Sequence[Labels]) -> Counter[int]:
    """{label: pixels, a map being one} over all maps, without 0."""
    shares: Counter[int] = Counter()
    for part in maps:
        for label, count in zip(*np.unique(part[part > 0], return_counts=True)):
            shares[int(label)] += count / part.size
    return shares


def painted(
    image: Pixels, labels: Labels, colors: Colors, outlined: Labels | None = None
) -> NDArray[np.float64]:
    """The image in gray under the colors of its labels, float [h, w, 3] in [0, 1]; label 0 hatched.

    Args:
        image: [H, W, 3]; labels: [S, S], of the whole image.
        outlined: [T, T], labels whose outlines are drawn on top, in black on white.
    """
    scale = SIDE_PX / max(image.shape[:2])
    size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    pixels = resized(image, size).permute(1, 2, 0).numpy() / 255
    here = nearest(labels, *size).numpy()
    table = np.zeros((int(here.max()) + 1, 3))
    for label, color in colors.items():
        if label < len(table):
            table[label] = color
    hatch = np.where(np.indices(size).sum(0) // 5 % 2, *HATCHED)
    colored = np.where((here == 0)[..., None], hatch[..., None], table[here])
    gray = 0.3 + 0.7 * pixels.mean(-1, keepdims=True)  # black would darken the colors
    mixed = SHARE * colored + (1 - SHARE) * gray
    if outlined is not None:
        truth = nearest(outlined, *size).numpy()
        edges = np.zeros(size, bool)  # whose neighbor to the right or below has another label
        edges[:, :-1] |= truth[:, 1:] != truth[:, :-1]
        edges[:-1] |= truth[1:] != truth[:-1]
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        mixed[cv2.dilate(edges.astype(np.uint8), cross) > 0] = 1.0
        mixed[edges] = 0.0
    return mixed
