"""How every tool starts, reads its words, and ends: bad input in one clear line and exit code 2."""

import argparse
import contextlib
import importlib.util
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import (
    DiskError,
    Interrupted,
    UserError,
    disk_problem,
    explained_shortage,
    missing_package,
    one_line,
)
from pretrain.own_modules import import_own

if TYPE_CHECKING:
    import numpy as np

    from pretrain.data.datasets import MaskRule
    from pretrain.data.images import Images, Made
    from pretrain.eval_model import EvalModel

WITH_RESUME = ("posfield pretrain", "posfield detect", "posfield segment", "posfield evaluate dense")
MAY_BE_EMPTY = ("--void", "--map", "--mask-name")
REQUEUE_CODE = 85  # a run was stopped from outside and can be gone on with: start it again


def run(main: Callable[[list[str]], None]) -> None:
    """Run ``main(arguments)``.

    A :class:`UserError`, or an error of the file system, is printed as one line on stderr and ends the
    process with code 2. A non-finite loss exits with code 1, a run that was asked to stop and has saved with
    code 85. ``--traceback`` anywhere on the command line, or ``POSFIELD_TRACEBACK=1``, shows where the error
    came from.
    """
    arguments = sys.argv[1:]
    show_traceback = "--traceback" in arguments or os.environ.get("POSFIELD_TRACEBACK") == "1"
    logging.raiseExceptions = show_traceback  # a log file on a full disk would show one for every line
    try:
        refuse_empty(arguments)
        import_own()
        with explained_shortage("take smaller images or batches, or another --device"):
            main([a for a in arguments if a != "--traceback"])
    # OSError names the file; of a loss the run has said where
    except (UserError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        told = missing_package(error.name or "") if isinstance(error, ModuleNotFoundError) else str(error)
        if show_traceback or not told:
            raise
        if way := isinstance(error, OSError) and disk_problem(error):
            told = way
        if way or isinstance(error, DiskError):
            told += f", then go on with: {resumed(arguments)}"
        with contextlib.suppress(OSError):  # stderr may lie on the same full disk
            print(f"error: {one_line(told)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except Interrupted as stop:
        print(f"stopped: {stop}\ngo on with: {resumed(arguments)}", file=sys.stderr)
        sys.exit(REQUEUE_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def refuse_empty(words: Sequence[str]) -> None:
    """An empty path would be the working folder: every empty word is refused, but for options whose text may be.

    Raises:
        UserError: names the option.
    """
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        option = name if word.startswith("--") else option
        is_empty = not (value if equals and word.startswith("--") else word).strip()
        if is_empty and option not in MAY_BE_EMPTY:
            told = "an empty shell variable? give a value, or leave the option out"
            raise UserError(f"{option or 'arguments'}: {word!r} is empty ({told})")


def resumed(words: Sequence[str]) -> str:
    """The command line that goes on where this one stopped."""
    name = Path(sys.argv[0]).name
    # what was said of the data is saved with the run
    words = [word for word in words if word != "--data-changed"]
    asked = ["--resume"] * (name in WITH_RESUME and "--resume" not in words)
    return f"{name} {shlex.join([*words, *asked])}"


def command(name: str, *words: object) -> list[str]:
    """The command line of ``posfield NAME WORDS``, whatever the working folder is: a file, for
    ``python -m`` would look for modules there first."""
    main = importlib.util.find_spec("posfield.__main__")
    assert main is not None and main.origin is not None
    return [sys.executable, main.origin, *name.split(), *map(str, words)]


def at_least(options: argparse.Namespace, **least: int) -> None:
    """Check numbers of a command line; one that is not given passes.

    Raises:
        UserError: one is too small; names it.
    """
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than {number}")


def fields_and_kwargs(words: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The words of a fine-tuning: ``key=value`` fields of its protocol, and ``backbone.key=value`` arguments
    of the ViT.

    Returns:
        fields as text, which the protocol's types read; and arguments as :func:`pretrain.settings.plain`
        reads them.

    Raises:
        UserError: a word without ``=``, or a key that is given twice.
    """
    from pretrain.settings import plain, split_words  # loads pydantic, half of the time of `posfield --help`

    fields = split_words(words)
    given = {key: fields.pop(key) for key in list(fields) if key.startswith("backbone.")}
    for key, option in (("backbone.name", "backbone"), ("backbone.weights", "weights")):
        if key in given:
            raise UserError(f"{key}: give it as --{option}")
    names = {"backbone.layer_scale_init": "layerscale"}  # the setting, the ViT's argument
    return fields, {names.get(k, k.removeprefix("backbone.")): plain(text) for k, text in given.items()}


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is written."""
    as_written = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=as_written)


def fine_tuning_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that both kinds of fine-tuning have."""
    parser = command_parser(description)
    add = parser.add_argument
    add("--backbone", metavar="NAME", help="vit_base_patch16, ...; a file of ours says it itself")
    add("--weights", type=Path, metavar="FILE", help="its checkpoint; none: random initialization")
    add("--output", type=Path, required=True, metavar="DIR", help="run folder")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    cores = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=cores, help="data-loading processes of each rank (%(default)s)")
    add("--resume", action="store_true", help="go on from the folder's last checkpoint")
    add_data_changed(parser)
    add("overrides", nargs="*", metavar="key=value", help="fields of the protocol; backbone.KEY=VALUE")
    return parser


def add_data_changed(parser: argparse.ArgumentParser) -> None:
    """The option of every training."""
    told = "go on with --resume though the data are others than before; the result says so"
    parser.add_argument("--data-changed", action="store_true", help=told)


def add_mask_options(parser: argparse.ArgumentParser, may_divide: bool = True) -> None:
    """How masks of one's own are read, for every tool that reads them."""
    add = parser.add_argument
    add("--void", default="", metavar="VALUES", help="of your own masks: what is not counted, 0,255 (255)")
    add("--map", default="", metavar="VALUE=LABEL,...", help="labels of stored values, 255=1")
    add("--mask-name", default="", metavar="NAME", help="of an image's mask, '{stem}_seg.png'")
    if may_divide:
        told = "of a set that has one part: the share of its images that is kept for validation, 0.2"
        add("--val-share", type=float, default=0.0, metavar="SHARE", help=told)


def masks_of(options: argparse.Namespace) -> "MaskRule":
    """What :func:`add_mask_options` read."""
    from pretrain.data.datasets import mask_rule  # takes seconds: torch

    return mask_rule(options.void, options.map, options.mask_name, options.val_share)


def evaluation_parser(
    description: str | None, several: bool = True, need_weights: bool = True, without: Collection[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options that evaluations share, but for those ``without``: which weights
    (:func:`models_of`), images and device, and where to."""
    from pretrain.device import DEVICES  # loads torch, which other commands do without

    def add(name: str, **how: Any) -> None:
        if name not in without:
            parser.add_argument(name, **how)

    parser = command_parser(description)
    if several:
        told = "any checkpoints, or run folders"
        add("--weights", type=Path, nargs="+", metavar="FILE", required=need_weights, default=[], help=told)
        add("--names", nargs="+", default=[], metavar="NAME", help="of their methods; else the files'")
    else:
        add("--weights", type=Path, required=True, metavar="FILE", help="any checkpoint, or run folder")
    add("--source", metavar="NAME", help="whose files they are (dino, mae, ...); else found out from each")
    add("--backbone", metavar="NAME", help="of all, where the files do not say it: vit_small_patch16, ...")
    add("--patch-size", type=int, metavar="PX", help="resample all patch projections to this size")
    add("--images", required=True, metavar="PATH", help="anything that data.root may be")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--device", default="auto", choices=DEVICES, help="%(default)s")
    add("--bf16", action="store_true", help="bfloat16 forward passes")
    return parser


def models_of(options: argparse.Namespace) -> "list[EvalModel]":
    """:func:`pretrain.eval_model.open_models` for the options of :func:`evaluation_parser`."""
    from pretrain.eval_model import open_models  # loads torch

    paths = options.weights if isinstance(options.weights, list) else [options.weights]
    names = getattr(options, "names", ())
    return open_models(paths, names, options.source, options.backbone, options.patch_size)


def pictures_of(options: argparse.Namespace, make: "Callable[[np.ndarray], Made]") -> "Images[Made]":
    """--max-images of --images, what ``make`` makes of their pixels; says which cannot be read."""
    from pretrain.data.images import read_images
    from pretrain.data.sources import DataSettings

    pictures = read_images(DataSettings(root=options.images), options.max_images, make)
    print("".join(f"left out: {line}\n" for line in pictures.broken), end="", flush=True)
    return pictures
