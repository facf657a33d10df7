"""Fine-tune a backbone for segmentation on ADE20K, or on a folder in its layout, with a linear decoder.

python tools/train_seg.py --weights run/backbone.safetensors --data ADEChallengeData2016 --output seg

Further words set fields of the protocol, lr=3e-5, or flags of the backbone, backbone.depth=4. The protocol's own result is the
best of its grid: --sweep.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse
import os

from pretrain.cli import run
from pretrain.errors import UserError
from pretrain.overrides import fields_and_flags
from pretrain.weights import backbone_name
from seg_plugin.protocol import NAMES, protocol, with_overrides
from seg_plugin.run import SegmentationRun, train
from seg_plugin.sweep import sweep


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", metavar="NAME", help="registry name, vit_small_patch16, ...; a file of ours says it itself")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="its checkpoint; none: random initialisation")
    parser.add_argument("--data", type=Path, required=True, metavar="ADE_ROOT", help="with images/ and annotations/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--protocol", default=NAMES[0], choices=NAMES, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    cores = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help="data-loading processes (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument("--sweep", nargs="?", const="all", metavar="N", help="the grid of lr, weight decay and seeds, and the "
                        "best of it; with N, only its run N (an array job)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the protocol; backbone.KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)

    fields, flags = fields_and_flags(options.overrides)
    one = SegmentationRun(
        backbone=backbone_name(options.backbone, options.weights),
        weights=options.weights,
        data=options.data,
        output=options.output,
        protocol=with_overrides(protocol(options.protocol), fields),
        seed=options.seed,
        device=options.device,
        workers=options.workers,
        backbone_flags=flags,
    )
    if options.sweep is None:
        result = train(one, options.resume)
    else:
        if options.sweep != "all" and not options.sweep.isdigit():
            raise UserError(f"--sweep: {options.sweep!r} is no number of a run")
        result = sweep(one, options.resume, None if options.sweep == "all" else int(options.sweep))
    print(f"wrote {result}")


if __name__ == "__main__":
    run(main)
