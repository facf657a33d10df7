"""Fine-tune a backbone for segmentation with a linear decoder: ADE20K, another data set, or your own masks.

posfield segment --weights run/backbone.safetensors --data ADEChallengeData2016 --output seg
posfield segment --weights run/backbone.safetensors --data VOCdevkit/VOC2012 --dataset voc_aug --output voc
posfield segment --weights run/backbone.safetensors --data FOLDER --output mine --void 0,255 epochs=100
posfield segment --resume --output mine                                          (a run that was stopped)

FOLDER holds images/ and masks/, each with train/ and val/, and perhaps classes.txt or labels.yaml, or is another
layout that posfield evaluate dense takes, too (pretrain/data/datasets/folder.py); of a set that has one part
--val-share 0.2 is kept for validation. More words set fields of the protocol, lr=3e-5, or
arguments of the backbone, backbone.depth=4.

The protocol's result is the best of its grid of lr and weight decay, with several seeds for each setting:

posfield segment --sweep --jobs 8 --weights W --data ADE --output sweep        (exit code 85: start it again)
posfield submit --gpus 1 --array 16 -- segment --sweep {index} --weights W --data ADE --output sweep --resume
"""

import argparse
from pathlib import Path
from typing import Any

from pretrain.cli import add_mask_options, at_least, command, fields_and_kwargs, fine_tuning_parser, masks_of
from pretrain.errors import UserError
from pretrain.log import say

FREE = ("device", "workers", "data_changed")  # may change at resume


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = fine_tuning_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="the data set")
    dataset = "and its protocol: ade20k, voc, voc_aug, cityscapes, own; left out: what DIR looks like"
    add("--dataset", metavar="NAME", help=dataset)
    grid = "the whole grid, or its run N alone (an array job); status: what is done"
    add("--sweep", nargs="?", const="all", metavar="N", help=grid)
    jobs = "runs of the sweep at a time, each on a GPU (%(default)s)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    add("--yes", dest="is_sure", action="store_true", help="the whole protocol, however few the images")
    add_mask_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.sweep not in (None, "all", "status") and not options.sweep.isdigit():
        raise UserError(f"--sweep: {options.sweep!r} is no number of a run")
    at_least(options, seed=0, workers=0)
    if options.data is None and (options.sweep is not None or not options.resume):
        raise UserError("--data: give the data set; with --resume a run's folder knows it")
    options.changes = {
        name: vars(options)[name] for name in FREE if vars(options)[name] != parser.get_default(name)
    }
    if options.jobs < 1 or (options.jobs > 1 and options.sweep != "all"):
        raise UserError(f"--jobs {options.jobs}: how many runs of a --sweep go on at a time, at least 1")
    return options


def command_of_a_run(arguments: list[str]) -> list[str]:
    """This command line for one run of the sweep, without the run's number."""
    dropped = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dropped.add_argument("--sweep", nargs="?")
    dropped.add_argument("--jobs")
    dropped.add_argument("--resume", action="store_true")
    _, words = dropped.parse_known_args(arguments)
    return command("segment", *words, "--resume", "--sweep")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    from seg_plugin.run import go_on, prepare, train  # loads MMSegmentation
    from seg_plugin.sweep import run_point, status, sweep

    if options.data is None:
        if other := options.weights or options.backbone or options.seed or options.overrides:
            told = f"{options.output} has its settings; leave out {other}, or give --data and all of them"
            raise UserError(f"--resume: {told}")
        say(f"result: {go_on(options.output, **options.changes)}")
        return
    fields, model_kwargs = fields_and_kwargs(options.overrides)
    named = ("output", "weights", "backbone", "dataset", "seed", "device", "workers", "is_sure")
    given: dict[str, Any] = {name: getattr(options, name) for name in named} | fields
    one = prepare(options.data, masks=masks_of(options), model_kwargs=model_kwargs, **given)
    for name in ("lr", "weight_decay") if options.sweep else ():
        if name in fields:
            told = "has no effect; give lr_grid or weight_decay_grid"
            raise UserError(f"--sweep: {name}={fields[name]} {told}")
    if options.sweep == "status":
        print(status(one))
    elif options.sweep is None:
        say(f"result: {train(one, options.resume, options.data_changed)}")
    elif options.sweep == "all":
        say(f"result: {sweep(one, command_of_a_run(arguments), options.jobs)}")
    else:
        say(f"result: {run_point(one, int(options.sweep), options.data_changed)}")
