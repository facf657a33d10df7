"""Position probe, layer by layer: can a patch's place be read off its features when its position was hidden?

posfield evaluate position --weights runs/x/backbone.safetensors dino_vitbase16_pretrain.pth --images sets/coco/val2017 \\
    --output analysis/position

Leaves position_layers.csv and figures/position_layers.png and .svg of all weights, and checkpoints/NAME/ with the table and the
result.json of each, from where the same command again takes what is measured already. --mask
says what stands for a hidden position: "token", the learned mask token of the file; "mean", the mean of the grid's positions;
"zero"; "auto", the token where the file has one, else the mean.
"""

import argparse
import time
from pathlib import Path

import torch

from pretrain.analysis.feature_figures import layers_figure
from pretrain.analysis.figures import keep
from pretrain.cli import at_least
from pretrain.data.images import check_grid, content_hash
from pretrain.data.sources import DataSettings
from pretrain.device import DEVICES, choose_device
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel, add_options, models_of
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.position_layers import csv_rows, metrics, position_layers
from pretrain.evaluation.position_probe import HIDDEN_BY, hide_with, read_squares
from pretrain.files import read_csv, write_csv
from pretrain.progress import Progress
from pretrain.results.schema import FILE_NAME
from pretrain.signals import StopSignals
from pretrain.views.masks import SHAPES

TABLE = "position_layers.csv"
PROTOCOL = {"size": 224, "max_images": 2000, "draws": 3, "shape": "cross", "mask": "auto", "bf16": False}
CAPTION = (
    "How well a linear read-out finds a patch's center: solid, its position was hidden; dotted, it was given."
)


def main(arguments: list[str]) -> None:
    """Parse, probe one file after the other, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--images", required=True, metavar="PATH", help="anything that data.root may be")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--mask", default=PROTOCOL["mask"], choices=HIDDEN_BY, help="what stands for a position (%(default)s)"
    )
    parser.add_argument(
        "--shape", default=PROTOCOL["shape"], choices=SHAPES, help="of the masks (%(default)s)"
    )
    parser.add_argument("--draws", type=int, default=PROTOCOL["draws"], help="of the masks (%(default)s)")
    parser.add_argument(
        "--size", type=int, default=PROTOCOL["size"], help="side in pixels, to whole patches (%(default)s)"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=PROTOCOL["max_images"],
        help="half to fit, half to test (%(default)s)",
    )
    parser.add_argument("--device", default="auto", choices=DEVICES, help="%(default)s")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 forward passes")
    options = parser.parse_args(arguments)
    at_least(options, draws=1, size=1, max_images=2)
    device = choose_device(options.device)
    subjects = models_of(options)
    for subject in subjects:
        if options.mask == "token" and not subject.has_token:
            raise UserError(
                f"--mask token: {subject.path} holds no pos_mask_token that pre-training with position masks learned"
            )
    options.output.mkdir(parents=True, exist_ok=True)  # an error now where it cannot be made
    images: dict[int, torch.Tensor] = {}  # by their side: all patch sizes of one side share them
    with StopSignals() as signals:
        rows = [row for subject in subjects for row in probe(subject, options, images, device, signals)]
    write_csv(options.output / TABLE, list(rows[0]), [list(row.values()) for row in rows])
    keep(
        layers_figure(rows),
        options.output / "figures",
        "position_layers",
        "Position probe, layer by layer",
        CAPTION,
    )
    print(f"{options.output}: {TABLE}, figures/position_layers.png and .svg of {len(subjects)} checkpoints")


def probe(
    subject: EvalModel,
    options: argparse.Namespace,
    by_side: dict[int, torch.Tensor],
    device: torch.device,
    signals: StopSignals,
) -> list[dict[str, str]]:
    """The curve of one checkpoint as rows of the csv; leaves its folder, or takes it from there."""
    started, folder = time.perf_counter(), options.output / subject.folder
    side = max(2, round(options.size / subject.patch_px)) * subject.patch_px
    check_grid(side // subject.patch_px, side // subject.patch_px, f"--size {options.size}: an image")
    if side not in by_side:
        read = read_squares(DataSettings(root=options.images), side, options.max_images)
        print("".join(f"left out: {line}\n" for line in read.broken), end="", flush=True)
        by_side[side] = torch.stack(read.pixels)
    images = by_side[side]
    used = {**{name: getattr(options, name) for name in PROTOCOL}, "size": side}
    seen = content_hash(images)
    settings = {**{name: (value, used[name]) for name, value in PROTOCOL.items()}, "pixels": (seen, seen)}
    if (folder / TABLE).is_file() and subject.found(folder, "position-probe", settings):
        print(f"{subject.label}: measured before", flush=True)
        return read_csv(folder / TABLE)
    backbone = subject.build(mask_tokens=True)
    hidden_by = hide_with(backbone, options.mask, subject.has_token, (side // subject.patch_px,) * 2)
    if hidden_by == "none":
        print(
            f"{subject.label}: no position is added to its patches, so there is none to hide; it is probed as it is"
        )
    elif hidden_by != options.mask:
        print(f"{subject.label}: hidden positions are replaced by the {hidden_by}")
    backbone = backbone.to(device)
    features = Features(backbone, device, torch.autocast(device.type, torch.bfloat16, enabled=options.bf16))
    tell = Progress(subject.label, options.draws * len(images), signals, "images of all draws")
    with frozen(backbone):
        scores = position_layers(features, images, options.draws, options.shape, tell)
    rows, found = list(csv_rows(subject.label, hidden_by, scores)), {**metrics(scores), "images": len(images)}
    (folder / FILE_NAME).unlink(missing_ok=True)  # it speaks for the table that is about to be replaced
    write_csv(folder / TABLE, list(rows[0]), [list(row.values()) for row in rows])
    subject.write(folder, "position-probe", settings, found, started)
    r2, std = found["position_r2"], found["position_r2_std"]
    error, chance = found["position_error"], found["position_chance"]
    print(f"{subject.label}: R^2 {r2:.3f} +- {std:.3f}, error {error:.3f} (chance {chance:.3f})")
    return rows
