"""Predictions of a split in COCO's result format, and their box and mask AP."""

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from det_plugin.coco.annotations import CocoSplit, read_truth
from det_plugin.coco.api import CocoApi, coco_api
from det_plugin.torchvision_engine.loader import EvalSamples, batches
from pretrain.distributed import gather_objects, rank, world_size

Prediction = dict[str, Any]
# Our names of what COCOeval.stats holds first.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


@torch.no_grad()
def detect(
    model: nn.Module,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    category_ids: Sequence[int],
    device: torch.device,
) -> list[list[Prediction]]:
    """Detections of some images, best first, as COCO results without ``image_id``.

    Args:
        model: detector of :func:`build_model` in evaluation mode.
        images: uint8 [3, h_i, w_i], resized for the detector.
        sizes: height, width of each original image. The results are in its pixels.
    """
    found = model([image.to(device, non_blocking=True) for image in images])
    results = []
    for image, size, detection in zip(images, sizes, found):
        own = {key: value.cpu() for key, value in detection.items()}
        results.append(as_coco(own, (image.shape[1], image.shape[2]), size, category_ids))
    return results


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
    """All detections of a split, in the order of the images. Each rank does its share and gets the whole.

    Args:
        model: detector of :func:`build_model`. It is in evaluation mode afterwards.
        progress: called with (images done, images in all) of this rank's share.
    """
    model.eval()
    mine = list(range(rank(), len(split.pictures), world_size()))
    steps = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    found: dict[int, list[Prediction]] = {}
    for samples in batches(EvalSamples(split, image_size_px), steps, workers, device):
        pictures = [split.pictures[sample["index"]] for sample in samples]
        sizes = [(picture.height, picture.width) for picture in pictures]
        detections = detect(model, [sample["image"] for sample in samples], sizes, split.category_ids, device)
        for sample, picture, own in zip(samples, pictures, detections):
            found[sample["index"]] = [{"image_id": picture.id, **prediction} for prediction in own]
        if progress is not None:
            progress(len(found), len(mine))
    found = {index: own for share in gather_objects(found) for index, own in share.items()}
    return [prediction for index in sorted(found) for prediction in found[index]]


def as_coco(
    detection: Mapping[str, Tensor],
    resized: tuple[int, int],
    size: tuple[int, int],
    category_ids: Sequence[int],
) -> list[Prediction]:
    """A detector's output for one image -> COCO results in the image's own pixels (Detectron2's
    ``detector_postprocess``).

    Args:
        detection: ``boxes`` [N, 4] in pixels of the resized image, ``labels`` [N] from 1, ``scores`` [N],
            ``masks`` [N, 1, s, s] probabilities under the boxes; on the CPU.
        resized, size: height, width of what the detector saw (without padding), and of the image.
    """
    scale = torch.tensor([size[1] / resized[1], size[0] / resized[0]]).repeat(2)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32).repeat(2)
    boxes = (detection["boxes"] * scale).clamp(min=0).minimum(limit)
    kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
    results = []
    for i in kept.tolist():
        rows, columns, chances = paste_mask(detection["masks"][i, 0], boxes[i], size)
        mask = np.zeros(
            size, np.uint8, order="F"
        )  # one by one: 100 masks of a large image would not fit into memory
        mask[rows, columns] = (chances >= 0.5).numpy()
        results.append(
            {
                "category_id": category_ids[int(detection["labels"][i]) - 1],
                "bbox": [*boxes[i, :2].tolist(), *(boxes[i, 2:] - boxes[i, :2]).tolist()],
                "score": float(detection["scores"][i]),
                "segmentation": encode_mask(mask),
            }
        )
    return results


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[slice, slice, Tensor]:
    """Paste the probabilities [s, s] of a box [4] (pixels) into its image, as Detectron2's
    ``paste_masks_in_image``.

    Args:
        size: height, width of the image.

    Returns:
        rows and columns of the image, and the probabilities there, bilinear at the pixels' centers. Elsewhere
        they are 0.
    """
    sides = []
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first, last = (
            max(int(low.floor()) - 1, 0),
            min(int(high.ceil()) + 1, length),
        )  # a pixel around the box is enough
        centers = torch.arange(first, last, dtype=torch.float32) + 0.5
        sides.append((slice(first, last), (centers - low) / (high - low) * 2 - 1))
    (rows, y), (columns, x) = sides
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # [h, w, 2], x first
    return rows, columns, F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """[H, W] of 0 and 1 -> an RLE that JSON can hold."""
    rle = coco_api().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def coco_metrics(annotations: Path, predictions: list[Prediction]) -> dict[str, Any]:
    """COCO's AP in percent: ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small`` / ``_medium`` /
    ``_large``, ``box_ap_classes`` (by name), and the same for masks. Metrics without ground truth are left
    out.

    Args:
        annotations: COCO instances file.
        predictions: of :func:`predict`.
    """
    api, quiet = coco_api(), io.StringIO()
    with contextlib.redirect_stdout(quiet):
        truth = api.COCO()
        truth.dataset = read_truth(annotations)
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
        precision = evaluation.eval["precision"][
            :, :, :, 0, -1
        ]  # [IoU, recall, class], all areas, most detections
        classes = {
            truth.cats[id]["name"]: precision[:, :, k] for k, id in enumerate(evaluation.params.catIds)
        }
        metrics[f"{kind}_ap_classes"] = {
            name: 100 * float(p.mean()) for name, p in classes.items() if p.max(initial=-1) > -1
        }
    return metrics


def _results(truth: Any, predictions: list[Prediction], iou_type: str, api: CocoApi) -> Any:
    """What ``loadRes`` makes of predictions, also of none. An object's area is that of its box or its mask
    (Detectron2)."""
    if iou_type == "segm":
        areas = [float(api.mask.area(prediction["segmentation"])) for prediction in predictions]
    else:
        areas = [prediction["bbox"][2] * prediction["bbox"][3] for prediction in predictions]
    results = api.COCO()
    results.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
    results.dataset["annotations"] = [
        {**prediction, "id": i + 1, "iscrowd": 0, "area": area}
        for i, (prediction, area) in enumerate(zip(predictions, areas))
    ]
    results.createIndex()
    return results


def in_words(metrics: Mapping[str, Any]) -> str:
    """One line for people. A metric without ground truth is ``nan``."""
    parts = []
    for kind in KINDS:
        named = {
            name.removeprefix("ap_").replace("ap", "AP"): metrics.get(f"{kind}_{name}", math.nan)
            for name in SUMMARY
        }
        mean, *others = (f"{name} {value:.2f}" for name, value in named.items())
        parts.append(f"{kind} {mean} ({', '.join(others)})")
    return ", ".join(parts)
