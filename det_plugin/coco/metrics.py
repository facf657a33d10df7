"""COCO's metrics of predictions in its result format."""

import contextlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from det_plugin.coco.annotations import CocoSplit, box_polygon, read_truth
from det_plugin.coco.layout import CocoFiles
from det_plugin.coco.masks import coco_api
from det_plugin.protocol import DetectionProtocol
from pretrain.distributed import is_main
from pretrain.errors import UserError

# category_id, bbox (x, y, width, height), score, image_id; with masks segmentation (RLE)
Prediction = dict[str, Any]
# Our names of what COCOeval.stats holds first.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


def coco_metrics(
    annotations: Path | CocoFiles, predictions: list[Prediction], crowds: str = "ignored", masks: str = "auto"
) -> dict[str, Any]:
    """COCO's AP in percent: ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small`` / ``_medium`` /
    ``_large``, ``box_ap_classes`` (by name), and the same for masks. Metrics without ground truth are left
    out.

    Args:
        annotations: of a split, or a COCO instances file.
        crowds, masks: fields of the protocol. Without masks, predictions need none.
    """
    metrics: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, own in _truths(annotations, crowds, masks).items():
            truth, iou_type = _indexed(own), KINDS[kind]
            evaluation = _evaluated(truth, predictions, iou_type)
            evaluation.summarize()
            named = zip(SUMMARY, evaluation.stats)
            metrics |= {f"{kind}_{name}": 100 * float(value) for name, value in named if value >= 0}
            # [IoU, recall, class], all areas, most detections
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
            names = [truth.cats[id]["name"] for id in evaluation.params.catIds]
            by_class = {name: precision[:, :, k] for k, name in enumerate(names)}
            metrics[f"{kind}_ap_classes"] = {
                name: 100 * float(p.mean()) for name, p in by_class.items() if p.max(initial=-1) > -1
            }
    return metrics


def _truths(annotations: Path | CocoFiles, crowds: str, masks: str) -> dict[str, dict[str, Any]]:
    """{kind of :data:`KINDS`: what it is counted against}, without masks where there are none to count."""
    content = read_truth(annotations, crowds, masks)
    of_masks = None if masks == "off" else _of_masks(content)
    return {"box": content} if of_masks is None else {"box": content, "mask": of_masks}


def _of_masks(content: dict[str, Any]) -> dict[str, Any] | None:
    """The truth that masks are counted against: objects that only have a box are ignored regions, which no
    detection in them is right or wrong for. None where no object has a mask."""
    annotations = content["annotations"]
    alone = [a.get("box_alone", False) for a in annotations]
    if any(alone) and all(is_alone or a["iscrowd"] for is_alone, a in zip(alone, annotations)):
        return None
    changed = []
    for a, is_alone in zip(annotations, alone):
        if is_alone:
            x, y, w, h = a["bbox"]
            a = {**a, "iscrowd": 1, "segmentation": [box_polygon((x, y, x + w, y + h))]}
        changed.append(a)
    return {**content, "annotations": changed}


def check_evaluation(split: CocoSplit, protocol: DetectionProtocol) -> None:
    """Evaluate empty predictions on the main process: what breaks the metrics shows before a training.

    All objects are taken as one class, in one range of areas: 320 times fewer steps on COCO. COCO's evaluation still
    reads every field of every annotation; a class only chooses annotations, by an id that ``read_split`` has
    checked, and each range compares the same area with other bounds.

    Raises:
        UserError: COCO's code cannot evaluate the file; names it.
    """
    if not is_main():
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for kind, own in _truths(split.source, protocol.crowds, protocol.masks).items():
                one = own["categories"][:1]
                objects = [{**a, "category_id": one[0]["id"]} for a in own["annotations"]]
                truth = _indexed({**own, "categories": one, "annotations": objects})
                _evaluated(truth, [], KINDS[kind], n_ranges=1)
    except UserError:
        raise
    except Exception as error:  # pycocotools raises whatever comes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"data: {split.file} cannot be evaluated ({reason}); mend that entry") from error


def _evaluated(truth: Any, predictions: list[Prediction], iou_type: str, n_ranges: int | None = None) -> Any:
    """COCO's evaluation, accumulated; in the first ``n_ranges`` ranges of areas (None: all)."""
    evaluation = coco_api().COCOeval(truth, _results(truth, predictions, iou_type), iou_type)
    of_areas = evaluation.params
    of_areas.areaRng, of_areas.areaRngLbl = of_areas.areaRng[:n_ranges], of_areas.areaRngLbl[:n_ranges]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _indexed(content: dict[str, Any]) -> Any:
    coco = coco_api().COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _results(truth: Any, predictions: list[Prediction], iou_type: str) -> Any:
    """What ``loadRes`` makes of predictions, also of none, with Detectron2's areas."""
    if iou_type == "segm":
        areas = [float(coco_api().mask.area(prediction["segmentation"])) for prediction in predictions]
    else:
        areas = [prediction["bbox"][2] * prediction["bbox"][3] for prediction in predictions]
    annotations = [
        {**prediction, "id": i, "iscrowd": 0, "area": area}
        for i, (prediction, area) in enumerate(zip(predictions, areas), 1)
    ]
    same = {key: truth.dataset[key] for key in ("images", "categories")}
    return _indexed({**same, "annotations": annotations})


def in_words(metrics: Mapping[str, Any]) -> str:
    """One line for people. A metric without ground truth is ``nan``; masks that were not looked for have none."""
    parts = []
    for kind in KINDS:
        if kind == "mask" and not any(key.startswith("mask_") for key in metrics):
            continue
        names = {name: name.removeprefix("ap_").replace("ap", "AP") for name in SUMMARY}
        mean, *others = (f"{names[n]} {metrics.get(f'{kind}_{n}', math.nan):.2f}" for n in SUMMARY)
        parts.append(f"{kind} {mean} ({', '.join(others)})")
    return ", ".join(parts)
