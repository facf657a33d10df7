"""Compose the demo's data: an image folder, a small COCO and a small ADE20K of shapes on photographs.

posfield toy-data --output toy
"""

import time
from pathlib import Path

from pretrain.cli import command_parser
from pretrain.data.toy_sets import write_toy_data
from pretrain.log import ProgressLine


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="gets images/, coco/, ade/, toy.json")
    add("--images", type=int, default=400, help="pictures without labels, for pre-training (%(default)s)")
    add("--train", type=int, default=240, help="labeled training pictures (%(default)s)")
    add("--val", type=int, default=60, help="labeled pictures of held-out photographs (%(default)s)")
    add("--size", type=int, default=160, help="short side in pixels (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, other pictures (%(default)s)")
    add("--overwrite", action="store_true", help="replace toy data that the folder already holds")
    options = parser.parse_args(arguments)

    start, n_written = time.perf_counter(), 0
    line = ProgressLine("compose", options.images + options.train + options.val)

    def tell() -> None:
        nonlocal n_written
        n_written += 1
        each_s = (time.perf_counter() - start) / n_written
        line.update(n_written, "", each_s * (line.total - n_written))

    record = write_toy_data(options.output, n_images=options.images, n_train=options.train, n_val=options.val,
                            size_px=options.size, seed=options.seed, overwrite=options.overwrite, tell=tell)  # fmt: skip
    line.close()
    if not record["written"]:
        print(f"{options.output} already holds this toy data: nothing to do")
        return
    print(f"{options.output}: {record['n_images']} pictures in images/, {record['n_train']} + {record['n_val']} in "
          f"coco/ and ade/, classes {', '.join(record['classes'])} ({time.perf_counter() - start:.1f} s)")  # fmt: skip
