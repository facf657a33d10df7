"""Predictions of a split in COCO's result format, and COCO's box and mask AP of them."""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from det_plugin.torchvision_engine.coco import CocoSplit, Picture, read_json
from det_plugin.torchvision_engine.coco_api import CocoApi, coco_api
from det_plugin.torchvision_engine.loader import EvalSamples, batches
from pretrain.distributed import rank, world_size

Prediction = dict[str, Any]
# What COCOeval.stats holds first, and our names; then the classes by name.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


@torch.no_grad()
def predict(
    model: nn.Module,
    split: CocoSplit,
    *,
    image_size_px: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """All detections of a split; every rank takes its share and gets the whole, in the order of the pictures.

    Args:
        model: detector of :func:`build_model`; in evaluation mode afterwards.
        progress: is told (pictures done, of this rank's).
    """
    model.eval()
    mine = list(range(rank(), len(split.pictures), world_size()))
    steps = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    found: dict[int, list[Prediction]] = {}
    for samples in batches(EvalSamples(split, image_size_px), steps, workers, device):
        detections = model([sample["image"].to(device, non_blocking=True) for sample in samples])
        for sample, detection in zip(samples, detections):
            resized = sample["image"].shape[1:]
            own = {key: value.float().cpu() if value.is_floating_point() else value.cpu() for key, value in detection.items()}
            found[sample["index"]] = as_coco(own, split.pictures[sample["index"]], (resized[0], resized[1]), split.category_ids)
        if progress is not None:
            progress(len(found), len(mine))
    if world_size() > 1:
        shares: list[Any] = [None] * world_size()
        dist.all_gather_object(shares, found)
        found = {index: own for share in shares for index, own in share.items()}
    return [prediction for index in sorted(found) for prediction in found[index]]


def as_coco(
    detection: Mapping[str, Tensor], picture: Picture, resized: tuple[int, int], category_ids: Sequence[int]
) -> list[Prediction]:
    """A detector's output for one image -> COCO results in the picture's own pixels.

    Args:
        detection: ``boxes`` [N, 4] in pixels of the resized image, ``labels`` [N] from 1, ``scores`` [N], ``masks``
            [N, 1, s, s] probabilities under the boxes; on the CPU.
        resized: height, width of what the detector saw, without padding.
    """
    scale = torch.tensor([picture.width / resized[1], picture.height / resized[0]]).repeat(2)
    limit = torch.tensor([picture.width, picture.height], dtype=torch.float32).repeat(2)
    boxes = (detection["boxes"] * scale).clamp(min=0).minimum(limit)
    kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
    results = []
    for i in kept.tolist():  # one by one: 100 pasted masks of a large picture would not fit anywhere
        mask = paste_masks_in_image(detection["masks"][i : i + 1], boxes[i : i + 1], (picture.height, picture.width))
        x0, y0, x1, y1 = boxes[i].tolist()
        results.append(
            {
                "image_id": picture.id,
                "category_id": category_ids[int(detection["labels"][i]) - 1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(detection["scores"][i]),
                "segmentation": encode_mask((mask[0, 0] > 0.5).numpy()),
            }
        )
    return results


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """[H, W] bool -> an RLE that JSON can hold."""
    rle = coco_api().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def save_predictions(predictions: list[Prediction], path: Path) -> Path:
    """COCO's result file, replaced in one step."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(predictions))
    os.replace(temporary, path)
    return path


def coco_metrics(annotations: Path, predictions: list[Prediction]) -> dict[str, Any]:
    """COCO's AP in percent: ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small`` / ``_medium`` / ``_large``, ``box_ap_classes``
    (by name), and the same of masks. What has no ground truth is left out.

    Args:
        annotations: COCO instances file.
        predictions: of :func:`predict`.
    """
    api, quiet = coco_api(), io.StringIO()
    with contextlib.redirect_stdout(quiet):
        truth = api.COCO()
        truth.dataset = read_json(annotations)
        truth.createIndex()
    metrics: dict[str, Any] = {}
    for kind, iou_type in KINDS.items():
        with contextlib.redirect_stdout(quiet):
            evaluation = api.COCOeval(truth, _results(truth, predictions, iou_type, api), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, value in zip(SUMMARY, evaluation.stats):
            if value >= 0:
                metrics[f"{kind}_{name}"] = 100 * float(value)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all areas, most detections
        classes = {truth.cats[id]["name"]: precision[:, :, k] for k, id in enumerate(evaluation.params.catIds)}
        metrics[f"{kind}_ap_classes"] = {name: 100 * float(p.mean()) for name, p in classes.items() if p.max(initial=-1) > -1}
    return metrics


def _results(truth: Any, predictions: list[Prediction], iou_type: str, api: CocoApi) -> Any:
    """What ``loadRes`` makes of predictions, of none too. An object's size is that of its box or of its mask (Detectron2)."""
    if iou_type == "segm":
        areas = [float(api.mask.area(prediction["segmentation"])) for prediction in predictions]
    else:
        areas = [prediction["bbox"][2] * prediction["bbox"][3] for prediction in predictions]
    results = api.COCO()
    results.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
    results.dataset["annotations"] = [
        {**prediction, "id": i + 1, "iscrowd": 0, "area": area} for i, (prediction, area) in enumerate(zip(predictions, areas))
    ]
    results.createIndex()
    return results


def mean_ap(metrics: Mapping[str, Any]) -> str:
    """One line for people."""
    parts = [f"{kind} AP {metrics.get(f'{kind}_ap', math.nan):.2f}" for kind in KINDS]
    return ", ".join(parts)
