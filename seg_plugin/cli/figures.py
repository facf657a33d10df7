"""Draw a segmentation run's predictions: beside the ground truth, or on a folder of your own images.

posfield analyze segmentations --run seg                          (its validation images, into seg/figures)
posfield analyze segmentations --run seg --images photographs --labels --output drawn
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from pretrain.cli import at_least
from pretrain.errors import TRUST_HELP
from seg_plugin.figures import draw_page, palette_of, save_labels
from seg_plugin.predict import (
    Segmented,
    dataset_of_run,
    load_segmenter,
    segment_dataset,
    segment_folder,
    spread,
)

ROWS = 4  # images a page


def main(arguments: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder: its config and newest checkpoint")
    source = parser.add_mutually_exclusive_group().add_argument
    source("--data", type=Path, metavar="DIR", help="a folder of the run's kind of data (the run's own)")
    source("--images", type=Path, metavar="DIR", help="images without masks: all of them")
    add("--split", default="validation", help="training | validation (%(default)s)")
    evenly = "images of the split, evenly spaced (%(default)s)"
    add("--count", type=int, default=16, metavar="N", help=evenly)
    add("--overlay", action="store_true", help="also the prediction over the image")
    stored = "also the predicted label maps as PNG, stored as the data's masks are"
    add("--labels", action="store_true", help=stored)
    add("--output", type=Path, metavar="DIR", help="(the run's figures/)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    at_least(options, count=1)
    segmenter = load_segmenter(options.run, options.device, options.trust)
    metainfo = segmenter.metainfo
    if options.images:
        samples: Iterator[Segmented] = segment_folder(segmenter, options.images)
        root, what, name = options.images, f"Predictions for images of {options.images.name}", "predictions"
    else:
        dataset = dataset_of_run(segmenter.model, options.split, options.data)
        samples = segment_dataset(segmenter.model, dataset, spread(options.count, len(dataset)))
        root, name = Path(dataset.labels.folder), options.split
        what = f"Segmentation of {name} images"
    folder, drawn = options.output or options.run / "figures", 0
    for page, rows in enumerate(iter(lambda: list(itertools.islice(samples, ROWS)), []), start=1):
        caption = ", ".join(row.path.stem for row in rows)
        caption += "." if options.images else "; light gray: not labeled."
        path, title = folder / f"{name}_{page:03d}.png", f"{what}, page {page}"
        draw_page(path, rows, metainfo, title=title, caption=caption, overlay=options.overlay)
        drawn += len(rows)
        for row in rows if options.labels else ():
            target = folder / "labels" / row.path.relative_to(root).with_suffix(".png")
            save_labels(target, row.predicted, palette_of(metainfo), metainfo["values"])
    print(f"{drawn} images drawn in {folder}")
