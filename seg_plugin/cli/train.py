"""Fine-tune a backbone for segmentation with a linear decoder: ADE20K, another data set, or your own masks.

posfield segment --weights run/backbone.safetensors --data ADEChallengeData2016 --output seg
posfield segment --weights run/backbone.safetensors --data VOCdevkit/VOC2012 --dataset voc_aug --output voc
posfield segment --weights run/backbone.safetensors --data FOLDER --output mine --void 0,255

FOLDER holds images/ and masks/, each with train/ and val/, and perhaps classes.txt or labels.yaml: what posfield
evaluate dense takes (pretrain/data/datasets/folder.py). More words set fields of the protocol, lr=3e-5, or
arguments of the backbone, backbone.depth=4.

The protocol's result is the best of its grid of lr and weight decay, with several seeds for each setting:

posfield segment --sweep --jobs 8 --weights W --data ADE --output sweep        (exit code 85: start it again)
posfield submit --gpus 1 --array 16 -- segment --sweep {index} --weights W --data ADE --output sweep --resume
"""

import argparse
from pathlib import Path
from typing import Any

from pretrain.cli import add_mask_options, command, fields_and_kwargs, fine_tuning_parser, masks_of
from pretrain.errors import UserError
from pretrain.log import say
from seg_plugin.data import DATASETS
from seg_plugin.run import prepare, train
from seg_plugin.sweep import run_point, status, sweep


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = fine_tuning_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set")
    parser.add_argument(
        "--dataset", choices=tuple(DATASETS), help="and its protocol; left out: what DIR looks like, else own"
    )
    parser.add_argument("--sweep", nargs="?", const="all", metavar="N", help="the whole grid, or its run N alone (an array job); "
                        "status: what is done")  # fmt: skip
    jobs = "runs of the sweep at a time, each on a GPU (%(default)s)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    add_mask_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.sweep not in (None, "all", "status") and not options.sweep.isdigit():
        raise UserError(f"--sweep: {options.sweep!r} is no number of a run")
    for name in ("seed", "workers"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name}: {getattr(options, name)} is less than 0")
    if options.jobs < 1 or (options.jobs > 1 and options.sweep != "all"):
        raise UserError(f"--jobs {options.jobs}: how many runs of a --sweep go on at a time, at least 1")
    return options


def command_of_a_run(arguments: list[str]) -> list[str]:
    """This command line for one run of the sweep, without the run's number."""
    kept = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    kept.add_argument("--sweep", nargs="?")
    kept.add_argument("--jobs")
    kept.add_argument("--resume", action="store_true")
    _, words = kept.parse_known_args(arguments)
    return command("segment", *words, "--resume", "--sweep")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    fields, model_kwargs = fields_and_kwargs(options.overrides)
    named = ("output", "weights", "backbone", "dataset", "seed", "device", "workers")
    given: dict[str, Any] = {name: getattr(options, name) for name in named} | fields
    one = prepare(options.data, masks=masks_of(options), model_kwargs=model_kwargs, **given)
    if options.sweep is None:
        say(f"result: {train(one, options.resume)}")
        return
    if swept := {"lr", "weight_decay"} & set(fields):
        raise UserError(
            f"--sweep: {min(swept)}={fields[min(swept)]} has no effect; give lr_grid or weight_decay_grid"
        )
    if options.sweep == "status":
        print(status(one))
    elif options.sweep == "all":
        say(f"result: {sweep(one, command_of_a_run(arguments), options.jobs)}")
    else:
        say(f"result: {run_point(one, int(options.sweep))}")
