"""Pre-train: ``posfield pretrain --config configs/pretrain/toy.yaml data.root=photos run.output=runs/toy``."""

import os

# read when torch starts: large pages on Linux, a twentieth of a step on the CPU
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from pretrain import distributed
from pretrain.cli import add_data_changed, command_parser
from pretrain.config import load_config
from pretrain.errors import Interrupted
from pretrain.train import train


def main(arguments: list[str]) -> None:
    """Parse, build, train."""
    parser = command_parser("Self-supervised pre-training; posfield config prints every key.")
    add = parser.add_argument
    files = "a YAML file, e.g. configs/pretrain/toy.yaml, or a recipe by name; without: intertwined-100ep"
    add("--config", help=files)
    newest = "go on from the newest whole checkpoint in run.output (auto), or the one named"
    add("--resume", nargs="?", const="auto", default="", metavar="auto|ITERATION|DIR", help=newest)
    add_data_changed(parser)
    add("overrides", nargs="*", metavar="key=value", help="e.g. data.root=photos optim.batch_size=64")
    options = parser.parse_intermixed_args(arguments)
    if "=" in options.resume:  # `--resume key=value`: --resume stands alone
        options.overrides, options.resume = [options.resume, *options.overrides], "auto"
    try:
        config = load_config(options.config, options.overrides)
        train(config, resume=options.resume, data_changed=options.data_changed)
    except Interrupted:
        # All ranks end here; where one alone fails, to leave the group could mean to wait for the others
        distributed.stop()
        raise
    distributed.stop()
