"""Image files in a folder, nested (as ImageNet's) or flat, or in a list."""

import os
from collections.abc import Sequence

from pretrain.data.sources.files import SUFFIXES, is_image, read_file
from pretrain.data.sources.names import Names, shown
from pretrain.errors import UserError


class FileSource:
    """Image files by name, relative to ``root`` or absolute."""

    def __init__(self, root: str, names: Names) -> None:
        self.root, self.names = os.fsencode(root), names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The name in the folder or the list."""
        return shown(self.names[index])

    def read(self, index: int) -> bytes:
        """The file's content; raises BrokenImage."""
        return read_file(os.path.join(self.root, self.names[index]))


def folder_source(root: str, subfolders: Sequence[str] = ("",)) -> FileSource:
    """All images under a folder, or under some of its sub-folders, sorted by path: the same order on every
    machine.

    Suffixes tell images. Links to folders are followed, and each real folder is listed once. Hidden files and
    folders are left out.

    Raises:
        UserError: a folder is missing, cannot be listed or has no image; names data.root, or data.split for a
            sub-folder.
    """
    if not os.path.isdir(root):
        raise UserError(f"data.root: no folder {root}")
    found: list[bytes] = []
    for subfolder in subfolders:
        within, key = os.path.join(root, subfolder), "data.split" if subfolder else "data.root"
        if not os.path.isdir(within):
            raise UserError(f"{key}: no folder {within}")
        images = _list_images(
            os.fsencode(root), os.fsencode(os.path.normpath(subfolder)) if subfolder else b""
        )
        if not images:
            raise UserError(f"{key}: no image ({', '.join(SUFFIXES)}) in {within}")
        found += images
    return FileSource(root, Names(sorted(set(found))))  # a set: sub-folders may lie within one another


def _list_images(root: bytes, subfolder: bytes) -> list[bytes]:
    """Paths relative to ``root``, in no order."""
    found, waiting, seen = [], [subfolder], set()
    while waiting:
        relative = waiting.pop()
        try:
            status = os.stat(os.path.join(root, relative))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, relative)) as listed:
                # popped, the first by name comes first
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(
                f"data.root: cannot list {shown(os.path.join(root, relative))}: {error.strerror}"
            ) from error
        for entry in entries:
            path = os.path.join(relative, entry.name)
            # a link is not looked up: slow by the million
            if is_image(entry.name) and not entry.is_dir(follow_symlinks=False):
                found.append(path)
            elif entry.is_dir() and not entry.name.startswith(b"."):
                waiting.append(path)
    return found


def list_source(path: str) -> FileSource:
    """The images in a text file, one a line, relative to the list's folder or absolute, in the list's order.

    Empty lines and lines that start with ``#`` are left out. A missing file counts as a broken image when it
    is read.

    Raises:
        UserError: there is no such file; it has no names.
    """
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for line in file.read().removeprefix(b"\xef\xbb\xbf").splitlines()]
    except OSError as error:
        raise UserError(f"data.root: cannot read the list {path}: {error.strerror}") from error
    names = Names(line for line in lines if line and not line.startswith(b"#"))
    if not len(names):
        raise UserError(f"data.root: no image is named in the list {path}")
    return FileSource(os.path.dirname(os.path.abspath(path)), names)
