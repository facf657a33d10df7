"""Look at a labeled set before you train on it: what is in it, and everything odd.

posfield data check photos/ --output check        (writes check/index.html, with samples as they are labeled)

The set may hold objects, for posfield detect: COCO's json, Pascal VOC's xml or YOLO's txt, in most layouts
(det_plugin/coco/layout.py lists them); or masks, for posfield segment: ADE20K, VOC, Cityscapes, or your own
(pretrain/data/datasets/folder.py). What it is is found out; where it is both, --task says which. Nothing is changed.
Ends with code 0 where the training would begin, and meet no mask that ends it; otherwise with 2, and the last line says why.
"""

import argparse
from pathlib import Path

from det_plugin.coco.layout import NoLabels, splits
from pretrain.cli import add_mask_options, at_least, command_parser, masks_of
from pretrain.data.check import lines_of, write_page
from pretrain.data.datasets import folder, kind_of, layout
from pretrain.errors import UserError
from pretrain.log import say

TASKS = {
    "detect": ("val_share", "crowds"),
    "segment": ("val_share", "void", "map", "mask_name", "classes"),
}  # their options


def task_of(data: Path) -> str:
    """``detect`` | ``segment``: what a set is labeled for.

    Raises:
        UserError: for both, or for neither.
    """
    has, told = {"detect": True, "segment": _has_masks(data)}, ""
    try:
        splits(data)
    except NoLabels as error:
        has["detect"], told = False, str(error)
    except UserError:
        pass  # damaged: its check says how
    tasks = [task for task in TASKS if has[task]]
    if len(tasks) > 1:
        raise UserError(f"{data} holds labels of objects, and masks: give --task {' or --task '.join(tasks)}")
    if not tasks:
        raise UserError(f"{told}: looked for {layout.LAYOUT}")
    return tasks[0]


def _has_masks(data: Path) -> bool:
    try:
        kind = kind_of(data)
    except UserError:
        return False
    # Boxes may lie in folders of the same names; and posfield segment does not take COCO's maps
    return folder.has_masks(data) if kind == "folder" else not kind.startswith("coco_")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked; ``task`` is found out."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="FOLDER", help="as --data of posfield detect, or segment")
    add("--task", choices=tuple(TASKS), help="of a set with labels for both; else it is found out")
    add("--output", type=Path, metavar="DIR", help="write a page with samples")
    add("--samples", type=int, default=24, metavar="N", help="images on the page (%(default)s)")
    crowds = "as of posfield detect (%(default)s)"
    add("--crowds", default="ignored", choices=("ignored", "objects"), help=crowds)
    add_mask_options(parser)
    add("--classes", type=int, default=0, metavar="N", help="of masks: as num_classes of posfield segment")
    options = parser.parse_args(arguments)
    at_least(options, samples=0, classes=0)
    options.task = options.task or task_of(options.data)
    for names in TASKS.values():
        for name in names:
            if name not in TASKS[options.task] and getattr(options, name) != parser.get_default(name):
                told = f"has no effect on what posfield {options.task} takes"
                raise UserError(f"--{name.replace('_', '-')} {told}")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.task == "detect":
        from det_plugin.check import check, pictures

        report = check(options.data, options.crowds, options.val_share)
    else:
        from seg_plugin.check import check as check_masks
        from seg_plugin.check import pictures

        report = check_masks(options.data, masks_of(options), options.classes)
    say("\n".join(lines_of(report)))
    if options.output is not None:
        say(f"page: {write_page(report, options.output, pictures(report, options.samples))}")
    if report.refused:
        raise UserError(f"a training would refuse it: {report.refused}")
