"""Probe any weights: k-NN on a labeled folder, linear and in-context segmentation, the position probe.

posfield evaluate probes --weights runs/x/backbone.safetensors --knn-root sets/birds --seg-root sets/ade --seg-classes 150
posfield evaluate probes --weights runs/x/backbone.safetensors --position-root sets/coco/val2017 --json probes.json

The numbers are those of a training's probes: the evaluators' at reduced settings.
"""

import json
from pathlib import Path

import torch

from pretrain.cli import add_mask_options, evaluation_parser, models_of
from pretrain.data.sources import DataSettings
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.evaluation.position import hide_with
from pretrain.evaluation.probes import Probes, ProbeSettings
from pretrain.files import write_text
from pretrain.settings import Layer, build


def main(arguments: list[str]) -> None:
    """Parse, build, probe, print."""
    defaults = ProbeSettings()
    parser = evaluation_parser(__doc__, several=False, without=("--images", "--output"))
    add = parser.add_argument
    add("--knn-root", default="", metavar="DIR", help="train/CLASS/*, val/CLASS/*")
    add("--knn-k", type=int, default=defaults.knn_k, help="neighbors (%(default)s)")
    add("--seg-root", default="", metavar="DIR", help="images/{train,val}, masks/{train,val}; ADE20K")
    add("--seg-classes", type=int, default=0, help="how many labels of it count")
    add_mask_options(parser, may_divide=False)
    add("--position-root", default="", metavar="PATH", help="images: anything that data.root may be")
    add("--image-px", type=int, default=defaults.image_px, help="side of an image (%(default)s)")
    add("--max-images", type=int, default=defaults.max_images, help="of each part of a set (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")
    options = parser.parse_args(arguments)
    if not (options.knn_root or options.seg_root or options.position_root):
        raise UserError("nothing to probe: give --knn-root, --seg-root or --position-root")

    (model,) = models_of(options)
    backbone = model.build(mask_tokens=bool(options.position_root))
    device = choose_device(options.device)
    keys = "knn_root knn_k seg_root seg_classes void map mask_name image_px max_images".split()
    values = {key: getattr(options, key) for key in keys}
    values |= {"position": bool(options.position_root), "every": 1}
    settings = build(ProbeSettings, [Layer("command line", values)], "probes")
    probes = Probes(settings, DataSettings(root=options.position_root), backbone.patch_size)
    if options.position_root and not model.has_token:
        hidden_by = hide_with(backbone, "mean", False, (options.image_px // backbone.patch_size,) * 2)
        mean, none = "the mean of all positions stands for a hidden one", "no positions that could be hidden"
        said = mean if hidden_by == "mean" else f"and {none}"
        print(f"note: {options.weights} holds no pos_mask_token; {said}")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    metrics = probes.run(backbone.to(device), device, autocast)
    for key, value in metrics.items():
        print(f"{key:24} {value:.4f}")
    if options.json:
        content = {"backbone": model.backbone, "options": vars(options), "metrics": metrics}
        write_text(options.json, json.dumps(content, indent=2, default=str) + "\n")
