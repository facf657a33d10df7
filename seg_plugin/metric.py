"""mIoU as MMSegmentation counts it, but unrounded, and with each class's IoU."""

from typing import Any

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from pretrain import distributed


@METRICS.register_module()
class PosfieldIoU(IoUMetric):
    """Adds up each class's intersection and union over the whole data set, then divides.

    Attributes:
        per_class: {class name: IoU in percent} of the last evaluation, without classes that are neither
            present nor predicted.
    """

    per_class: dict[str, float] = {}

    def evaluate(self, size: int) -> dict[str, float]:
        """The metrics of ``size`` images, on every process. The processes took the images in turns; each
        image counts once.

        mmengine exchanges results by files in the working directory, which machines may not share.
        """
        shares = distributed.gather_objects(self.results)
        # All have one length: if the images do not divide, the sampler starts over after the last image.
        metrics = self.compute_metrics([counts for turn in zip(*shares) for counts in turn][:size])
        self.results.clear()
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()} if self.prefix else metrics

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """mIoU, mAcc, aAcc in percent, from each image's (intersect, union, prediction, label) pixel counts
        [classes].

        The means leave out classes without a pixel (IoU) or without a labeled pixel (Acc).
        """
        if self.format_only:
            return super().compute_metrics(results)
        intersect, union, _, label = (
            torch.stack(counts).double().sum(0) for counts in zip(*results)
        )  # each [classes]
        iou, accuracy = 100 * intersect / union, 100 * intersect / label  # nan where a class has no pixel
        names = self.dataset_meta["classes"]
        self.per_class = {name: value for name, value in zip(names, iou.tolist()) if value == value}
        metrics: dict[str, Any] = {
            "mIoU": iou.nanmean(),
            "mAcc": accuracy.nanmean(),
            "aAcc": 100 * intersect.sum() / label.sum(),
        }
        return {name: float(value) for name, value in metrics.items()}
