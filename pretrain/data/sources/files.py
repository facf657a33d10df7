"""Read whole files, and find the files of a source."""

import glob
import os
import re
import stat
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from pretrain.data.decode import BrokenImage
from pretrain.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_FILE_BYTES = 2**29  # of one image; a larger file would be read completely before it is refused


def is_image(name: bytes) -> bool:
    """Whether a name has a suffix of images, in any case; hidden files (``._a.jpg``) do not count."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES and not os.path.basename(name).startswith(b".")


_SUFFIXES = frozenset(suffix.encode() for suffix in SUFFIXES)


def read_file(path: bytes) -> bytes:
    """The content of an image's file.

    Raises:
        BrokenImage: the file cannot be read, is not regular (reading a pipe would block), or is too large.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise BrokenImage("a folder" if stat.S_ISDIR(found.st_mode) else "no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise BrokenImage(f"a file of {found.st_size} bytes, more than {MAX_FILE_BYTES}")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name of a list
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from error


def whole_files(root: str, split: str, suffix: str) -> list[Path]:
    """Files with many images each, sorted: the file ``root``, the files of the pattern ``root``, or those in
    the folder ``root``.

    ``root`` may contain braces (``train-{000..146}.tar``, ``{a,b}.tar``) and ``*``, ``?``, ``[...]``.
    ``split`` is a sub-folder or, if there is none, the start of the files' names up to a character that is no
    letter, digit or ``_``: ``train`` takes train-000000.tar and train.tar, but not training.tar or
    train_extra-0.tar.

    Raises:
        UserError: there is no such file; names data.root, data.split or the missing file of a brace pattern.
    """
    if (files := _by_pattern(root)) is not None:
        if split:
            raise UserError(f"data.split={split}: data.root {root} names its files already")
        return files
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"data.root: no file or folder {root}")
    within = folder / split if split and (folder / split).is_dir() else folder
    begins = split if within == folder else ""
    named = re.compile(rf"{re.escape(begins)}(?![A-Za-z0-9_])" if begins else r"(?!\.)")
    files = sorted(
        path for path in within.iterdir() if path.suffix.lower() == suffix and named.match(path.name)
    )
    if not files:
        after = " (* begins with no letter, digit or _)" if begins else ""
        raise UserError(f"data.{'split' if split else 'root'}: no {begins}*{suffix} in {within}{after}")
    return files


def _by_pattern(root: str) -> list[Path] | None:
    """The files that ``root`` itself names; None for a folder."""
    if Path(root).is_file():
        return [Path(root)]
    if Path(root).is_dir() or not is_pattern(root):
        return None
    files: list[Path] = []
    for name in expand_braces(root):
        if re.search(r"[*?\[]", name):
            files += [Path(found) for found in sorted(glob.glob(name))]
        elif Path(name).is_file():
            files.append(Path(name))
        else:
            raise UserError(f"data.root: no file {name}, which {root} names")
    if not files:
        raise UserError(f"data.root: no file is named {root}")
    return files


def is_pattern(root: str) -> bool:
    """Whether a path has braces or wildcards."""
    return re.search(r"[{*?\[]", root) is not None


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with ``{000..146}`` (padded like the first number) and ``{a,b}``, in the order
    of a shell.

    Braces within braces are not supported.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text and inside of braces in turn
    choices: list[Sequence[str]] = []
    for i, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if i % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = map(int, numbers.groups())
            if last < first:
                raise UserError(f"data.root: {{{part}}} in {pattern} counts down")
            choices.append([f"{n:0{len(numbers[1])}}" for n in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(names) for names in product(*choices)]
