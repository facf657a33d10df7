"""Whole files and what finds them: images in a folder, nested or flat, or in a list; files of many images."""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from pretrain.data.decode import BrokenImage
from pretrain.data.digest import Digest, FileSizes, hash_of
from pretrain.errors import UserError, one_line
from pretrain.files import MAX_LIST_BYTES, read_plain
from pretrain.log import log

T = TypeVar("T")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LOOKED_AT = 100  # names of a list, to tell that it is one
MAX_FILE_BYTES = 2**29  # of one image; a larger file would be read completely before it is refused


def is_image(name: bytes) -> bool:
    """Whether a name has a suffix of images, in any case; hidden files (``._a.jpg``) do not count."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES and not hidden(name)


def hidden(name: bytes) -> bool:
    """Whether a path's last part starts with a dot."""
    return os.path.basename(name).startswith(b".")


def left_out(names: Sequence[bytes], where: str | os.PathLike[str]) -> str:
    """A line on the files that a listing of images leaves out by their names: how many, of which suffixes, and
    the first by name; empty if there are none."""
    if not names:
        return ""
    kinds = Counter(shown(os.path.splitext(name)[1].lower()) or "no suffix" for name in names)
    told = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
    more = ", ..." if len(kinds) > 5 else ""
    return f"left out, no images by their names: {told}{more} in {where}, the first {shown(min(names))}"


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


class Names:
    """Millions of byte strings in two arrays, which forked workers share (they copy a list of them)."""

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)  # [N] in bytes
        self.text = np.frombuffer(b"".join(names), np.uint8)  # [ends[-1]]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes()

    def digest(self) -> str:
        """A hash of the names and their order."""
        return hash_of(self.text, self.ends.astype("<i8"))


def shown(name: bytes) -> str:
    """A name for messages, in one line: invalid UTF-8 and control characters become ``\\x..``."""
    return one_line(name.decode("utf-8", "backslashreplace"))


class FileSource:
    """Image files by name, relative to ``root`` or absolute."""

    def __init__(self, root: str, names: Names) -> None:
        self.root, self.names = os.fsencode(root), names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The name in the folder or the list."""
        return shown(self.names[index])

    def path(self, index: int) -> bytes:
        """Of the file."""
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        """The file's content; raises BrokenImage."""
        return read_file(self.path(index))

    def digest(self) -> Digest:
        """Of the names as they are listed, and the files' sizes."""
        sizes = FileSizes(self.path, len(self))
        return Digest(len(self), self.names.digest(), sizes.wait, sizes.begin)


def folder_source(root: str, subfolders: Sequence[str] = ("",)) -> FileSource:
    """All images under a folder, or under some of its sub-folders, sorted by path.

    Suffixes tell images; other files are counted and named in a line of the log. Links to folders are
    followed, and each real folder is listed once. Hidden files and folders are left out.

    Raises:
        UserError: a folder is missing, cannot be listed or has no image; names data.root, or data.split for a
            sub-folder.
    """
    if not os.path.isdir(root):
        raise UserError(f"data.root: no folder {root}")
    found, others = list[bytes](), list[bytes]()
    for subfolder in subfolders:
        within, key = os.path.join(root, subfolder), "data.split" if subfolder else "data.root"
        if not os.path.isdir(within):
            raise UserError(f"{key}: no folder {within}")
        start = os.path.normpath(subfolder) if subfolder else ""
        images, rest = _list_images(os.fsencode(root), os.fsencode(start))
        if not images:
            raise UserError(f"{key}: no image ({', '.join(SUFFIXES)}) in {within}")
        found += images
        others += rest
    if others:
        log(left_out(sorted(set(others)), root))
    return FileSource(root, Names(sorted(set(found))))  # a set: sub-folders may lie within one another


def _list_images(root: bytes, subfolder: bytes) -> tuple[list[bytes], list[bytes]]:
    """Images, and other files: paths relative to ``root``, in no order."""
    found, others, waiting, seen = list[bytes](), list[bytes](), [subfolder], set()
    while waiting:
        relative = waiting.pop()
        folder = os.path.join(root, relative)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listed:
                # popped, the first by name comes first
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"data.root: cannot list {shown(folder)}: {error.strerror}") from error
        for entry in entries:
            path = os.path.join(relative, entry.name)
            # a link is not looked up: slow by the million
            if is_image(entry.name) and not entry.is_dir(follow_symlinks=False):
                found.append(path)
            elif is_folder(entry) and not hidden(entry.name):
                waiting.append(path)
            elif not hidden(entry.name):
                others.append(path)
    return found, others


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """Also behind a link; links that point at each other are none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_source(path: str) -> FileSource:
    """The images in a text file, one a line, relative to the list's folder or absolute, in the list's order.

    Empty lines and lines that start with ``#`` are left out. A missing file counts as a broken image when it
    is read.

    Raises:
        UserError: there is no such file; it has no names.
    """
    try:
        lines = [line.strip() for line in read_plain(path, MAX_LIST_BYTES).splitlines()]
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"data.root: cannot read the list {path}: {told}") from error
    names = Names(line for line in lines if line and not line.startswith(b"#"))
    if not len(names):
        raise UserError(f"data.root: no image is named in the list {path}")
    source = FileSource(os.path.dirname(os.path.abspath(path)), names)
    # Any file of this machine may be taken for a list: nothing of it is repeated then.
    first = [names[i] for i in range(min(len(names), LOOKED_AT))]
    if not any(is_image(name) or os.path.exists(os.path.join(source.root, name)) for name in first):
        raise UserError(
            f"data.root: {path} is no list of images: its first {len(first)} names are of no image"
        )
    return source


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
    files = sorted(at for at in within.iterdir() if at.suffix.lower() == suffix and named.match(at.name))
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
        files += map(Path, found := sorted(glob.glob(name)))
        if not found and not glob.has_magic(name):
            raise UserError(f"data.root: no file {name}, which {root} names")
    if not files:
        raise UserError(f"data.root: no file is named {root}")
    return files


def is_pattern(root: str) -> bool:
    """Whether a path has braces or wildcards."""
    return re.search(r"[{*?\[]", root) is not None


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern with ``{000..146}`` (padded like the first) and ``{a,b}``, not nested."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    choices = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = map(int, numbers.groups())
        if last < first:
            raise UserError(f"data.root: {braces[0]} in {pattern} counts down")
        choices = [f"{n:0{len(numbers[1])}}" for n in range(first, last + 1)]
    rest = expand_braces(pattern[braces.end() :])
    return [pattern[: braces.start()] + choice + tail for choice in choices for tail in rest]


class Handles(Generic[T]):
    """The open files of a source: the ``size`` used last. Pickles leave them out; a forked process opens its own."""

    def __init__(self, size: int) -> None:
        self.size, self._process = size, os.getpid()
        self._kept: dict[Hashable, T] = {}  # the last used one last

    def get(self, key: Hashable, open_it: Callable[[], T]) -> T:
        """The object under ``key``, opened if necessary; the least recently used one is dropped."""
        if self._process != os.getpid():
            self._kept, self._process = {}, os.getpid()
        opened = self._kept[key] = self._kept.pop(key) if key in self._kept else open_it()
        if len(self._kept) > self.size:
            del self._kept[next(iter(self._kept))]
        return opened

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Handles, (self.size,)
