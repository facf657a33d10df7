"""COCO's metrics of predictions in its result format."""

import contextlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from det_plugin.coco.annotations import CocoSplit, read_truth
from det_plugin.coco.masks import coco_api
from pretrain.distributed import is_main
from pretrain.errors import UserError

Prediction = dict[str, Any]  # category_id, bbox (x, y, width, height), score, segmentation (RLE), image_id
# Our names of what COCOeval.stats holds first.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"box": "bbox", "mask": "segm"}


def coco_metrics(annotations: Path, predictions: list[Prediction], crowds: str = "ignored") -> dict[str, Any]:
    """COCO's AP in percent: ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small`` / ``_medium`` /
    ``_large``, ``box_ap_classes`` (by name), and the same for masks. Metrics without ground truth are left
    out.

    Args:
        annotations: COCO instances file.
        crowds: ``ignored`` | ``objects``.
    """
    metrics: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(read_truth(annotations, crowds))
        for kind, iou_type in KINDS.items():
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


def check_evaluation(split: CocoSplit, crowds: str) -> None:
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
            content = read_truth(split.file, crowds)
            one = content["categories"][:1]
            objects = [{**a, "category_id": one[0]["id"]} for a in content["annotations"]]
            truth = _indexed({**content, "categories": one, "annotations": objects})
            for iou_type in KINDS.values():
                _evaluated(truth, [], iou_type, n_ranges=1)
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
    """One line for people. A metric without ground truth is ``nan``."""
    parts = []
    for kind in KINDS:
        names = {name: name.removeprefix("ap_").replace("ap", "AP") for name in SUMMARY}
        mean, *others = (f"{names[n]} {metrics.get(f'{kind}_{n}', math.nan):.2f}" for n in SUMMARY)
        parts.append(f"{kind} {mean} ({', '.join(others)})")
    return ", ".join(parts)
