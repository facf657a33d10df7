"""Fine-tune a backbone for detection on COCO, or on a folder in its layout, with Mask R-CNN.

python tools/train_det.py --backbone vit_base_patch16 --weights run/backbone.safetensors --data coco --output det

Further words set fields of the protocol, lr=1e-4, or flags of the backbone, backbone.depth=4. Several GPUs:
torchrun --nproc-per-node 8 tools/train_det.py --engine torchvision ... (the batch is shared).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse
import importlib.util
import os

import torch

from det_plugin.protocol import PROTOCOLS, protocol, with_overrides
from det_plugin.run import DetectionRun
from pretrain import distributed
from pretrain.cli import run
from pretrain.errors import UserError
from pretrain.overrides import fields_and_flags
from pretrain.weights import backbone_name


def choose_engine(name: str, output: Path, eval_only: bool) -> tuple[str, str]:
    """The engine, and why it is this one; ``auto`` is Detectron2 where it is installed and has a GPU."""
    is_parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "detectron2" and is_parallel:
        raise UserError("--engine detectron2: on several GPUs its own launcher, tools/lazyconfig_train_net.py, runs our config")
    if name != "auto":
        return name, "as asked for"
    if eval_only and (output / "config.json").is_file():
        return "torchvision", f"it trained {output}"
    if is_parallel:
        return "torchvision", "Detectron2 has its own launcher for several GPUs"
    if importlib.util.find_spec("detectron2") is None:
        return "torchvision", "Detectron2 is not installed"
    if not torch.cuda.is_available():
        return "torchvision", "Detectron2 is installed, but there is no CUDA device"
    return "detectron2", "it is installed, and there is a CUDA device"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto", choices=("auto", "detectron2", "torchvision"), help="(%(default)s)")
    parser.add_argument("--backbone", metavar="NAME", help="registry name, vit_base_patch16, ...; a file of ours says it itself")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="its checkpoint; none: random initialisation")
    parser.add_argument("--data", type=Path, required=True, metavar="COCO_ROOT", help="with train2017/ val2017/ annotations/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--protocol", default="coco-12ep", choices=tuple(PROTOCOLS), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    cores = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help="data-loading processes of each rank (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step (%(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute the blocks again in the backward pass: less memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="only evaluate the last checkpoint in --output")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the protocol; backbone.KEY=VALUE")
    return parser.parse_intermixed_args(arguments)


def settings_of(options: argparse.Namespace) -> DetectionRun:
    """What the command line asks for."""
    fields, flags = fields_and_flags(options.overrides)
    backbone = backbone_name(options.backbone, options.weights)
    return DetectionRun(
        backbone=backbone,
        weights=options.weights,
        data=options.data,
        output=options.output,
        protocol=with_overrides(protocol(options.protocol, backbone), fields),
        seed=options.seed,
        device=options.device,
        workers=options.workers,
        accumulate=options.accumulate,
        checkpointing=options.checkpointing,
        compile=options.compile,
        backbone_flags=flags,
    )


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    engine, reason = choose_engine(options.engine, options.output, options.eval_only)
    print(f"engine: {engine} ({reason})", flush=True)
    try:
        if engine == "detectron2":
            from det_plugin.lazy import train as train_detectron2

            result = train_detectron2(settings_of(options), resume=options.resume, eval_only=options.eval_only)
        else:
            from det_plugin.torchvision_engine.train import evaluate_folder, train

            if options.eval_only:
                evaluate_folder(options.output, options.data, device=options.device, workers=options.workers)
                return
            result = train(settings_of(options), resume=options.resume)
        if distributed.is_main():
            print(f"result: {result}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    run(main)
