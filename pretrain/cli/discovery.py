"""Object discovery without labels (LOST, TokenCut): one box an image from frozen features, and CorLoc, the
share of images it hits.

posfield evaluate discovery --weights runs/x/backbone.safetensors --data sets/VOC2007 --output analysis/voc07
posfield evaluate discovery --weights A.pth B.pth --data sets/coco --split train2014 --list coco_20k.txt \\
    --method lost --output D

--data is a Pascal VOC folder (trainval) or a COCO root. Images go in at their own size, padded to whole
patches, as in the public code of both; --size scales their shorter side. --features is by default what suits
the file: keys, as in the public code, but without their bias where it makes all their products positive, as
in DINOv2's. A method that answers with the whole image nearly everywhere has no CorLoc. Leaves corloc.csv and
checkpoints/NAME/ of each with result.json, boxes.csv (one row an image) and images of found and true boxes.
"""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.analysis.feature_figures import Boxed, boxes_figure
from pretrain.analysis.figures import keep
from pretrain.cli import at_least, evaluation_parser, models_of
from pretrain.data.box_sets import BoxedImage, read_boxes
from pretrain.data.images import read_picture, spread
from pretrain.device import choose_device
from pretrain.eval_model import EvalModel, UsedSettings
from pretrain.evaluation.discovery import (
    AUTO,
    HIT_IOU,
    KINDS,
    LOOKED_AT,
    METHODS,
    best_iou,
    discover,
    usual_features,
)
from pretrain.evaluation.features import Features, frozen_features
from pretrain.files import csv_text, write_text, writing
from pretrain.log import Progress
from pretrain.results.folder import leave_readme
from pretrain.results.provenance import config_hash, file_hash
from pretrain.results.schema import Result, read_result
from pretrain.signals import StopSignals

VOID = 0.9  # of the images without an answer: no CorLoc
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
    add("--features", default=AUTO, choices=(AUTO, *KINDS), help="of the last layer (%(default)s)")
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
            result = measure(subject, images, options, device, signals)
            shown = {f"corloc_{m}": result.metrics.get(f"corloc_{m}") for m in methods_of(options)}
            cells = {name: "" if value is None else f"{value:.2f}" for name, value in shown.items()}
            whole, used = f"{result.metrics['corloc_whole_image']:.2f}", features_of(result)
            about = {"checkpoint": subject.label, "images": len(images), "features": used}
            table.append({**about, **cells, "corloc_whole_image": whole})
            said = ", ".join(f"{name} {text or 'none'}" for name, text in cells.items())
            print(
                f"{subject.label}: {said}; of the whole image {whole} ({len(images)} images, {used})",
                flush=True,
            )
    write_text(options.output / "corloc.csv", csv_text(table))
    leave_readme(options.output, "analysis")


def methods_of(options: argparse.Namespace) -> list[str]:
    """Those that are asked for."""
    return list(METHODS) if options.method == "both" else [options.method]


def features_of(result: Result) -> str:
    """Those that a result is of."""
    return str(result.protocol.deviations.get("features", ["", PROTOCOL["features"]])[1])


def settings_of(options: argparse.Namespace, images: list[BoxedImage], used: str) -> UsedSettings:
    """(The protocol's, the run's) values; ``used``: one of :data:`KINDS`."""
    settings = {name: (value, getattr(options, name)) for name, value in PROTOCOL.items()}
    settings["features"] = (PROTOCOL["features"], used)
    which = {"data": options.data.resolve().name, "split": options.split}
    boxes = {str(i): [image.path.name, image.boxes.tolist()] for i, image in enumerate(images)}
    which |= {"list": options.list and options.list.name, "methods": methods_of(options)}
    which |= {"boxes": config_hash(boxes), "void": VOID}
    return settings | {name: (value, value) for name, value in which.items()}  # of the set; never a deviation


def measure(
    subject: EvalModel, images: list[BoxedImage], options: argparse.Namespace, device: torch.device,
    signals: StopSignals,
) -> Result:  # fmt: skip
    """CorLoc in percent by each method. Writes the checkpoint's folder; after an interruption it resumes."""
    started, folder = time.perf_counter(), options.output / subject.folder
    with frozen_features(subject.build(), device) as features:
        used, told = options.features, ""
        if used == AUTO:
            some = [read_picture(image.path) for image in spread(images, LOOKED_AT)]
            used, share = usual_features(features, some, options.size)
            told = f", for {100 * share:.0f} % of the products of keys are positive"
        print(f"{subject.label}: features: {used}{told}", flush=True)
        settings = settings_of(options, images, used)
        if before := subject.found(folder, "object-discovery", settings):
            print(f"{subject.label}: measured before", flush=True)
            return before
        part = (
            folder
            / f".boxes-{subject.settings_hash('object-discovery', settings)}-{file_hash(subject.path)}.part"
        )
        rows, shown = look(
            features, images, options, used, part, Progress(subject.label, len(images), signals)
        )
    metrics = metrics_of(rows, methods_of(options), subject.label)
    write_text(folder / "boxes.csv", csv_text(rows))
    if shown:
        keep(boxes_figure(shown), folder / "figures", "boxes", "Objects found", CAPTION)
    subject.write(folder, "object-discovery", settings, metrics, started)
    part.unlink()
    return read_result(folder)


def look(
    features: Features,
    images: list[BoxedImage],
    options: argparse.Namespace,
    used: str,
    part: Path,
    tell: Progress,
) -> tuple[list[dict[str, Any]], list[Boxed]]:
    """A row of each image, kept in ``part`` as it is found, and the images to be drawn."""
    rows, shown, chosen, done = [], [], set(spread(range(len(images)), options.show)), read_part(part)
    with open(part, "a", encoding="utf-8") as file:
        for number, image in enumerate(images):
            row = done.get(str(image.path))
            if row is None or number in chosen:
                pixels = read_picture(image.path)
                found = discover(features, pixels, image.boxes, methods_of(options), used, options.size)
                columns = {f"{m}_{k}": v for m, judged in found.items() for k, v in judged.row().items()}
                whole = np.array([0, 0, pixels.shape[1], pixels.shape[0]], np.float64)
                columns["whole_image_hit"] = int(best_iou(whole, image.boxes) > HIT_IOU)
                row = {"image": image.path.name, **columns}
                with writing(part):
                    file.write(json.dumps([str(image.path), row]) + "\n")
                    file.flush()
                if number in chosen:
                    judged = {m: (f.box, f.hit) for m, f in found.items()}
                    shown.append(Boxed(image.path.name, pixels, image.boxes, judged))
            rows.append(row)
            tell()
    return rows, shown


def metrics_of(rows: list[dict[str, Any]], methods: list[str], label: str) -> dict[str, float]:
    """CorLoc of each method, of the whole image as the answer, and the share of images without an answer, in
    percent; where these are nearly all there is no CorLoc, and that is said."""
    n, found = len(rows), dict[str, float]()
    for method in methods:
        n_void = sum(row[f"{method}_void"] for row in rows)
        found[f"void_{method}"] = 100 * n_void / n
        if n_void < VOID * n:
            found[f"corloc_{method}"] = 100 * sum(row[f"{method}_hit"] for row in rows) / n
        else:
            told = f"in {n_void} of {n} images it finds the whole image, or all patches alike"
            print(f"{label}: no CorLoc of {method}: {told}; try other --features", flush=True)
    return {**found, "corloc_whole_image": 100 * sum(row["whole_image_hit"] for row in rows) / n, "images": n}


def read_part(file: Path) -> dict[str, dict[str, Any]]:
    """{image: row} that an interrupted run left; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # a line that was cut off
            found |= [json.loads(line)]
    return found
