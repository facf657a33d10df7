"""mIoU as MMSegmentation counts it, but unrounded, and with every class's IoU kept."""

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
        per_class: {class name: IoU in percent} of the last evaluation; a class that is neither there nor predicted is left out.
    """

    per_class: dict[str, float] = {}

    def evaluate(self, size: int) -> dict[str, float]:
        """The metrics, on every process, of the ``size`` images that the processes have shared in turns; each counts once.

        mmengine's own way goes through files in the working directory, which machines need not share.
        """
        shares = distributed.gather_objects(self.results)
        # All are of one length: where the images do not divide, the sampler begins again, behind the last image.
        metrics = self.compute_metrics([counts for turn in zip(*shares) for counts in turn][:size])
        self.results.clear()
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()} if self.prefix else metrics

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """mIoU, mAcc, aAcc in percent, of the (intersect, union, prediction, label) pixel counts [classes] of every image.

        Classes without a pixel (IoU), or without a labeled pixel (Acc), are left out of the means.
        """
        if self.format_only:
            return super().compute_metrics(results)
        intersect, union, _, label = (torch.stack(counts).double().sum(0) for counts in zip(*results))  # each [classes]
        iou, accuracy = 100 * intersect / union, 100 * intersect / label  # nan where a class has no pixel
        names = self.dataset_meta["classes"]
        self.per_class = {name: value for name, value in zip(names, iou.tolist()) if value == value}
        metrics: dict[str, Any] = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": 100 * intersect.sum() / label.sum()}
        return {name: float(value) for name, value in metrics.items()}
