"""Pair images with label maps: folders are listed once, with all below them, and no file is opened."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from pretrain.data.sources.files import SUFFIXES
from pretrain.errors import UserError
from pretrain.files import MAX_LIST_BYTES, read_lines

# Paths of image and label map of each item; as text, 118,287 pairs take half a second
Pairs = Sequence[tuple[str, str]]
MAP_SUFFIXES = (".png",)
IMAGE_SUFFIXES = SUFFIXES


def first_folder(root: Path, names: Iterable[str]) -> Path | None:
    """The first of these sub-folders that exists."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def by_stem(
    folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, may_be_empty: bool = False
) -> dict[str, str]:
    """{stem: path} of the files in a folder and below with one of these suffixes, without hidden ones.

    A stem has the folders in it: ``city/0001``. Links to folders are followed, and each real folder is listed once.

    Raises:
        UserError: there is no such folder or file; two files differ only in their suffix.
    """
    found = dict[str, str]()
    for stem, path in below(folder, suffixes):
        if stem in found:
            twice = sorted(map(os.path.basename, (path, found[stem])))
            raise UserError(f"{folder} has two files {stem}: {' and '.join(twice)}")
        found[stem] = path
    if not found and not may_be_empty:
        raise UserError(f"no {' or '.join('*' + suffix for suffix in suffixes)} in {folder}")
    return found


def below(folder: Path, suffixes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Stem and path of each file in a folder and below with one of these suffixes, without hidden ones.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} cannot be listed (no such folder)")
    seen = set[str]()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        # Links may point at each other
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        names = [] if real in seen else names
        seen.add(real)
        inside = "" if at == str(folder) else os.path.relpath(at, folder).replace(os.sep, "/") + "/"
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and not name.startswith("."):
                yield inside + stem, os.path.join(at, name)


def named(files: dict[str, str], name: str) -> dict[str, str]:
    """Those files whose name, without suffix, is of the form ``{stem}_mask``, by what ``{stem}`` stands for."""
    before, after = name.split("{stem}")
    rule = re.compile(rf"(.*/)?{re.escape(before)}([^/]+){re.escape(after)}", re.DOTALL)
    found = {rule.fullmatch(stem): file for stem, file in files.items()}
    return {(match[1] or "") + match[2]: file for match, file in found.items() if match}


def paired(
    images: dict[str, str], maps: dict[str, str], stems: Collection[str] | None = None, listed: object = ""
) -> Pairs:
    """Image and map of each stem. Without ``stems``: of all, sorted; then each image needs a map and each map
    an image.

    Args:
        stems: the wanted ones, in this order.
        listed: the list that names them, for messages.

    Raises:
        UserError: names the first image without a map, or map without an image, and their number.
    """
    wanted = sorted(images.keys() | maps.keys()) if stems is None else stems
    of = f" of {listed}" if listed else ""
    for there, what, missing in ((images, "label maps", "image"), (maps, "images", "label map")):
        if alone := [stem for stem in wanted if stem not in there]:
            place = os.path.dirname(next(iter(there.values())))
            # Any file of this machine may be taken for a list: of one that fits nowhere nothing is repeated.
            first = "" if listed and len(alone) == len(wanted) else f"; the first: {alone[0]}"
            raise UserError(f"{len(alone)} {what}{of} have no {missing} in {place}{first}")
    return [(images[stem], maps[stem]) for stem in wanted]


def listed_stems(file: Path, whole: bool = False) -> list[str]:
    """The images that a text file names, one a line: the base name of the first word, without suffix.

    Empty lines and lines that start with ``#`` are left out.

    Args:
        whole: a line is a name, with folders and spaces, perhaps in quotes, as CVAT writes it.

    Raises:
        UserError: the file cannot be read, names no image, or one twice.
    """
    try:
        lines = [
            [line.strip('"')] * bool(line) if whole else line.split()
            for line in read_lines(file, MAX_LIST_BYTES)
        ]
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is no readable list of images ({told})") from error
    stems = dict[str, int]()
    for number, words in enumerate(lines, 1):
        if words and not words[0].startswith("#"):
            name = words[0] if whole else words[0].rpartition("/")[2]
            stem, suffix = os.path.splitext(name)
            before = stems.setdefault(stem if suffix.lower() in IMAGE_SUFFIXES else name, number)
            if before != number:
                raise UserError(f"{file} names one image twice, in the lines {before} and {number}")
    if not stems:
        raise UserError(f"{file} names no image")
    return list(stems)
