"""Fine-tune a backbone for detection, with Mask R-CNN, on COCO or on your own data (COCO's json, Pascal VOC's xml,
YOLO's txt); where no object has a mask, with Faster R-CNN.

The protocol, on 8 GPUs or on one (the batch is 64 on both, and the schedule does not change):
torchrun --nproc-per-node 8 -m posfield detect --weights run/backbone.safetensors --data coco --output det --accumulate 2
posfield detect --weights run/backbone.safetensors --data coco --output det --accumulate 16 --checkpointing

To compare backbones at a tenth of the cost (or less, with the backbone frozen: coco10pct-frozen-12ep):
posfield detect --weights run/backbone.safetensors --data coco --output det --protocol coco10pct-12ep --accumulate 16

Your own data and number of classes, on one GPU (det_plugin/coco/layout.py lists the layouts, posfield data check
says what is odd in yours; of a set without a split --val-share 0.2 is kept for validation):
posfield detect --weights run/backbone.safetensors --data export --output det --accumulate 0 batch_size=16 epochs=50

A run that was stopped: posfield detect --resume --output det

Words with = set fields of the protocol (det_plugin/protocol.py), masks=off (boxes alone), keep_empty=false (no
negatives), or arguments of the backbone, backbone.depth=4.
"""

import argparse
from pathlib import Path

from det_plugin.protocol import PROTOCOLS
from pretrain.cli import fields_and_kwargs, fine_tuning_parser
from pretrain.errors import UserError
from pretrain.log import say

FREE = (
    "engine",
    "device",
    "workers",
    "accumulate",
    "checkpointing",
    "compile",
    "data_changed",
)  # may change at resume


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = fine_tuning_parser(__doc__)
    add = parser.add_argument
    add("--engine", default="auto", choices=("auto", "detectron2", "torchvision"), help="(%(default)s)")
    add("--data", type=Path, metavar="ROOT", help="of a set of any format; or a .yaml or .json file")
    add("--protocol", default="coco-12ep", choices=tuple(PROTOCOLS), help="(%(default)s)")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches a step; 0: as few as fit the GPU (%(default)s)",
    )
    told = "iscrowd 1: left out, as COCO does, or taken as objects (%(default)s)"
    add("--crowds", default="ignored", choices=("ignored", "objects"), help=told)
    told = "of the images, for validation, where the data have one split alone: 0.2"
    add("--val-share", type=float, default=0.0, metavar="SHARE", help=told)
    add("--checkpointing", action="store_true", help="less memory: the backward pass computes blocks again")
    add("--compile", action="store_true", help="torch.compile of the blocks")
    add("--yes", dest="is_sure", action="store_true", help="the whole protocol, however few the images")
    add("--eval-only", action="store_true", help="only evaluate the last checkpoint in --output")
    options = parser.parse_intermixed_args(arguments)
    if options.data is None and (options.eval_only or not options.resume):
        raise UserError("--data: give the data set; with --resume a run's folder knows it")
    options.changes = {
        name: vars(options)[name] for name in FREE if vars(options)[name] != parser.get_default(name)
    }
    return options


def main(arguments: list[str]) -> None:
    options = vars(parse(arguments))
    from det_plugin.train import evaluate, finetune, go_on  # loads torch

    words, changes = options.pop("overrides"), options.pop("changes")
    if options["data"] is None:
        given = options["weights"] or options["backbone"] or options["seed"] or words
        if given:
            raise UserError(
                f"--resume: {options['output']} has its settings; leave out {given}, or give --data and all of them"
            )
        say(f"result: {go_on(options['output'], **changes)}")
        return
    if options.pop("eval_only"):
        if words:
            told = f"{options['output']} has its settings already"
            raise UserError(f"--eval-only: {told}, leave out {' '.join(words)}")
        if options["crowds"] != "ignored":
            raise UserError(
                f"--eval-only: {options['output']} says itself what its crowds are; leave out --crowds"
            )
        if options["val_share"]:
            raise UserError(
                f"--eval-only: {options['output']} says itself how it divides the data; leave out --val-share"
            )
        evaluate(**{key: options[key] for key in ("data", "output", "engine", "device", "workers")})
        return
    fields, model_kwargs = fields_and_kwargs(words)
    if clash := sorted(fields.keys() & {*options, "model_kwargs"}):
        raise UserError(f"protocol: {clash[0]} is no field of it; give it as --{clash[0].replace('_', '-')}")
    say(f"result: {finetune(**options | fields, model_kwargs=model_kwargs)}")
