"""What segmentations of frozen features share: predictions at pixels, counted against labels, and mIoU.

Which cluster stands for which class follows Leopart's public code, which NeCo's and open-hummingbird-eval's
keep (class PredsmIoU there): one to one by the largest sum of IoUs; many to one by the largest precision of
each cluster.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.datasets import LabelSet
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features, check_varied, patch_maps
from pretrain.signals import StopSignals

UNMATCHED = -1


def confusion_of(
    predict: Callable[[Tensor], Tensor],
    features: Features,
    val: LabelSet,
    side: int,
    label_px: int,
    map_px: int,
    n_shown: int,
    signals: StopSignals | None = None,
) -> tuple[Tensor, list[NDArray[np.int32]]]:
    """Pixels of the validation part by prediction and label, int64 [C, C] of :func:`count_pairs` on the CPU,
    and the predictions of the first ``n_shown`` images, [map_px, map_px].

    Args:
        predict: patch features [b, N, D] -> scores of the classes [b, N, C], which are enlarged bilinearly.
        side: of the images, squeezed.
        label_px: side of the maps that are compared.

    Raises:
        UserError: no pixel is counted; all patches have the same features.
    """
    n_classes = len(val.classes)
    shown: list[NDArray[np.int32]] = []
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for images, labels in val.squares(side, side, FORWARD_BATCH):
        for part in patch_maps(features, images):  # one
            if not confusion.any():
                check_varied(part.flatten(0, 1), signals)
            scores = predict(part)
            pixels = predict_pixels(scores, label_px)
            confusion += count_pairs(pixels, shrink(labels, label_px), n_classes, n_classes).cpu()
            if missing := n_shown - len(shown):
                shown += [*(predict_pixels(scores[:missing], map_px) + 1).int().cpu().numpy()]
    if not confusion.any():
        raise UserError(f"{val.name}: no pixel of the validation part is counted")
    return confusion, shown


def predict_pixels(scores: Tensor, side_px: int) -> Tensor:
    """Scores on a square patch grid [b, N, C] to the best class of each pixel [b, side, side], after
    bilinear upsampling."""
    grid = round(scores.shape[1] ** 0.5)
    maps = scores.transpose(1, 2).unflatten(2, (grid, grid))
    # One image at a time: 150 classes at 224 px are 30 MB each.
    sized = (F.interpolate(one, size=(side_px, side_px), mode="bilinear") for one in maps.split(1))
    return torch.cat([one.argmax(1) for one in sized])


def shrink(labels: Tensor, side: int) -> Tensor:
    """[..., S, S] -> [..., side, side] by torch's ``nearest``: sample floor(i S / side)."""
    places = torch.arange(side) * labels.shape[-1] // side
    return labels[..., places[:, None], places]


def count_pairs(predicted: Tensor, labels: Tensor, n_predicted: int, n_classes: int) -> Tensor:
    """Pixels by what was predicted and by their label: int64 [K, C], on the device of ``predicted``.

    Args:
        predicted: 0 .. K - 1, of any shape: clusters, or classes less one.
        labels: the same shape, 1 .. C; 0 is not counted.
    """
    labels = labels.to(predicted.device)
    counted = labels > 0
    pairs = predicted[counted].long() * n_classes + labels[counted].long() - 1
    return torch.bincount(pairs, minlength=n_predicted * n_classes).view(n_predicted, n_classes)


def hungarian(confusion: Tensor) -> Tensor:
    """The one-to-one assignment of the largest sum of IoUs, from :func:`count_pairs`: [K, C] -> [K] int64,
    the class 0 .. C - 1 of each cluster, ``UNMATCHED`` for K - C of them if K > C. (Leopart makes background
    of those; no protocol matches one to one with K > C.)
    """
    from scipy.optimize import linear_sum_assignment  # half a second

    both = confusion.double()
    union = both.sum(0) + both.sum(1, keepdim=True) - both  # [K, C]
    clusters, classes = linear_sum_assignment((both / union.clamp(min=1)).cpu().numpy(), maximize=True)
    assignment = torch.full((len(confusion),), UNMATCHED)
    assignment[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return assignment.to(confusion.device)


def greedy(confusion: Tensor) -> Tensor:
    """Many to one: the class of most of each cluster's pixels (precision), the first of equals. [K, C] ->
    [K] int64."""
    return confusion.argmax(1)


def class_ious(confusion: Tensor, assignment: Tensor | None = None) -> Tensor:
    """IoU of each class in percent, [C] float64; NaN for a class of no pixel in labels and predictions.

    Args:
        confusion: int64 [K, C] of :func:`count_pairs`.
        assignment: [K], the class of each cluster; none: the identity (K = C).
    """
    n_clusters, n_classes = confusion.shape
    if assignment is None:
        assert n_clusters == n_classes, confusion.shape
        assignment = torch.arange(n_classes, device=confusion.device)
    stands_for = assignment[:, None] == torch.arange(n_classes, device=confusion.device)  # [K, C]
    both = (confusion * stands_for).sum(0)
    predicted = (confusion.sum(1, keepdim=True) * stands_for).sum(0)
    return 100.0 * both.double() / (predicted + confusion.sum(0) - both)  # 0 / 0 is NaN


def mean_iou(confusion: Tensor, assignment: Tensor | None = None) -> float:
    """Mean of :func:`class_ious` over the classes that occur in labels or predictions.

    Of a whole benchmark, every class of which occurs, it is Leopart's; a class that does not occur counts 0
    there.
    """
    return class_ious(confusion, assignment).nanmean().item()


def n_present(confusion: Tensor) -> int:
    """How many classes occur in the labels."""
    return int((confusion.sum(0) > 0).sum())


def tell_untrained(trained: Tensor, confusion: Tensor, classes: Sequence[str], task: str) -> None:
    """Warn of classes that the validation part has and no training image: their IoU is 0, whatever the features
    are worth.

    Args:
        trained: bool [C], the classes that occur in the training part.
    """
    without = [name for name, is_there in zip(classes, (confusion.sum(0) > 0) & ~trained.cpu()) if is_there]
    if without:
        told = f"{len(without)} classes of the validation part have no training pixel, so their IoU is 0"
        warnings.warn(f"{task}: {told}; the first: {without[0]}", stacklevel=3)


def named_ious(ious: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """IoUs [C] by the names of the classes, without those that do not occur (JSON has no NaN)."""
    return {name: iou for name, iou in zip(classes, ious.tolist(), strict=True) if iou == iou}
