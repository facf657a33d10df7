"""The evaluation of a split: predictions of all ranks, and COCO's metrics of them."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from det_plugin.coco.annotations import CocoSplit
from det_plugin.coco.metrics import Prediction, coco_metrics
from det_plugin.loader import batches
from det_plugin.loop import Show
from det_plugin.protocol import DetectionProtocol
from det_plugin.run import write_json
from det_plugin.torchvision_engine.folder import PREDICTIONS
from det_plugin.torchvision_engine.loader import EvalSamples
from det_plugin.torchvision_engine.predict import detect
from pretrain.distributed import gather_objects, is_main, rank, world_size

EVAL_BATCH = 8  # images at a time; the outcome does not depend on it


def predict_split(
    model: nn.Module,
    split: CocoSplit,
    image_size_px: int,
    *,
    workers: int,
    device: torch.device,
    show: Show | None = None,
) -> list[Prediction]:
    """All detections of a split, in the order of the images. Each rank does its share and gets the whole.

    Args:
        model: detector of :func:`build_model`. It is in evaluation mode afterwards.
    """
    model.eval()
    started, mine = time.monotonic(), range(rank(), len(split.pictures), world_size())
    steps = [list(mine[i : i + EVAL_BATCH]) for i in range(0, len(mine), EVAL_BATCH)]
    found: dict[int, list[Prediction]] = {}
    for samples in batches(EvalSamples(split, image_size_px), steps, workers, device):
        pictures = [split.pictures[sample["index"]] for sample in samples]
        sizes = [(picture.height, picture.width) for picture in pictures]
        detections = detect(model, [sample["image"] for sample in samples], sizes, split.category_ids, device)
        for sample, picture, own in zip(samples, pictures, detections):
            found[sample["index"]] = [{"image_id": picture.id, **prediction} for prediction in own]
        if show is not None:
            share = len(found) / len(mine)
            show(share, (time.monotonic() - started) * (1 / share - 1))
    found = {index: own for part in gather_objects(found) for index, own in part.items()}
    return [prediction for index in sorted(found) for prediction in found[index]]


def evaluate(
    model: nn.Module,
    split: CocoSplit,
    protocol: DetectionProtocol,
    *,
    workers: int,
    device: torch.device,
    output: Path,
    show: Show | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """COCO metrics (only on the main process) and predictions, which ``output/predictions.json`` gets."""
    size = protocol.image_size_px
    predictions = predict_split(model, split, size, workers=workers, device=device, show=show)
    if not is_main():
        return {}, predictions
    write_json(output / PREDICTIONS, predictions)
    return coco_metrics(split.file, predictions), predictions
