"""Position probe, layer by layer: can a patch's place be read off its features when its position was hidden?

python tools/probe_position.py --weights runs/x/backbone.safetensors dino_vitbase16_pretrain.pth --images sets/coco/val2017 \\
    --output analysis/position

Leaves position_layers.csv and figures/position_layers.png and .svg of all weights, and a folder with result.json for each. --mask
says what stands for a hidden position: "token", the learned mask token of the file; "mean", the mean of the grid's positions;
"zero"; "auto", the token where the file has one, else the mean.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse
import csv
import time

import torch
from omegaconf import OmegaConf

from pretrain.analysis.feature_figures import keep, layers_figure
from pretrain.cli import run
from pretrain.config import load_config
from pretrain.device import DEVICES, choose_device
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.position_layers import csv_rows, metrics, position_layers
from pretrain.evaluation.position_probe import HIDDEN_BY, hide_with, read_squares
from pretrain.evaluation.subject import Subject, open_subjects
from pretrain.views.masks import SHAPES

PROTOCOL = {"size": 224, "max_images": 2000, "draws": 3, "shape": "cross", "mask": "auto", "bf16": False}
CAPTION = "How well a linear read-out finds a patch's centre: solid, its position was hidden; dotted, it was given."


def main(arguments: list[str]) -> None:
    """Parse, probe one file after the other, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, nargs="+", metavar="FILE", help="any supported checkpoints")
    parser.add_argument("--backbone", metavar="NAME", help="where the weights do not say it: vit_small_patch16, ...")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the methods; else what the files say")
    parser.add_argument("--source", metavar="NAME", help="whose files they are; else found out from each file")
    parser.add_argument("--images", required=True, metavar="PATH", help="anything that data.root may be")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mask", default=PROTOCOL["mask"], choices=HIDDEN_BY, help="what stands for a position (%(default)s)")
    parser.add_argument("--shape", default=PROTOCOL["shape"], choices=SHAPES, help="of the masks (%(default)s)")
    parser.add_argument("--draws", type=int, default=PROTOCOL["draws"], help="of the masks (%(default)s)")
    parser.add_argument("--size", type=int, default=PROTOCOL["size"], help="side in pixels, to whole patches (%(default)s)")
    parser.add_argument("--max-images", type=int, default=PROTOCOL["max_images"], help="half to fit, half to test (%(default)s)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="%(default)s")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 forward passes")
    options = parser.parse_args(arguments)
    for name, least in (("draws", 1), ("size", 1), ("max_images", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)} is less than {least}")
    device = choose_device(options.device)
    subjects = open_subjects(options.weights, options.backbone, options.names, options.source)
    images: dict[int, torch.Tensor] = {}  # by their side: all patch sizes of one side share them
    rows: list[dict[str, str]] = []
    for subject in subjects:
        rows += probe(subject, options, images, device)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "position_layers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    keep(layers_figure(rows), options.output / "figures", "position_layers", "Position probe, layer by layer", CAPTION)
    print(f"{options.output}: position_layers.csv, figures/position_layers.png and .svg of {len(subjects)} checkpoints")


def probe(
    subject: Subject, options: argparse.Namespace, images: dict[int, torch.Tensor], device: torch.device
) -> list[dict[str, str]]:
    """The curve of one checkpoint as rows of the csv; leaves its result.json."""
    started = time.perf_counter()
    backbone = subject.build(mask_tokens=True)
    side = max(2, round(options.size / backbone.patch_size)) * backbone.patch_size
    if side not in images:
        config = load_config()
        OmegaConf.set_readonly(config, False)
        config.data.root = options.images
        images[side] = read_squares(config.data, side, options.max_images)
    grid = (side // backbone.patch_size,) * 2
    hidden_by = hide_with(backbone, options.mask, subject.has_token, grid)
    if hidden_by == "none":
        print(f"{subject.label}: no position is added to its patches, so there is none to hide; it is probed as it is")
    elif hidden_by != options.mask:
        print(f"{subject.label}: hidden positions are replaced by the {hidden_by}")
    backbone = backbone.to(device)
    features = Features(backbone, device, torch.autocast(device.type, torch.bfloat16, enabled=options.bf16))
    with frozen(backbone):
        scores = position_layers(features, images[side], options.draws, options.shape)
    used = {**{name: getattr(options, name) for name in PROTOCOL}, "size": side}
    settings = {name: (value, used[name]) for name, value in PROTOCOL.items()}
    found = {**metrics(scores), "images": len(images[side])}
    subject.write(options.output / subject.folder, "position-probe", settings, found, started)
    r2, std = found["position_r2"], found["position_r2_std"]
    print(
        f"{subject.label}: R^2 {r2:.3f} +- {std:.3f}, error {found['position_error']:.3f} (chance {found['position_chance']:.3f})"
    )
    return list(csv_rows(subject.label, hidden_by, scores))


if __name__ == "__main__":
    run(main)
