"""The account of images that could not be read: their number and names; too many of them end a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "broken_images.txt"


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
            (folder / FILE_NAME).write_text(lines, encoding="utf-8", errors="backslashreplace")

    def state(self) -> dict[str, Any]:
        """Plain values, for other ranks and the checkpoint: ``BrokenFiles(**state)`` is the same account."""
        return {"n_read": self.n_read, "n_failed": self.n_failed, "files": sorted(self.files)}
