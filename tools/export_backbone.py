"""Write a backbone as a file that needs none of this code: a torch.export program (.pt2) or ONNX.

python tools/export_backbone.py --weights run/backbone.safetensors --format onnx --size 1024 --output backbone.onnx
python tools/export_backbone.py --weights runs/det --size 1024 --output tuned.pt2     (the backbone of a fine-tuned run)

Input: image [B, 3, H, W], RGB, normalised by the mean and std that the file holds; any batch. Outputs, after the final norm:
feature_map [B, D, H / p, W / p], cls [B, D], registers [B, R, D] if there are any.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse
from typing import Any

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.cli import run
from pretrain.errors import UserError
from pretrain.export import FORMATS, export
from pretrain.weights import backbone_name


def backbone_of_run(folder: Path) -> ViT:
    """The backbone in the last checkpoint of a fine-tuning's folder, whichever plug-in left it.

    Raises:
        UserError: no run, or a detector that does not run its backbone as a plain ViT: it would be another function.
    """
    if (folder / "config.json").is_file():
        from det_plugin.torchvision_engine.train import load_model

        adapter: Any = load_model(folder)[0].backbone
    elif (folder / "config_resolved.yaml").is_file():
        from det_plugin.detector import load_detectron2

        adapter = load_detectron2(folder)[0].backbone.net
    elif list(folder.glob("*.py")):
        from seg_plugin.predict import load_run

        return load_run(folder, "cpu").backbone.vit
    else:
        raise UserError(f"--weights: {folder} is no folder of a fine-tuning run; of a pre-training, name the file in it")
    ran = adapter.options
    if ran.window_size or not (ran.final_norm and ran.keep_special_tokens):
        raise UserError(f"--weights: {folder} ran its backbone with windows, or without the final norm or [CLS]: no plain ViT")
    return adapter.vit


def main(arguments: list[str]) -> None:
    """Parse, build, export, print how exact it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="PATH", help="any supported checkpoint, or a run's folder")
    parser.add_argument("--backbone", metavar="NAME", help="where the weights do not say it: vit_small_patch16, ...")
    parser.add_argument("--format", default="torch", help=f"{', '.join(FORMATS)} (%(default)s)")
    parser.add_argument("--size", type=int, nargs="+", default=[224], metavar="PX", help="side, or height and width (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="*.pt2 or *.onnx")
    options = parser.parse_args(arguments)
    if len(options.size) > 2:
        raise UserError(f"--size: one side, or height and width; not {' '.join(map(str, options.size))}")
    height, width = options.size[0], options.size[-1]

    if options.weights.is_dir():
        vit = backbone_of_run(options.weights)
    else:
        vit = build_backbone(backbone_name(options.backbone, options.weights), weights=options.weights)
    difference = export(vit, options.format, (height, width), options.output)
    print(f"{options.output}: {height} x {width} px, largest relative difference from the backbone {difference:.1e}")


if __name__ == "__main__":
    run(main)
