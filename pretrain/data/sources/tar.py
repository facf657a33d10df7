"""Images in tar shards, named as webdataset does.

A sample's key is the path of its members up to the first dot of the base name; the rest is the kind of
content (``jpg``, ``cls``, ``json``). The headers of the shards are read once, at the start (about 20
microseconds a member). Then an image is one ``pread``, in any order.
"""

import io
import os
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np

from pretrain.data.decode import BrokenImage
from pretrain.data.digest import Digest
from pretrain.data.sources.files import MAX_FILE_BYTES, SUFFIXES, Handles, Names, is_image, shown, whole_files
from pretrain.errors import UserError

# of a sample's images the first of these is taken
KINDS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key, kind
MAX_OPEN = 64  # shards a process


class TarSource:
    """One image for each sample; shards in the order of their names, samples in the order of the shard.

    If a sample has no image, a member such as ``my.photo.jpg`` counts as another kind of content
    (``photo.jpg``), with a warning.

    Args:
        root: a .tar file, a folder of them, or a pattern such as ``train-{000000..000146}.tar`` or
            ``train-*.tar``.
        split: a sub-folder, or the start of the shards' names.

    Raises:
        UserError: there is no shard or no image; a shard is missing, compressed, damaged or cut off (names
            the byte).
    """

    def __init__(self, root: str, split: str = "") -> None:
        self.shards = whole_files(root, split, ".tar")
        names: list[bytes] = []
        rows: list[tuple[int, int, int]] = []
        left_out: list[str] = []
        for shard, path in enumerate(self.shards):
            images, others = scan_shard(path)
            left_out += [f"{path.name}: {shown(name)}" for name in others]
            names += [name for name, _, _ in images]
            rows += [(shard, offset, size) for _, offset, size in images]
        if not rows:
            told = f"no image (a member named KEY.{{{', '.join(KINDS)}}}, KEY without a dot)"
            raise UserError(f"data.root: {told} in {root}")
        if left_out:
            told = f"{len(left_out)} members are left out, the first is {left_out[0]}"
            why = "a dot before its suffix makes it another kind of content than an image"
            warnings.warn(f"data.root: {told}: {why}", stacklevel=2)
        self.names = Names(names)
        self.rows = np.array(rows, np.int64)  # [N, 3] shard, offset and size in bytes
        self._open: Handles[io.FileIO] = Handles(MAX_OPEN)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Shard and member, such as ``train-000001.tar: n01440764/10026.jpg``."""
        return f"{self.shards[self.rows[index, 0]].name}: {shown(self.names[index])}"

    def read(self, index: int) -> bytes:
        """The member's content; raises BrokenImage."""
        shard, offset, size = self.rows[index].tolist()
        if size > MAX_FILE_BYTES:
            raise BrokenImage(f"a member of {size} bytes, more than {MAX_FILE_BYTES}")
        try:
            file = self._open.get(shard, lambda: io.FileIO(self.shards[shard]))
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error
        if len(data) < size:
            raise BrokenImage("the shard is shorter than it was at the start")
        return data

    def digest(self) -> Digest:
        """Of the members' names and sizes in the headers."""
        return Digest(len(self), self.names.digest(), lambda: self.rows[:, 2])


def scan_shard(path: Path) -> tuple[list[tuple[bytes, int, int]], list[bytes]]:
    """The images in a shard by name, offset and size in bytes, from the headers alone; and the names of other
    members.

    The other members belong to samples without an image and have an image's suffix after another dot.

    Raises:
        UserError: as :class:`TarSource`.
    """
    if path.suffix.lower() != ".tar":
        raise UserError(f"data.root: {path} is compressed; unpack it to .tar, for random access")
    images: dict[str, tuple[int, bytes, int, int]] = {}  # by key: rank of its kind, name, offset, size
    dotted: list[tuple[str, bytes]] = []  # key, name
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                named = MEMBER.fullmatch(member.name)
                name = member.name.encode("utf-8", "surrogateescape")
                if not (member.isreg() and named and is_image(name)):
                    continue
                key, kind = named[1], named[2].lower()
                if kind not in KINDS:
                    dotted.append((key, name))
                elif key not in images or KINDS.index(kind) < images[key][0]:
                    images[key] = (KINDS.index(kind), name, member.offset_data, member.size)
            end = archive.offset
            assert archive.fileobj is not None
            archive.fileobj.seek(end)
            # no header, and tarfile ends there without a word
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UserError(f"data.root: the shard {path} is damaged at byte {end}")
    except tarfile.ReadError as error:
        where = f" at byte {archive.offset}" if "archive" in locals() else ""
        raise UserError(f"data.root: the shard {path} is cut off or no tar file{where}: {error}") from error
    except OSError as error:
        raise UserError(f"data.root: cannot read the shard {path}: {error.strerror}") from error
    found = [(name, offset, size) for _, name, offset, size in images.values()]
    return found, [name for key, name in dotted if key not in images]
