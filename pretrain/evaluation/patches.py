"""Patch features and labels of pixels: what segmentations of frozen features share."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.datasets import LabelSet
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features, finite
from pretrain.evaluation.matching import count_pairs
from pretrain.views.boxes import TRIES, draw_crops


def confusion_of(
    predict: Callable[[Tensor], Tensor],
    features: Features,
    val: LabelSet,
    side: int,
    label_px: int,
    map_px: int,
    n_shown: int,
) -> tuple[Tensor, list[NDArray[np.int32]]]:
    """Pixels of the validation part by prediction and label, and the predictions of the first images.

    Args:
        predict: patch features [b, N, D] -> scores of the classes [b, N, C], which are enlarged bilinearly.
        side: of the images, squeezed.
        label_px: side of the maps that are compared.

    Returns:
        int64 [C, C] of :func:`~pretrain.evaluation.matching.count_pairs`, on the CPU, and ``n_shown``
        maps [map_px, map_px].

    Raises:
        UserError: no pixel is counted.
    """
    n_classes = len(val.classes)
    shown: list[NDArray[np.int32]] = []
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for images, labels in val.squares(side, side, FORWARD_BATCH):
        for part in patch_maps(features, images):  # one
            scores = predict(part)
            confusion += count_pairs(
                predict_pixels(scores, label_px), shrink(labels, label_px), n_classes, n_classes
            ).cpu()
            if missing := n_shown - len(shown):
                shown += [*(predict_pixels(scores[:missing], map_px) + 1).int().cpu().numpy()]
    if not confusion.any():
        raise UserError(f"{val.name}: no pixel of the validation part is counted")
    return confusion, shown


def patch_maps(features: Features, images: Tensor) -> Iterator[Tensor]:
    """Patch features [b, N, D] float32 of uint8 [n, 3, S, S], ``FORWARD_BATCH`` images at a time;
    a UserError where they are not finite."""
    for tokens in features(images):
        yield finite(tokens.patches).detach().float()


def whole_patches(image_px: int, features: Features) -> int:
    """``image_px`` rounded down to whole patches, with a message.

    512 px become 504 px with patches of 14, as in open-hummingbird-eval.

    Raises:
        UserError: it is less than a patch.
    """
    patch_px = features.backbone.patch_size
    if image_px < patch_px:
        raise UserError(f"image_px={image_px} is less than a patch of {patch_px}")
    if rest := image_px % patch_px:
        print(
            f"images of {image_px - rest} px, whole patches of {patch_px}, in place of image_px={image_px}",
            flush=True,
        )
    return image_px - rest


def cropped(
    rng: np.random.Generator,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int32],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A part of an image [H, W, 3] and of its labels [H, W], drawn as torchvision's RandomResizedCrop."""
    size_px, u = np.array([labels.shape], np.float64), rng.random((1, 1, 2 * TRIES + 2))
    left, top, right, bottom = draw_crops(size_px, np.array([scale]), ratio, u)[0, 0].astype(int)
    return pixels[top:bottom, left:right], labels[top:bottom, left:right]


def shrink(labels: Tensor, side: int) -> Tensor:
    """[..., S, S] -> [..., side, side] by torch's ``nearest``: sample floor(i S / side)."""
    places = torch.arange(side) * labels.shape[-1] // side
    return labels[..., places[:, None], places]


def predict_pixels(scores: Tensor, side_px: int) -> Tensor:
    """Scores on a square patch grid [b, N, C] to the best class of each pixel [b, side, side], after
    bilinear upsampling."""
    grid = round(scores.shape[1] ** 0.5)
    maps = scores.transpose(1, 2).unflatten(2, (grid, grid))
    # One image at a time: 150 classes at 224 px are 30 MB each.
    return torch.cat(
        [F.interpolate(m, size=(side_px, side_px), mode="bilinear").argmax(1) for m in maps.split(1)]
    )


def patch_counts(labels: NDArray[np.int32], patch_px: int, n_classes: int) -> NDArray[np.int64]:
    """Counted pixels of each class in each patch: labels [S, S] in 0 (not counted) .. C -> [N, C],
    row-major."""
    side, width = len(labels) // patch_px, n_classes + 1
    place = np.arange(len(labels)) // patch_px
    patches = place[:, None] * side + place  # [S, S]
    return np.bincount((patches * width + labels).ravel(), minlength=side**2 * width).reshape(-1, width)[
        :, 1:
    ]
