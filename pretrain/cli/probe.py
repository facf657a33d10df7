"""Probe any weights: k-NN on a labeled folder, linear and k-NN segmentation, the position probe.

posfield evaluate probes --weights runs/x/backbone.safetensors --knn-root sets/birds --seg-root sets/ade
--seg-classes 150 posfield evaluate probes --weights runs/x/backbone.safetensors --position-root
sets/coco/val2017 --json probes.json
"""

import argparse
import json
from pathlib import Path

import torch

from pretrain.data.sources import DataSettings
from pretrain.device import DEVICES, choose_device
from pretrain.errors import UserError
from pretrain.eval_model import add_options, open_models
from pretrain.evaluation.position_probe import hide_with
from pretrain.evaluation.probes import Probes, ProbeSettings
from pretrain.settings import Layer, build


def main(arguments: list[str]) -> None:
    """Parse, build, probe, print."""
    defaults = ProbeSettings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, several=False)
    parser.add_argument("--knn-root", default="", metavar="DIR", help="train/CLASS/*, val/CLASS/*")
    parser.add_argument("--knn-k", type=int, default=defaults.knn_k, help="neighbors (%(default)s)")
    parser.add_argument(
        "--seg-root", default="", metavar="DIR", help="images/ and annotations/{training,validation}"
    )
    parser.add_argument("--seg-classes", type=int, default=0, help="labels 1 .. n; 0 is not labeled")
    parser.add_argument(
        "--position-root", default="", metavar="PATH", help="images: anything that data.root may be"
    )
    parser.add_argument(
        "--image-px", type=int, default=defaults.image_px, help="side of a picture (%(default)s)"
    )
    parser.add_argument(
        "--max-images", type=int, default=defaults.max_images, help="of each part of a set (%(default)s)"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES, help="%(default)s")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 forward passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    options = parser.parse_args(arguments)
    if not (options.knn_root or options.seg_root or options.position_root):
        raise UserError("nothing to probe: give --knn-root, --seg-root or --position-root")

    (model,) = open_models([options.weights], (), options.source, options.backbone, options.patch_size)
    backbone = model.build(mask_tokens=bool(options.position_root))
    device = choose_device(options.device)
    probes = Probes(settings(options), DataSettings(root=options.position_root), backbone.patch_size)
    if options.position_root and not model.has_token:
        hidden_by = hide_with(backbone, "mean", False, (options.image_px // backbone.patch_size,) * 2)
        said = (
            "the mean of all positions stands for a hidden one"
            if hidden_by == "mean"
            else "and no positions that could be hidden"
        )
        print(f"note: {options.weights} holds no pos_mask_token; {said}")
    values = probes.run(
        backbone.to(device), device, torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    )
    for key, value in values.items():
        print(f"{key:24} {value:.4f}")
    if options.json:
        used = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"backbone": model.backbone, "options": used, "metrics": values}, indent=2) + "\n"
        )


def settings(options: argparse.Namespace) -> ProbeSettings:
    """The probes that are asked for."""
    keys = ("knn_root", "knn_k", "seg_root", "seg_classes", "image_px", "max_images")
    values = {key: getattr(options, key) for key in keys} | {
        "position": bool(options.position_root),
        "every": 1,
    }
    return build(ProbeSettings, [Layer("command line", values)], "probes")
