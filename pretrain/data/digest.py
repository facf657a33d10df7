"""What tells one data set from another without reading its images: their number, their names and their sizes.

A digest is a mapping of plain values: ``images`` (their number), and 12 hex digits of the SHA-256 of the
``names`` in the data's order, of the ``sizes`` in bytes and, with COCO, of the ``annotations`` file. Names are
relative to the data's folder, so a folder that was moved or is mounted elsewhere holds the same data. Compared
is what two digests have in common: older runs hold less.

Names cost nothing once they are listed (200,000: 10 ms). Sizes of whole files cost a look at each: of 200,000
on a local disk 0.7 to 1 s, 2 to 3 s when nothing of it is cached; on a network disk that answers in 0.5 ms,
600 s for a million one after the other and 30 to 40 s in threads. So :class:`FileSizes` looks in threads, in a
new run after its first step: before it, they took their time from the first batch. The first checkpoint waits
for them, and so does a resume.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import UserError
from pretrain.files import read_mapping, write_json
from pretrain.log import log

FILE_NAME = "data.json"  # in the folder of a fine-tuning
N_THREADS, CHUNK_BYTES = 32, 2**20
WHOLE = "images"  # the key of the number
Values = Mapping[str, Any]  # a digest


def hash_of(*parts: bytes | NDArray[Any]) -> str:
    """12 hex digits of the SHA-256 of bytes or arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()[:12]


def hash_of_names(names: Iterable[str]) -> str:
    """:func:`hash_of` texts in their order."""
    return hash_of("\0".join(names).encode("utf-8", "surrogateescape"))


def hash_of_file(path: Path) -> str:
    """:func:`hash_of` a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()[:12]


class FileSizes:
    """Sizes of files in bytes, looked up by threads; -1 for a file that is not there.

    Args:
        path: of the file with an index from 0 to n - 1.
    """

    def __init__(self, path: Callable[[int], bytes | str | Path], n: int) -> None:
        self.path, self.found = path, np.full(n, -1, np.int64)
        self.threads: list[Thread] = []

    def begin(self) -> None:
        """Let the threads look, if they do not yet."""
        n = len(self.found)
        every = 0 if self.threads else min(N_THREADS, n)
        for k in range(every):
            # daemons: a command that ends in an error does not wait for a slow disk
            self.threads.append(Thread(target=self._look, args=(range(k, n, every),), daemon=True))
            self.threads[-1].start()

    def _look(self, part: range) -> None:
        for index in part:
            try:
                self.found[index] = os.stat(self.path(index)).st_size
            except (OSError, ValueError):  # ValueError: a NUL in a name of a list
                pass

    def wait(self) -> NDArray[np.int64]:
        """All of them, [n]."""
        self.begin()
        for thread in self.threads:
            thread.join()
        return self.found


@dataclass(frozen=True)
class Digest:
    """A digest under way: ``sizes`` gives the sizes in bytes, [n], for which ``begin`` begins to look."""

    n_images: int
    names: str
    sizes: Callable[[], NDArray[np.int64]]
    begin: Callable[[], None] = lambda: None

    def values(self) -> dict[str, Any]:
        """The digest; waits for the sizes."""
        return {WHOLE: self.n_images, "names": self.names, "sizes": hash_of(self.sizes().astype("<i8"))}


def digest_of(*columns: Sequence[str]) -> Digest:
    """Of items of one or several files each, such as images and their masks: a column of paths for each. Names
    are relative to what is common to a column."""
    paths = [path for column in columns for path in column]
    tops = [len(os.path.dirname(os.path.commonprefix(column))) for column in columns]
    names = hash_of_names(path[top:] for column, top in zip(columns, tops) for path in column)
    return Digest(len(columns[0]), names, FileSizes(paths.__getitem__, len(paths)).wait)


def difference(before: Values, now: Values) -> str:
    """In what two digests differ, as far as both say it; empty: in nothing."""
    changed = [key for key in now if key in before and before[key] != now[key]]
    if WHOLE in changed:
        return f"{before[WHOLE]} images before, {now[WHOLE]} now"
    if "names" in changed and "sizes" in changed:  # which stand in the names' order
        changed.remove("sizes")
    told = {"names": "other names", "sizes": "other sizes of files", "annotations": "other annotations"}
    return ", ".join(told[key] for key in changed)


def differences(before: Mapping[str, Values], now: Mapping[str, Values]) -> str:
    """:func:`difference` of the parts of a set (``train``, ``val``)."""
    told = {part: difference(before.get(part, {}), values) for part, values in now.items()}
    return "; ".join(f"{part}: {what}" for part, what in told.items() if what)


def accept(what: str, told: str, area: str, data_changed: bool) -> None:
    """Let a run go on over other data than it began with, if that is wanted.

    Args:
        what: the run.
        told: the difference; empty: there is none.
        area: begins the error.

    Raises:
        UserError: it is not wanted; names the difference and the ways on.
    """
    if told and not data_changed:
        ways = "set the data back, choose another folder for the run, or go on over them with --data-changed"
        raise UserError(f"{area}: {what} was over other data ({told}); {ways}")
    if told:
        log(
            f"warning: {what} was over other data ({told}); it goes on over these (--data-changed), and says so"
        )


def deviation(changes: Iterable[str]) -> dict[str, list[Any]]:
    """A run whose data changed on the way follows no protocol: its deviation, of the changes in their order."""
    told = "; then ".join(changes)
    return {"data": ["the same to the end", told]} if told else {}


def check_run(
    folder: Path, now: Mapping[str, Values], data_changed: bool, before: Mapping[str, Values] | None = None
) -> dict[str, Any]:
    """Compare the data of a fine-tuning with those that the run in its folder began with, if there is one.

    Args:
        now: the digest of each part.
        before: where the folder holds a checkpoint or a result, what else it says of its data: an earlier version
            left no ``data.json``. None: it holds neither, so nothing is compared.

    Returns:
        what to write into ``data.json`` (:func:`leave`) when the run goes on.

    Raises:
        UserError: they differ, and that is not wanted.
    """
    file, changes = folder / FILE_NAME, list[str]()
    if before is None:
        return {"digest": now, "changes": []}
    if file.is_file():
        said = read_mapping(file, "output")
        before, changes = said.get("digest", {}), list(said.get("changes", []))
    else:
        log(
            f"{folder} is of an earlier version without a {FILE_NAME}: at most the number of images is compared"
        )
    told = differences(before, now)
    accept(f"the run in {folder}", told, "output", data_changed)
    return {"digest": now, "changes": [*changes, *[told] * bool(told)]}


def leave(folder: Path, said: Mapping[str, Any]) -> None:
    """Write what :func:`check_run` returned; only the main process calls this."""
    write_json(folder / FILE_NAME, said)


def run_deviation(folder: Path) -> dict[str, list[Any]]:
    """:func:`deviation` of the fine-tuning in a folder."""
    file = folder / FILE_NAME
    return deviation(read_mapping(file, "output").get("changes", [])) if file.is_file() else {}
