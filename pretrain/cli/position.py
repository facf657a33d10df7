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

import torch

from pretrain.analysis.feature_figures import layers_figure
from pretrain.analysis.figures import keep
from pretrain.cli import at_least, evaluation_parser, models_of
from pretrain.data.images import check_grid, content_hash
from pretrain.data.sources import DataSettings
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel
from pretrain.evaluation import position as layers
from pretrain.evaluation.features import frozen_features
from pretrain.evaluation.position import HIDDEN_BY, hide_with, read_squares
from pretrain.files import csv_text, read_csv, write_text
from pretrain.log import Progress
from pretrain.results.folder import leave_readme
from pretrain.results.schema import FILE_NAME
from pretrain.signals import StopSignals
from pretrain.views.masks import SHAPES

TABLE = "position_layers.csv"
PROTOCOL = {"size": 224, "max_images": 2000, "draws": 3, "shape": "cross", "mask": "auto", "bf16": False}
CAPTION = "How well a linear read-out finds a patch's center: solid, its position was hidden; dotted, given."


def main(arguments: list[str]) -> None:
    """Parse, probe one file after the other, draw."""
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--mask", choices=HIDDEN_BY, help="what stands for a position (%(default)s)")
    add("--shape", choices=SHAPES, help="of the masks (%(default)s)")
    add("--draws", type=int, help="of the masks (%(default)s)")
    add("--size", type=int, help="side in pixels, to whole patches (%(default)s)")
    add("--max-images", type=int, help="half to fit, half to test (%(default)s)")
    parser.set_defaults(**PROTOCOL)
    options = parser.parse_args(arguments)
    at_least(options, draws=1, size=1, max_images=2)
    device = choose_device(options.device)
    subjects = models_of(options)
    if options.mask == "token" and (without := [subject for subject in subjects if not subject.has_token]):
        what = "holds no pos_mask_token that pre-training with position masks learned"
        raise UserError(f"--mask token: {without[0].path} {what}")
    options.output.mkdir(parents=True, exist_ok=True)  # an error now where it cannot be made
    images: dict[int, torch.Tensor] = {}  # by their side: all patch sizes of one side share them
    with StopSignals() as signals:
        rows = [row for subject in subjects for row in probe(subject, options, images, device, signals)]
    write_text(options.output / TABLE, csv_text(rows))
    leave_readme(options.output, "analysis")
    title = "Position probe, layer by layer"
    keep(layers_figure(rows), options.output / "figures", "position_layers", title, CAPTION)
    print(f"{options.output}: {TABLE}, figures/position_layers.png and .svg of {len(subjects)} checkpoints")


def probe(
    subject: EvalModel, options: argparse.Namespace, by_side: dict[int, torch.Tensor], device: torch.device,
    signals: StopSignals,
) -> list[dict[str, str]]:  # fmt: skip
    """The curve of one checkpoint as rows of the csv; leaves its folder, or takes it from there."""
    started, folder = time.perf_counter(), options.output / subject.folder
    grid = (max(2, round(options.size / subject.patch_px)),) * 2
    side = grid[0] * subject.patch_px
    check_grid(*grid, f"--size {options.size}: an image")
    if side not in by_side:
        read = read_squares(DataSettings(root=options.images), side, options.max_images)
        print("".join(f"left out: {line}\n" for line in read.broken), end="", flush=True)
        by_side[side] = torch.stack(read.pixels)
    images = by_side[side]
    used, seen = {**vars(options), "size": side}, content_hash(images)
    settings = {**{name: (value, used[name]) for name, value in PROTOCOL.items()}, "pixels": (seen, seen)}
    if (folder / TABLE).is_file() and subject.found(folder, "position-probe", settings):
        print(f"{subject.label}: measured before", flush=True)
        return read_csv(folder / TABLE)
    backbone = subject.build(mask_tokens=True)
    hidden_by = hide_with(backbone, options.mask, subject.has_token, grid)
    if hidden_by != options.mask:
        nothing = "no position is added to its patches, so there is none to hide; it is probed as it is"
        replaced = f"hidden positions are replaced by the {hidden_by}"
        print(f"{subject.label}: {nothing if hidden_by == 'none' else replaced}")
    tell = Progress(subject.label, options.draws * len(images), signals, "images of all draws")
    with frozen_features(backbone, device, options.bf16) as features:
        scores = layers.position_layers(features, images, options.draws, options.shape, tell)
    rows = list(layers.csv_rows(subject.label, hidden_by, scores))
    found = {**layers.metrics(scores), "images": len(images)}
    (folder / FILE_NAME).unlink(missing_ok=True)  # it speaks for the table that is about to be replaced
    write_text(folder / TABLE, csv_text(rows))
    subject.write(folder, "position-probe", settings, found, started)
    spread = " +- {position_r2_std:.3f}" if options.draws > 1 else ""
    told = f"R^2 {{position_r2:.3f}}{spread}, error {{position_error:.3f}} (chance {{position_chance:.3f}})"
    print(f"{subject.label}: {told.format(**found)}")
    return rows
