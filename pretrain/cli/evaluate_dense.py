"""Evaluate the patch features of any weights without fine-tuning: linear and in-context segmentation, clustering, k-NN.

posfield evaluate dense --weights runs/x/backbone.safetensors --data VOCdevkit --output runs/x_voc
posfield evaluate dense --weights dinov2_vits14_reg4_pretrain.pth --data ADEChallengeData2016 --tasks in_context \\
    --output ade linear.epochs=2 clustering.overclusters=300
posfield evaluate dense --weights dino_deitsmall16_pretrain.pth --knn-root IMAGENET --output knn

--data is Pascal VOC 2012, ADE20K, Cityscapes, a COCO root (--set coco_things | coco_stuff), or a folder of
images and masks, as posfield segment takes it: labels are what the file says, 255 is not counted, line k of
classes.txt names label k (pretrain/data/datasets/folder.py). --knn-root holds train/CLASS/* and
val/CLASS/*. Further words change a task's settings, TASK.FIELD=VALUE; the result names every deviation from
the public protocol. Tables average trainings of one recipe, and evaluations, that differ in their seed
alone; tasks that share a folder stand in one row. Leaves result.json (k-NN beside --data: knn/result.json),
tasks/ (what is finished; after an interruption the same command with --resume goes on) and figures/, which
posfield report shows; --before draws other weights beside these.
"""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pretrain.analysis import dense_figures
from pretrain.cli import add_mask_options, at_least, evaluation_parser, masks_of
from pretrain.data.class_folders import open_class_folders
from pretrain.data.datasets import LabelSet, kinds, open_label_sets
from pretrain.data.datasets.maps import nearest
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel, named_apart, open_models
from pretrain.evaluation import Outcome, dense
from pretrain.evaluation.dense import DENSE_TASKS, KNN, named_tasks, settings_of
from pretrain.evaluation.features import Features, frozen_features
from pretrain.signals import StopSignals

SHOWN, SHOWN_PX = 6, 448  # images in the figures, and their side


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = evaluation_parser(__doc__, several=False, without=["--images"])
    add = parser.add_argument
    add("--before", type=Path, metavar="FILE", help="weights that the figures show beside these")
    add("--data", type=Path, metavar="DIR", help="a set with a label a pixel")
    add("--set", default="auto", choices=("auto", *kinds()), help="auto: what DIR looks like (%(default)s)")
    n_classes = "of a folder: how many count; 0: found out from names and masks (%(default)s)"
    add("--classes", type=int, default=0, metavar="N", help=n_classes)
    add_mask_options(parser)
    on_data = f"on --data ({' '.join(DENSE_TASKS)})"
    add("--tasks", nargs="+", default=list(DENSE_TASKS), metavar="TASK", help=on_data)
    add("--knn-root", type=Path, metavar="DIR", help="labeled folder for k-NN classification: ImageNet")
    add("--resume", action="store_true", help="keep what DIR holds; the result is of the tasks asked for")
    add("--seed", type=int, help="of all tasks; else that which FILE says of its training, or 0")
    add("--max-images", type=int, default=0, metavar="N", help="of each part, at equal steps (0: all)")
    add("overrides", nargs="*", metavar="TASK.FIELD=VALUE", help="settings of the tasks")
    options = parser.parse_intermixed_args(arguments)
    # --tasks takes all the words that follow it
    options.overrides += [word for word in options.tasks if "=" in word]
    options.tasks = [word for word in options.tasks if "=" not in word]
    at_least(options, seed=0, max_images=0, classes=0, patch_size=1)
    if options.data is None and options.knn_root is None:
        raise UserError("nothing to evaluate on: give --data or --knn-root")
    if options.data is None and options.before is not None:
        raise UserError("--before has no effect without --data: k-NN leaves no figures")
    if not options.tasks:
        raise UserError("--tasks names no task")
    return options


def main(arguments: list[str]) -> None:
    """Parse, evaluate what is not finished yet, write, draw."""
    options = parse(arguments)
    tasks = named_tasks(options.tasks, "--tasks") if options.data else ()
    subjects, others = checkpoints(options)
    if options.seed is None:
        options.seed = subjects[-1].seed  # seeds of a training are seeds of a row
    settings = settings_of([*tasks, *[KNN] * bool(options.knn_root)], options.overrides, options.seed)
    device = choose_device(options.device)
    with StopSignals() as signals, ExitStack() as stack:
        jobs = jobs_of(options, subjects[-1], settings, others)
        for folder, job in jobs.items():
            dense.check_folder(job, folder, options.resume)
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()  # an error now where nothing can be written
        held = [frozen_features(subject.build(), device, options.bf16) for subject in subjects]
        features = {subject.label: stack.enter_context(one) for subject, one in zip(subjects, held)}
        for folder, job in jobs.items():
            finished = dense.run(job, features[subjects[-1].label], folder, signals)
            print(f"result: {dense.write(job, finished, folder)}", flush=True)
            if isinstance(val := job.parts[1], LabelSet):
                draw(val, finished, features, folder)


def checkpoints(options: argparse.Namespace) -> tuple[list[EvalModel], dict[str, Any]]:
    """The weights, after those of --before; (the protocol's, this run's) values of how they are used."""
    (subject,) = open_models([options.weights], (), options.source, options.backbone)
    others = {
        "patch_size": (subject.patch_px, options.patch_size or subject.patch_px),
        "precision": ("float32", "bf16" if options.bf16 else "float32"),
    }
    before = open_models([options.before], (), None, options.backbone) if options.before else []
    built = [replace(s, patch_px=options.patch_size or s.patch_px) for s in (*before, subject)]
    return named_apart(built), others


def jobs_of(
    options: argparse.Namespace, subject: EvalModel, settings: dict[str, Any], others: dict[str, Any]
) -> dict[Path, dense.Job]:
    """What is asked for, by the folder of its result."""
    jobs, of_all = {}, (options.seed, options.max_images)
    if options.data:
        parts = open_label_sets(options.data, options.set, options.classes, masks_of(options))
        on_set = {task: used for task, used in settings.items() if task != KNN}
        jobs[options.output] = dense.job_of(subject, parts, on_set, others, *of_all, SHOWN)
    if options.knn_root:
        folder = options.output / KNN if options.data else options.output
        classes = open_class_folders(options.knn_root)
        jobs[folder] = dense.job_of(subject, classes, {KNN: settings[KNN]}, others, *of_all)
    return jobs


def draw(val: LabelSet, finished: Mapping[str, Outcome], features: dict[str, Features], folder: Path) -> None:
    """What the tasks predict for the first images beside the truth, and the components of their patches."""
    maps = {name: some for task in finished.values() for name, some in task.maps.items()}
    images, labels = zip(*(val.read(i) for i in range(min(SHOWN, len(val)))))
    squares = [nearest(part, SHOWN_PX).numpy() for part in labels]
    dense_figures.write(folder, images, squares, maps, val.classes, list(features.items()), SHOWN_PX)
