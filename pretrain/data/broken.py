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
        self.n_read += n_read
        self.n_failed += len(failed)
        self.files.update(failed)

    def add(self, states: Iterable[Mapping[str, Any]]) -> list[str]:
        """Add the accounts of all ranks; returns the new images, sorted."""
        states = list(states)
        new = sorted({name for state in states for name in state["files"]} - self.files)
        self.n_read += sum(state["n_read"] for state in states)
        self.n_failed += sum(state["n_failed"] for state in states)
        self.files.update(new)
        return new

    def share(self) -> float:
        """Share of failed reads among all; 0 before the first."""
        return self.n_failed / max(1, self.n_read + self.n_failed)

    def over(self, share: float, at_least: int = 1000) -> bool:
        """Whether more than this share of the reads failed, of ``at_least`` reads or more."""
        return self.n_read + self.n_failed >= at_least and self.share() > share

    def told(self, most: int = 20) -> list[str]:
        """Lines for the end of a run: the counts, and the first images by name; empty if all could be
        read."""
        if not self.files:
            return []
        counts = (
            f"{len(self.files)} broken images; {self.n_failed} of {self.n_read + self.n_failed} reads failed"
        )
        lines = [f"{counts} ({self.share():.2%})", *(f"  {name}" for name in sorted(self.files)[:most])]
        more = len(self.files) - most
        return [*lines, f"  and {more} more: see {FILE_NAME}"] if more > 0 else lines

    def write(self, folder: Path) -> None:
        """Write all broken images to ``folder/broken_images.txt``, one a line, sorted; no file without
        any."""
        if self.files:
            lines = "".join(f"{name}\n" for name in sorted(self.files))
            (folder / FILE_NAME).write_text(lines, encoding="utf-8", errors="backslashreplace")

    def state(self) -> dict[str, Any]:
        """Plain values, for the other ranks and the checkpoint: ``BrokenFiles(**state)`` is the same
        account."""
        return {"n_read": self.n_read, "n_failed": self.n_failed, "files": sorted(self.files)}
