"""Fine-tune a backbone for detection, with Mask R-CNN, on COCO or on your own data in COCO's format.

The protocol, on 8 GPUs or on one (the batch is 64 on both, and the schedule does not change):
torchrun --nproc-per-node 8 posfield detect --weights run/backbone.safetensors --data coco --output det --accumulate 2
posfield detect --weights run/backbone.safetensors --data coco --output det --accumulate 16 --checkpointing

To compare backbones at a tenth of the cost (or less, with the backbone frozen: coco10pct-frozen-12ep):
posfield detect --weights run/backbone.safetensors --data coco --output det --protocol coco10pct-12ep --accumulate 16

Your own data and number of classes, on one GPU (det_plugin/coco/layout.py lists the layouts):
posfield detect --weights run/backbone.safetensors --data export --output det --accumulate 2 \\
    batch_size=16 max_iters=4000 milestones=3555,3852 amp_dtype=bfloat16

Words with = set fields of the protocol (det_plugin/protocol.py) or arguments of the backbone, backbone.depth=4.
"""

import argparse
import importlib.util
from pathlib import Path

import torch

from det_plugin.coco.annotations import read_classes
from det_plugin.protocol import PROTOCOLS, DetectionProtocol, protocol, with_overrides
from det_plugin.run import DetectionRun
from pretrain import distributed
from pretrain.cli import fields_and_kwargs, fine_tuning_parser
from pretrain.errors import UserError
from pretrain.log import say
from pretrain.weights import backbone_name

FOLDERS = {"torchvision": "config.json", "detectron2": "config_resolved.yaml"}  # what a run of each leaves


def choose_engine(name: str, output: Path) -> tuple[str, str]:
    """The engine and the reason. ``auto``: that of the run in ``output``, else Detectron2 if it has a GPU."""
    if name != "auto":
        return name, "as asked for"
    for engine, file in FOLDERS.items():
        if (output / file).is_file():
            return engine, f"it trained {output}"
    if importlib.util.find_spec("detectron2") is None:
        return "torchvision", "Detectron2 is not installed"
    if not torch.cuda.is_available():
        return "torchvision", "Detectron2 is installed, but there is no CUDA device"
    return "detectron2", "it is installed, and there is a CUDA device"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = fine_tuning_parser(__doc__)
    parser.add_argument(
        "--engine", default="auto", choices=("auto", "detectron2", "torchvision"), help="(%(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT", help="of COCO, or of an export; or a .yaml file"
    )
    parser.add_argument("--protocol", default="coco-12ep", choices=tuple(PROTOCOLS), help="(%(default)s)")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="micro-batches a step (%(default)s)"
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute the blocks again in the backward pass: less memory",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument(
        "--eval-only", action="store_true", help="only evaluate the last checkpoint in --output"
    )
    return parser.parse_intermixed_args(arguments)


def settings_of(options: argparse.Namespace) -> DetectionRun:
    """The run of a command line. The number of classes is the data's, unless it is given."""
    fields, model_kwargs = fields_and_kwargs(options.overrides)
    backbone = backbone_name(options.backbone, options.weights)
    recipe = with_overrides(protocol(options.protocol, backbone), fields)
    if "num_classes" not in fields:
        classes = read_classes(options.data, "val")
        if len(classes) != recipe.num_classes:
            say(
                f"num_classes={len(classes)}, as in {options.data}; the protocol's is {recipe.num_classes}, so the result is marked"
            )
        recipe = with_overrides(recipe, {"num_classes": len(classes)})
    return DetectionRun(
        backbone=backbone,
        weights=options.weights,
        data=options.data,
        output=options.output,
        protocol=recipe,
        seed=options.seed,
        device=options.device,
        workers=options.workers,
        accumulate=options.accumulate,
        checkpointing=options.checkpointing,
        compile=options.compile,
        model_kwargs=model_kwargs,
    )


def evaluate(options: argparse.Namespace, engine: str) -> None:
    """``--eval-only``: all settings are the folder's."""
    if options.overrides:
        raise UserError(
            f"--eval-only: {options.output} has its settings already, leave out {' '.join(options.overrides)}"
        )
    if engine == "detectron2":
        from det_plugin.detectron2_engine.lazy import train as train_detectron2

        on = {key: getattr(options, key) for key in ("data", "output", "device", "workers")}
        train_detectron2(
            DetectionRun(backbone="", weights=None, protocol=DetectionProtocol(), **on), eval_only=True
        )
    else:
        from det_plugin.torchvision_engine.train import evaluate_folder

        evaluate_folder(options.output, options.data, device=options.device, workers=options.workers)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    engine, reason = choose_engine(options.engine, options.output)
    say(f"engine: {engine} ({reason})")
    try:
        if options.eval_only:
            return evaluate(options, engine)
        if engine == "detectron2":
            from det_plugin.detectron2_engine.lazy import train
        else:
            from det_plugin.torchvision_engine.train import train
        result = train(settings_of(options), resume=options.resume)
        say(f"result: {result}")
    finally:
        distributed.stop()
