"""Attention of any checkpoints over any images: NMI and MAD by layer and head, and what query patches attend to (appendix A).

    python tools/analyze_attention.py --weights dino.pth mae.pth runs/ours --images coco/val2017 --output attention
    python tools/analyze_attention.py --compare-masks runs/box runs/cross --images coco/val2017 --output masks

writes to the output folder:
    statistics.csv        every checkpoint, image, layer and head
    summary.csv           by layer: mean of the heads, its mean and standard deviation over the images
    figures/              PNG and SVG: Fig. 5 and its heads, Fig. 6 (one an image), Fig. 7 (--compare-masks), Fig. 3
    report.html           all of it in one page
    checkpoints/NAME/     statistics.csv and result.json of one; the same command again takes from there what is measured already

One checkpoint is in memory at a time. Beside its forward pass the statistics take 12 bytes * batch * heads * block * tokens
(ViT-B/16 at 480 px, block 64: 8 MB an image), and the images 3 * size^2 bytes each. ViT-B/16 at 480 px takes twice its forward
pass: 2.2 s an image on one idle CPU core, 100 images in 4 minutes, with 1.3 GiB in all. Give a GPU --batch 8 or more.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse

import torch
from omegaconf import OmegaConf

from pretrain.analysis.attention_report import BOX, CROSS, build_page, draw
from pretrain.analysis.attention_statistics import BLOCK
from pretrain.analysis.attention_study import Study, candidates, folder_name, mask_runs, names_of, read_pictures
from pretrain.analysis.attention_tables import write_statistics, write_summary
from pretrain.build import build_backbone
from pretrain.cli import run
from pretrain.config import load_config
from pretrain.device import DEVICES, choose_device
from pretrain.errors import UserError
from pretrain.results import read_result
from pretrain.signals import StopSignals

QUERIES = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.75)]


def main(arguments: list[str]) -> None:
    """Parse, look at all files, measure one checkpoint after the other, draw."""
    options = parse(arguments)
    paths, names = [*options.weights], names_of(options.weights, options.names)
    if options.compare_masks:
        paths, names = [*paths, *mask_runs(*options.compare_masks)], [*names, BOX, CROSS]
    if not paths:
        raise UserError("nothing to analyse: give --weights or --compare-masks")
    checked = candidates(paths, names, options.source, options.patch_size, options.size)
    data = load_config().data
    OmegaConf.set_readonly(data, False)
    data.root = options.images
    pictures = read_pictures(data, options.max_images, options.size, options.crop)
    for line in pictures.broken:
        print(f"left out: {line}", flush=True)
    device = choose_device(options.device)
    folder, shown = options.output / "checkpoints", pictures.pixels[: options.shown]
    measured, maps = [], {}
    with StopSignals() as signals:
        study = Study(
            pictures,
            crop=options.crop,
            bf16=options.bf16,
            device=device,
            autocast=torch.autocast(device.type, torch.bfloat16, enabled=options.bf16),
            batch=options.batch,
            block=options.block,
            say=lambda line: print(line, flush=True),
            stopped=lambda: signals.received is not None,
        )
        for candidate in checked:
            backbone = build_backbone(candidate.backbone, candidate.path, **candidate.flags).eval().to(device)
            measured.append(study.measure(candidate, backbone, folder / folder_name(candidate.name)))
            maps[candidate.name] = study.maps(backbone, shown, options.queries)
    write_statistics(options.output / "statistics.csv", measured, pictures.names)
    write_summary(options.output / "summary.csv", measured)
    draw(options.output / "figures", measured, pictures.names, shown, maps, options.queries)
    results = [read_result(folder / folder_name(candidate.name)) for candidate in checked]
    page = build_page(measured, results, options.output / "figures", pictures.broken)
    (options.output / "report.html").write_text(page, encoding="utf-8")
    print(f"{options.output / 'report.html'}: {len(measured)} checkpoints, {len(pictures.names)} images")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, nargs="+", default=[], metavar="FILE", help="any supported checkpoints, or run folders"
    )
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="of the weights, in the figures; else the files'")
    parser.add_argument("--source", help="what all weights are (dino, mae, ...); else found out from each file")
    parser.add_argument("--patch-size", type=int, metavar="PX", help="resample all patch projections to this size")
    parser.add_argument("--compare-masks", type=Path, nargs=2, metavar=("BOX", "CROSS"), help="two runs, for Fig. 7")
    parser.add_argument("--images", required=True, metavar="DIR", help="anything that data.root may be")
    parser.add_argument("--size", type=int, default=480, metavar="PX", help="side of the images (%(default)s, as in the paper)")
    parser.add_argument("--crop", action="store_true", help="central squares; else the images are squeezed")
    parser.add_argument("--max-images", type=int, default=100, help="at equal steps from the first (%(default)s)")
    parser.add_argument("--queries", type=place, nargs="+", default=QUERIES, metavar="X,Y", help="query patches, 0 to 1")
    parser.add_argument("--shown", type=int, default=3, help="images whose attention is drawn, the first ones (%(default)s)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="%(default)s")
    parser.add_argument("--batch", type=int, default=1, help="images at a time; a GPU wants 8 or more (%(default)s)")
    parser.add_argument("--block", type=int, default=BLOCK, help="queries at a time (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 forward passes; the statistics stay float32")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    for key in ("size", "max_images", "shown", "batch", "block", "patch_size"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UserError(f"--{key.replace('_', '-')} {value}: must be at least 1")
    return options


def place(text: str) -> tuple[float, float]:
    """``0.25,0.5`` as a place in image units."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no X,Y") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} lies outside the image: 0 to 1 each")
    return x, y


if __name__ == "__main__":
    run(main)
