"""Draw a detector's predictions beside the ground truth, as pages of images (a run folder of either engine).

posfield analyze detections --run runs/det --data coco            (writes runs/det/figures/val_*.png, which the report shows)

The predictions are those of the run's last evaluation. Where there are none (the training split, other
images), the run's last checkpoint makes them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from det_plugin.coco.annotations import CocoSplit, Picture, read_split
from det_plugin.coco.metrics import Prediction
from det_plugin.figures import MIN_SCORE, SHOWN, draw_page, spread
from det_plugin.predict import load_detector
from pretrain.data.share import share_of
from pretrain.errors import TRUST_HELP, UserError

# What the torchvision engine and Detectron2's evaluator call their results.
LEFT = ("predictions.json", "coco_instances_results.json", "inference/coco_instances_results.json")
ROUNDING_PX = 0.01  # of a box that ends at its image's edge


def choose(split: CocoSplit, count: int, ids: str | None) -> list[Picture]:
    """Images by id (``397133,37777``), or some of all."""
    if ids is None:
        return spread(split, count)
    by_id = {str(picture.id): picture for picture in split.pictures}
    for wanted in ids.split(","):
        if wanted.strip() not in by_id:
            raise UserError(f"--images: {split.file} has no image {wanted.strip()!r}")
    return [by_id[wanted.strip()] for wanted in ids.split(",")]


def are_of(found: list[Prediction], split: CocoSplit) -> bool:
    """Whether predictions can be of a split: each has one of its images and classes, and a mask of that size or
    a box within it.

    Other data may have the same ids.
    """
    sizes = {picture.id: [picture.height, picture.width] for picture in split.pictures}
    fits = (p["image_id"] in sizes and _fits(p, sizes[p["image_id"]]) for p in found)
    return bool(found) and all(fits) and {p["category_id"] for p in found} <= set(split.category_ids)


def _fits(prediction: Prediction, size: list[int]) -> bool:
    """Whether it can be of an image of a size (height, width)."""
    if "segmentation" in prediction:
        return bool(prediction["segmentation"]["size"] == size)
    x, y, width, height = prediction["bbox"]
    return bool(y + height <= size[0] + ROUNDING_PX and x + width <= size[1] + ROUNDING_PX)


def predictions_of(
    folder: Path, split: CocoSplit, pictures: list[Picture], device: str, evaluated: bool, trust: bool
) -> list[Prediction]:
    """The run's own predictions of this split, if it was evaluated on it, or new ones of these images."""
    left = next((folder / name for name in LEFT if (folder / name).is_file()), None)
    if evaluated and left is not None:
        found: list[Prediction] = json.loads(left.read_text())
        if are_of(found, split):
            print(f"predictions: {left}")
            return found
    detector = load_detector(folder, device, trust, checkpoint="last")
    if tuple(detector.classes) != split.category_ids:
        raise UserError(f"--data: {split.file} has other categories than those that {folder} was trained on")
    print(f"predictions: made now by {folder}")
    made: list[Prediction] = []
    for picture in pictures:
        try:
            pixels = split.load(picture)
        except UserError:  # the page names it
            continue
        made += [{"image_id": picture.id, **own} for own in detector.predict(pixels).results]
    return made


def main(arguments: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder of a fine-tuning")
    add("--data", type=Path, required=True, metavar="COCO", help="as for posfield detect")
    add("--split", default="val", choices=("train", "val"), help="(%(default)s)")
    add("--count", type=int, default=16, metavar="N", help="pictures, evenly over the split (%(default)s)")
    add("--images", metavar="ID,ID,...", help="these instead, by COCO's image ids")
    add("--min-score", type=float, default=MIN_SCORE, metavar="S", help="(%(default)s)")
    add("--output", type=Path, metavar="DIR", help="(figures/ in the run folder)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    how = dict[str, Any](num_classes=None, training=False, val_share=share_of(options.run))
    split = read_split(options.data, options.split, **how)
    pictures = choose(split, max(options.count, 1), options.images)
    evaluated = options.split == "val"
    predictions = predictions_of(options.run, split, pictures, options.device, evaluated, options.trust)
    output = options.output or options.run / "figures"
    for page, first in enumerate(range(0, len(pictures), SHOWN), 1):
        own = pictures[first : first + SHOWN]
        print(draw_page(split, own, predictions, output / f"{options.split}_{page}.png", options.min_score))
