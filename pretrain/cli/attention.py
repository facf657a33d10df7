"""Attention of any checkpoints over any images: NMI and MAD by head, what query patches attend to (appendix A).

    posfield analyze attention --weights dino.pth mae.pth runs/ours --images coco/val2017 --output attention
    posfield analyze attention --compare-masks runs/box runs/cross --images coco/val2017 --output masks

writes to the output folder:
    statistics.csv        every checkpoint, image, layer and head
    summary.csv           by layer: mean of the heads, its mean and standard deviation over the images
    figures/              PNG and SVG: Fig. 5 and its heads, Fig. 6 (one an image), Fig. 7 (--compare-masks), Fig. 3
    report.html           all of it in one page
    checkpoints/NAME/     statistics.csv and result.json of one; the same command again takes from there what is measured already

One checkpoint is in memory at a time. Beside its forward pass the statistics take 12 bytes * batch * heads *
block * tokens (ViT-B/16 at 480 px, block 64: 8 MB an image), and the images 3 * size^2 bytes each. ViT-B/16
at 480 px takes twice its forward pass: 2.2 s an image on one idle CPU core, 100 images in 4 minutes, with
1.3 GiB in all. Give a GPU --batch 8 or more.
"""

import argparse
from pathlib import Path

import torch

from pretrain.analysis.attention import BLOCK
from pretrain.analysis.attention_report import build_page, draw
from pretrain.analysis.attention_study import Study, check_masks, check_size, write_statistics, write_summary
from pretrain.analysis.pca import read_place
from pretrain.cli import at_least, evaluation_parser, models_of, pictures_of
from pretrain.data.images import square
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel, named_apart
from pretrain.files import write_text
from pretrain.results import read_result
from pretrain.results.folder import leave_readme
from pretrain.signals import StopSignals

QUERIES = ["0.25,0.25", "0.75,0.25", "0.5,0.5", "0.25,0.75", "0.75,0.75"]
BOX, CROSS = "box-wise", "cross-wise"


def main(arguments: list[str]) -> None:
    """Parse, look at all files, measure one checkpoint after the other, draw."""
    parser = evaluation_parser(__doc__, need_weights=False)
    add = parser.add_argument
    add("--compare-masks", type=Path, nargs=2, metavar=("BOX", "CROSS"), help="two runs, for Fig. 7")
    add("--size", type=int, default=480, metavar="PX", help="side of the images (%(default)s: the paper's)")
    add("--crop", action="store_true", help="central squares; else the images are squeezed")
    add("--max-images", type=int, default=100, help="at equal steps from the first (%(default)s)")
    add("--queries", nargs="+", default=QUERIES, metavar="X,Y", help="query patches, 0 to 1")
    add("--shown", type=int, default=3, help="the first images, whose attention is drawn (%(default)s)")
    add("--batch", type=int, default=1, help="images at a time; a GPU wants 8 or more (%(default)s)")
    add("--block", type=int, default=BLOCK, help="queries at a time (%(default)s)")
    options = parser.parse_args(arguments)
    at_least(options, size=1, max_images=1, shown=1, batch=1, block=1)
    subjects, output = looked_at(options), options.output
    queries = list(map(read_place, options.queries))
    output.mkdir(parents=True, exist_ok=True)  # an error now where it cannot be made
    device = choose_device(options.device)
    pictures = pictures_of(options, lambda pixels: square(pixels, options.size, options.crop))
    shown = torch.stack(pictures.pixels[: options.shown])
    measured, maps = [], {}
    with StopSignals() as signals:
        study = Study(pictures, options.crop, options.bf16, device, options.batch, options.block, signals)
        for subject in subjects:
            backbone = subject.build().to(device)
            measured.append(study.measure(subject, backbone, output / subject.folder))
            maps[subject.label] = study.maps(backbone, shown, queries)
    write_statistics(output / "statistics.csv", measured, pictures.names)
    write_summary(output / "summary.csv", measured)
    compared = (subjects[-2].label, subjects[-1].label) if options.compare_masks else None
    figures = draw(output / "figures", measured, pictures.names, shown, maps, queries, compared)
    results = [read_result(output / subject.folder) for subject in subjects]
    write_text(output / "report.html", build_page(measured, results, figures, pictures.broken))
    leave_readme(output, "analysis")
    print(f"{output / 'report.html'}: {len(measured)} checkpoints, {len(pictures.names)} images")


def looked_at(options: argparse.Namespace) -> list[EvalModel]:
    """The checkpoints, the two of --compare-masks last; all files are looked at before one is measured."""
    subjects = models_of(options)
    if options.compare_masks:
        check_masks(*options.compare_masks)
        asked = {"weights": options.compare_masks, "names": [BOX, CROSS]}
        subjects = named_apart([*subjects, *models_of(argparse.Namespace(**vars(options) | asked))])
    if not subjects:
        raise UserError("nothing to analyze: give --weights or --compare-masks")
    check_size(subjects, options.size)
    return subjects
