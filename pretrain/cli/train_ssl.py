"""Pre-train a backbone on images without labels.

posfield pretrain --from dinov2_vits14_pretrain.pth --data photos --output runs/mine      (from public weights)
posfield pretrain --data photos --output runs/mine                                        (from scratch)
posfield pretrain --config intertwined_vits16 --data IMAGENET/train --output runs/s16     (a recipe, as published)

The first two take the recipes own-images and own-images-scratch: network, positions and LayerScale as the file has
them, epochs and warm-up by the number of images, as many images at a time as the GPU holds. Words with = set any key;
posfield config NAME prints them all. With --resume and --output alone a run goes on under its own settings.
"""

import argparse
import os
from pathlib import Path
from typing import Any

# read when torch starts: large pages on Linux, a twentieth of a step on the CPU
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from pretrain.cli import add_data_changed, command_parser
from pretrain.errors import Interrupted, UserError

PATHS = {"start": "backbone.weights", "data": "data.root", "output": "run.output"}


def settings_of(options: argparse.Namespace) -> Any:
    """The settings of the words, and of what follows from the weights and the number of images.

    Raises:
        UserError: names the key and the value, or the file.
    """
    from pretrain import plan
    from pretrain.config import load_config, load_saved
    from pretrain.data.sources import open_source
    from pretrain.methods.method import RunSettings
    from pretrain.weights import backbone_name, read_checkpoint

    words = [*options.overrides, *(f"{key}={v}" for name, key in PATHS.items() if (v := vars(options)[name]))]
    if options.resume and not (options.config or options.start):
        # a folder knows its settings
        outputs = [word.partition("=")[2] for word in words if word.startswith("run.output=")]
        saved = Path(outputs[-1] if outputs else RunSettings().output, "config.yaml")
        if saved.is_file():
            return load_saved(saved, words)
        if not options.data and not any(word.startswith("data.root=") for word in words):
            raise UserError(
                f"--resume: {saved.parent} holds no run to go on with; begin one with --data or --config"
            )
    checkpoint = read_checkpoint(options.start) if options.start else None
    recipe = "own-images" if options.start else "own-images-scratch" if options.data else None
    config = load_config(options.config or recipe, words)
    own: dict[str, Any] = {}
    if checkpoint is not None:
        own = {"backbone.name": backbone_name(None, checkpoint)}
        if recipe and not options.config and checkpoint.model_kwargs.get("pos_encoding") == "rotary":
            own["positions.encoding"] = "rotary"
    if recipe and not options.config:
        own |= plan.own_epochs(len(open_source(config.data)), options.start)
    said = {word.partition("=")[0] for word in words}
    words += [f"{key}={value}" for key, value in own.items() if key not in said]
    return load_config(options.config or recipe, words)


def main(arguments: list[str]) -> None:
    """Parse, build, train."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "--from",
        dest="start",
        metavar="FILE",
        help="weights to start from: any that posfield reads (backbone.weights)",
    )
    add("--data", metavar="PATH", help="images: folder, list file, tar shards, parquet, ... (data.root)")
    add("--output", metavar="DIR", help="run folder (run.output)")
    files = "a YAML file, e.g. configs/pretrain/toy.yaml, or a recipe by name; without all three: intertwined-100ep"
    add("--config", help=files)
    newest = "go on from the newest whole checkpoint in run.output (auto), or the one named"
    add("--resume", nargs="?", const="auto", default="", metavar="auto|ITERATION|DIR", help=newest)
    add_data_changed(parser)
    add("overrides", nargs="*", metavar="key=value", help="e.g. data.root=photos optim.batch_size=64")
    options = parser.parse_intermixed_args(arguments)
    if "=" in options.resume:  # `--resume key=value`: --resume stands alone
        options.overrides, options.resume = [options.resume, *options.overrides], "auto"
    from pretrain import distributed  # loads torch, which a command line that is refused does without
    from pretrain.train import train

    config = settings_of(options)
    try:
        train(config, resume=options.resume, data_changed=options.data_changed)
    except Interrupted:
        # All ranks end here; where one alone fails, to leave the group could mean to wait for the others
        distributed.stop()
        raise
    distributed.stop()
