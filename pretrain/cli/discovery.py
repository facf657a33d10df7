"""Object discovery without labels (LOST, TokenCut): one box an image from frozen features, and CorLoc, the
share of images it hits.

posfield evaluate discovery --weights runs/x/backbone.safetensors --data sets/VOC2007 --output analysis/voc07
posfield evaluate discovery --weights A.pth B.pth --data sets/coco --split train2014 --list coco_20k.txt \\
    --method lost --output D

--data is a Pascal VOC folder (trainval) or a COCO root. Images go in at their own size, padded to whole
patches, as in the public code of both; --size scales their shorter side. Leaves corloc.csv and
checkpoints/NAME/ of each with result.json, boxes.csv (one row an image) and images of found and true boxes.
"""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pretrain.analysis.feature_figures import Boxed, boxes_figure
from pretrain.analysis.figures import keep
from pretrain.cli import at_least, evaluation_parser, models_of
from pretrain.data.box_sets import BoxedImage, read_boxes
from pretrain.data.images import read_picture, spread
from pretrain.device import choose_device
from pretrain.eval_model import EvalModel
from pretrain.evaluation.discovery import METHODS, discover
from pretrain.evaluation.features import frozen_features
from pretrain.files import csv_text, write_text, writing
from pretrain.log import Progress
from pretrain.results.provenance import config_hash, file_hash
from pretrain.signals import StopSignals

PROTOCOL: dict[str, Any] = {"size": 0, "features": "keys", "max_images": 0, "no_hard": False}
CAPTION = "Green: true boxes. Dashed: what was found, red by LOST, blue by TokenCut."


def main(arguments: list[str]) -> None:
    """Parse, find, count, draw."""
    parser = evaluation_parser(__doc__, without=("--images", "--bf16"))
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="VOC2007, VOC2012 or a COCO root")
    add("--split", default="", help="of the set (VOC: trainval; COCO: val2017)")
    add("--list", type=Path, metavar="FILE", help="use the images alone that this file names, one a line")
    add("--no-hard", action="store_true", help="VOC: without difficult and truncated objects")
    add("--method", default="both", choices=(*METHODS, "both"), help="%(default)s")
    add("--features", default="keys", choices=("keys", "tokens"), help="of the last layer (%(default)s)")
    add("--size", type=int, default=0, metavar="PX", help="shorter side; 0: as the image is (%(default)s)")
    add("--max-images", type=int, default=0, help="at equal steps; 0: all (%(default)s)")
    add("--show", type=int, default=16, help="images in the picture (%(default)s)")
    options = parser.parse_args(arguments)
    at_least(options, size=0, max_images=0, show=0)
    images = read_boxes(options.data, options.split, options.no_hard, options.list)
    images = spread(images, options.max_images or len(images))
    subjects, device = models_of(options), choose_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)  # an error now where it cannot be made
    table = []
    with StopSignals() as signals:
        for subject in subjects:
            percents = measure(subject, images, options, device, signals)
            shown = {name: f"{value:.2f}" for name, value in percents.items()}
            table.append({"checkpoint": subject.label, "images": len(images), **shown})
            said = ", ".join(map(" ".join, shown.items()))
            print(f"{subject.label}: {said} ({len(images)} images)", flush=True)
    write_text(options.output / "corloc.csv", csv_text(table))


def measure(
    subject: EvalModel, images: list[BoxedImage], options: argparse.Namespace, device: torch.device,
    signals: StopSignals,
) -> dict[str, float]:  # fmt: skip
    """CorLoc in percent by each method. Writes the checkpoint's folder; after an interruption it resumes."""
    started, folder = time.perf_counter(), options.output / subject.folder
    methods = list(METHODS) if options.method == "both" else [options.method]
    settings = {name: (value, getattr(options, name)) for name, value in PROTOCOL.items()}
    which = {"data": options.data.resolve().name, "split": options.split}
    boxes = {str(i): [image.path.name, image.boxes.tolist()] for i, image in enumerate(images)}
    which |= {"list": options.list and options.list.name, "methods": methods, "boxes": config_hash(boxes)}
    settings |= {name: (value, value) for name, value in which.items()}  # of the set; never a deviation
    if before := subject.found(folder, "object-discovery", settings):
        print(f"{subject.label}: measured before", flush=True)
        return {name: value for name, value in before.metrics.items() if name.startswith("corloc_")}
    kind = subject.settings_hash("object-discovery", settings)
    part = folder / f".boxes-{kind}-{file_hash(subject.path)}.part"
    rows, shown, chosen, done = [], [], set(spread(range(len(images)), options.show)), read_part(part)
    tell = Progress(subject.label, len(images), signals)
    with frozen_features(subject.build(), device) as features, open(part, "a", encoding="utf-8") as file:
        for number, image in enumerate(images):
            row = done.get(str(image.path))
            if row is None or number in chosen:
                pixels = read_picture(image.path)
                found = discover(features, pixels, image.boxes, methods, options.features, options.size)
                columns = {f"{m}_{k}": v for m, judged in found.items() for k, v in judged.row().items()}
                row = {"image": image.path.name, **columns}
                with writing(part):
                    file.write(json.dumps([str(image.path), row]) + "\n")
                    file.flush()
                if number in chosen:
                    judged = {m: (f.box, f.hit) for m, f in found.items()}
                    shown.append(Boxed(image.path.name, pixels, image.boxes, judged))
            rows.append(row)
            tell()
    hits = {method: sum(row[f"{method}_hit"] for row in rows) for method in methods}
    percents = {f"corloc_{method}": 100 * n_hit / len(rows) for method, n_hit in hits.items()}
    write_text(folder / "boxes.csv", csv_text(rows))
    if shown:
        keep(boxes_figure(shown), folder / "figures", "boxes", "Objects found", CAPTION)
    subject.write(folder, "object-discovery", settings, {**percents, "images": len(images)}, started)
    part.unlink()
    return percents


def read_part(file: Path) -> dict[str, dict[str, Any]]:
    """{image: row} that an interrupted run left; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # a line that was cut off
            found |= [json.loads(line)]
    return found
