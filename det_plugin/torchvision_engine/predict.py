"""From images to detections in COCO's result format, in the images' own pixels; the evaluation of a split."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from det_plugin import best
from det_plugin.augment import evaluation_geometry
from det_plugin.coco.annotations import CocoSplit
from det_plugin.coco.masks import encode_mask
from det_plugin.coco.metrics import Prediction, coco_metrics
from det_plugin.loader import batches, to_tensor
from det_plugin.loop import Show
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine import folder
from det_plugin.torchvision_engine.loader import EvalSamples
from det_plugin.torchvision_engine.model import build_model
from pretrain.build import build_backbone
from pretrain.distributed import gather_objects, is_main, rank, world_size
from pretrain.errors import UserError
from pretrain.files import write_text

Size = tuple[int, int]  # height, width in pixels
EVAL_BATCH = 8  # images at a time; the outcome does not depend on it


def load_model(output: Path, trust: bool = False) -> tuple[GeneralizedRCNN, dict[str, Any], int]:
    """A run's last checkpoint as a detector on the CPU, its ``config.json``, and its iterations.

    Args:
        trust: changes nothing: all files of this engine are data.

    Raises:
        UserError: no run, or no checkpoint.
    """
    config, state = folder.read_config(output), folder.load_checkpoint(output)
    if state is None:
        raise UserError(f"output: {output} holds no checkpoint")
    vit = build_backbone(config["backbone"], None, **config["model_kwargs"])  # its weights come next
    model = build_model(vit, folder.protocol_of(config))
    model.load_state_dict(state["model"])
    return model, config, state["iteration"]


def detector(
    run: Path, device: torch.device, trust: bool = False, checkpoint: str = "auto"
) -> tuple[Any, ...]:
    """The parts of a :class:`det_plugin.predict.Detector`."""
    model, config, _ = load_model(run, trust)
    best.load(run, model, checkpoint)
    model.to(device).eval()
    protocol, classes = folder.protocol_of(config), folder.classes_of(run, config)

    def batch(images: Sequence[np.ndarray]) -> list[list[Prediction]]:
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        maps = [evaluation_geometry(size[::-1], protocol.image_size_px) for size in sizes]
        resized = [to_tensor(geometry.pixels(image)) for geometry, image in zip(maps, images)]
        return detect(model, resized, sizes, list(classes), device)

    return classes, protocol, batch


@torch.no_grad()
def detect(
    model: nn.Module,
    images: Sequence[Tensor],
    sizes: Sequence[Size],
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
    on_cpu = ({key: value.cpu() for key, value in own.items()} for own in found)
    seen = ((image.shape[1], image.shape[2]) for image in images)
    return [as_coco(own, a, b, category_ids) for own, a, b in zip(on_cpu, seen, sizes)]


def as_coco(
    detection: Mapping[str, Tensor], resized: Size, size: Size, category_ids: Sequence[int]
) -> list[Prediction]:
    """One image's output -> COCO results in its own pixels (Detectron2's ``detector_postprocess``).

    Args:
        detection: ``boxes`` [N, 4] in pixels of the resized image, ``labels`` [N] from 1, ``scores`` [N],
            of a mask head ``masks`` [N, 1, s, s] probabilities under the boxes; on the CPU.
        resized, size: height, width of what the detector saw (without padding), and of the image.
    """
    boxes, kept = in_own_pixels(
        detection["boxes"], torch.tensor(resized), torch.tensor(size, dtype=torch.float64)
    )
    results = []
    for i in kept.tolist():
        result = {
            "category_id": category_ids[int(detection["labels"][i]) - 1],
            "bbox": [*boxes[i, :2].tolist(), *(boxes[i, 2:] - boxes[i, :2]).tolist()],
            "score": float(detection["scores"][i]),
        }
        if "masks" in detection:
            rows, columns, chances = paste_mask(detection["masks"][i, 0], boxes[i], size)
            mask = np.zeros(size, np.uint8, order="F")  # one by one: 100 large ones would not fit into memory
            mask[rows, columns] = (chances >= 0.5).numpy()
            result["segmentation"] = encode_mask(mask)
        results.append(result)
    return results


def in_own_pixels(boxes: Tensor, resized: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of a resized image in pixels of the image, and which of them have an extent there.

    Args:
        boxes: [N, 4] float32, x0, y0, x1, y1.
        resized, size: [2], height and width; the size as float64.

    Returns:
        [N, 4] float32 and [M] int64.
    """
    scale = (size / resized).float().flip(0).repeat(2)
    boxes = (boxes * scale).clamp(min=0).minimum(size.float().flip(0).repeat(2))
    return boxes, torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> tuple[slice, slice, Tensor]:
    """Paste a box's probabilities [s, s] into its image (Detectron2's ``paste_masks_in_image``).

    Args:
        size: height, width of the image.

    Returns:
        rows and columns of the image, and the probabilities there, bilinear at the pixels' centers. Elsewhere
        they are 0.
    """
    sides = []
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        # A pixel around the box is enough
        first, last = max(int(low.floor()) - 1, 0), min(int(high.ceil()) + 1, length)
        centers = torch.arange(first, last, dtype=torch.float32) + 0.5
        sides.append((slice(first, last), (centers - low) / (high - low) * 2 - 1))
    (rows, y), (columns, x) = sides
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # [h, w, 2], x first
    return rows, columns, F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


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
    write_text(output / folder.PREDICTIONS, json.dumps(predictions) + "\n")
    return coco_metrics(split.source, predictions, protocol.crowds, protocol.masks), predictions
