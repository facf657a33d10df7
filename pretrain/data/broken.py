"""The account of images that could not be read: their number and names; too many of them end a run."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from pretrain.data.decode import FORMATS
from pretrain.errors import UserError
from pretrain.files import replacing, writing
from pretrain.log import log

FILE_NAME = "broken_images.txt"
SHARE = 0.1  # of the images read, from which on a run stops: ``data.broken_share``'s default
MAX_TRIES = 16  # unreadable images in a row before a run gives up
T = TypeVar("T")


class UnreadableImage(UserError):
    """An image file that cannot be read: a training takes another one in its place."""


def read_or_other(
    index: int, n: int, read: Callable[[int], T], draws: Callable[[], np.random.Generator], what: str = "data"
) -> tuple[T, list[str]]:
    """``read(index)``, or of another image in place of one that is broken, and the broken ones, with the reason.

    The others are drawn, not the next ones: broken files lie side by side.

    Args:
        n: images to draw from.
        read: raises :class:`UnreadableImage`, which names the image.
        draws: a generator that depends on the place in the run alone, so that a resumed run draws the same.
        what: begins the error.

    Raises:
        UserError: too many unreadable images in a row.
    """
    broken, random = list[str](), None
    for _ in range(MAX_TRIES):
        try:
            return read(index), broken
        except UnreadableImage as error:
            broken.append(str(error))
            random = random or draws()
            index = int(random.integers(n))
    raise UserError(f"{what}: {len(broken)} images in a row cannot be read, the first: {broken[0]}")


def may_be_cut_off(file: BinaryIO) -> bool:
    """Whether a file is a JPEG or PNG without its end, or no image: a cheap look before decoding it."""
    file.seek(0)
    head = file.read(12)
    file.seek(-min(12, file.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = file.read()
    if head.startswith(b"\xff\xd8"):
        return not tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail[4:8] != b"IEND"
    return not any(magic.match(head) for magic, _ in FORMATS)


def check_share(broken: Sequence[str], n: int, share: float = SHARE) -> None:
    """Name the broken ones of ``n`` images, before a run that will take others in their place.

    Raises:
        UserError: they are more than this share.
    """
    for line in broken[:20]:
        log(f"broken: {line}")
    told = f"{len(broken)} of {n} images cannot be read"
    if len(broken) > share * n:
        raise UserError(f"data: {told}, more than a share of {share:g}; the first: {broken[0]}")
    if broken:
        log(f"{told}; training takes others in their place")


class BrokenFiles:
    """The number of reads, of failed reads, and the broken images, each once.

    An image is the line that the loader gives for it: its name and the reason. Every rank keeps its own
    account since the last report. The ranks exchange these as plain ``state()`` and add them to the account
    of the run, which is the same on every rank and goes into the checkpoint as ``state()``.
    """

    def __init__(self, n_read: int = 0, n_failed: int = 0, files: Iterable[str] = ()) -> None:
        self.n_read, self.n_failed, self.files = n_read, n_failed, set(files)

    def record(self, n_read: int, failed: Iterable[str]) -> None:
        """Count images that were read, and the reads that failed before them (each time)."""
        failed = list(failed)
        self.add([{"n_read": n_read, "n_failed": len(failed), "files": failed}])

    def add(self, states: Iterable[Mapping[str, Any]]) -> list[str]:
        """Add the accounts of all ranks; returns the new images, sorted."""
        before = set(self.files)
        for state in states:
            self.n_read += state["n_read"]
            self.n_failed += state["n_failed"]
            self.files.update(state["files"])
        return sorted(self.files - before)

    def share(self) -> float:
        """Share of failed reads among all; 0 before the first."""
        return self.n_failed / max(1, self.n_read + self.n_failed)

    def over(self, share: float, at_least: int = 1000) -> bool:
        """Whether more than this share of the reads failed, of ``at_least`` reads or more."""
        return self.n_read + self.n_failed >= at_least and self.share() > share

    def told(self, most: int = 20) -> list[str]:
        """Lines for the end of a run: the counts, and the first images by name; none if all could be read."""
        n, n_reads = len(self.files), self.n_read + self.n_failed
        counts = f"{n} broken images; {self.n_failed} of {n_reads} reads failed ({self.share():.2%})"
        more = [f"  and {n - most} more: see {FILE_NAME}"] if n > most else []
        return [counts, *(f"  {name}" for name in sorted(self.files)[:most]), *more] if n else []

    def write(self, folder: Path) -> None:
        """Write all broken images to ``folder/broken_images.txt``, one a line, sorted; none: no file."""
        if self.files:
            lines = "".join(f"{name}\n" for name in sorted(self.files))
            with replacing(folder / FILE_NAME) as partial:
                partial.write_text(lines, encoding="utf-8", errors="backslashreplace")

    def state(self) -> dict[str, Any]:
        """Plain values, for other ranks and the checkpoint: ``BrokenFiles(**state)`` is the same account."""
        return {"n_read": self.n_read, "n_failed": self.n_failed, "files": sorted(self.files)}


class Skipped:
    """The images that a fine-tuning skips on this rank: each is named once, and written to
    ``broken_images.txt`` of the run's folder.

    Args:
        folder: of the run; None: they are only named.
    """

    def __init__(self, folder: Path | None, share: float = SHARE) -> None:
        self.file, self.share, self.account = folder and folder / FILE_NAME, share, BrokenFiles()

    def record(self, n_read: int, broken: Sequence[str]) -> None:
        """Count reads, and the failed ones before them.

        Raises:
            UserError: more than the share failed.
        """
        before = set(self.account.files)
        self.account.record(n_read, broken)
        for name in sorted(self.account.files - before):
            log(f"broken, another image takes its place: {name}")
            if self.file and name not in self._written():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                line = f"{name}\n".encode(errors="backslashreplace")
                with writing(self.file), open(self.file, "ab") as file:
                    file.write(line)
        if self.account.over(self.share):
            counts = self.account.told(0)[0]
            raise UserError(f"data: {counts}, more than a share of {self.share:g}; {self.file} lists them")

    def _written(self) -> list[str]:
        if not self.file or not self.file.is_file():
            return []
        return self.file.read_text(encoding="utf-8").splitlines()
