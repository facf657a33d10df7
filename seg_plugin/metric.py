"""mIoU as MMSegmentation counts it, but unrounded, and with every class's IoU kept."""

from typing import Any

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class PosfieldIoU(IoUMetric):
    """Adds up each class's intersection and union over the whole data set, then divides.

    Attributes:
        per_class: {class name: IoU in percent} of the last evaluation; a class that is neither there nor predicted is left out.
    """

    per_class: dict[str, float] = {}

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """mIoU, mAcc, aAcc in percent, of the (intersect, union, prediction, label) pixel counts [classes] of every image.

        Classes without a pixel (IoU), or without a labelled pixel (Acc), are left out of the means.
        """
        if self.format_only:
            return super().compute_metrics(results)
        intersect, union, _, label = (torch.stack(counts).double().sum(0) for counts in zip(*results))  # each [classes]
        iou, accuracy = 100 * intersect / union, 100 * intersect / label  # nan where a class has no pixel
        names = self.dataset_meta["classes"]
        self.per_class = {name: value for name, value in zip(names, iou.tolist()) if value == value}
        metrics: dict[str, Any] = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": 100 * intersect.sum() / label.sum()}
        return {name: float(value) for name, value in metrics.items()}
