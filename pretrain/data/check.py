"""What the checks of labeled sets share: something odd, the report with its lines and page, images in two splits."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.files import write_text
from pretrain.results.pages import from_template

NAMED = 5
MOST_NAMES = 1000  # of one kind on the page
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Odd:
    """Something odd: what, in which split, how often, and the first names."""

    what: str
    split: str
    names: Sequence[str]

    def __str__(self) -> str:
        rest = f", and {len(self.names) - NAMED} more" if len(self.names) > NAMED else ""
        return f"{self.split}: {len(self.names)} {self.what}: {', '.join(self.names[:NAMED])}{rest}"


@dataclass(frozen=True)
class Report:
    """What a check finds.

    Attributes:
        command: that would train on the set.
        splits: as the check has them.
        first: a line on the format and the splits.
        heads, rows: of a table of what there is.
        sizes: a line on the sizes of images.
        odd: everything odd, in the order of the files.
        refused: why a training would not begin; empty if it would.
        notes: what a training says of the data, and how to begin it.
    """

    root: Path
    command: str
    splits: list[Any]
    first: str
    heads: list[str]
    rows: list[list[Any]]
    sizes: str
    odd: list[Odd]
    refused: str
    notes: list[str]


def lines_of(report: Report) -> list[str]:
    """The report for a terminal."""
    table = [list(map(str, row)) for row in [report.heads, *report.rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(report.heads))]
    lines = [report.first]
    for first, *others in table:
        numbers = (text.rjust(width) for text, width in zip(others, widths[1:]))
        lines.append(f"  {first.ljust(widths[0])}  {'  '.join(numbers)}".rstrip())
    lines += [report.sizes, *map(str, report.odd), *report.notes]
    return [*lines, *([] if report.refused else [f"usable: {report.command} would train on it"])]


def write_page(report: Report, folder: Path, figures: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``index.html``; returns its path.

    Args:
        figures: drawn samples, each with ``title``, ``caption`` and ``png``.
    """
    kinds = [(each.what, each.split, len(each.names), list(each.names[:MOST_NAMES])) for each in report.odd]
    title = f"Data: {report.root.resolve().name}"
    values = dict(title=title, report=report, odd=kinds, named=NAMED, figures=figures)
    return write_text(folder / "index.html", from_template("data.html", **values))


def common(sizes: Iterable[Size]) -> str:
    """The most common sizes of images, in words."""
    counted = Counter(sizes)
    told = ", ".join(f"{w} x {h} ({n})" for (w, h), n in counted.most_common(3))
    return told + (f" and {len(counted) - 3} other sizes" if len(counted) > 3 else "")


def in_two_splits(splits: Mapping[str, Mapping[str, Path]]) -> Iterable[Odd]:
    """Images in two splits, by the name, and by the content: of files of equal size alone.

    Args:
        splits: {split: {name of an image: file}}.
    """
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both, same = f"{one} and {other}", sorted(splits[one].keys() & splits[other].keys())
            yield Odd("images in two splits, by name", both, same)
            yield Odd("images in two splits, by content", both, _same_content(splits[one], splits[other]))


def _same_content(one: Mapping[str, Path], other: Mapping[str, Path]) -> list[str]:
    first, second = _by_bytes(one.values()), _by_bytes(other.values())
    same = list[str]()
    for n in sorted(first.keys() & second.keys()):
        twins = {_hash(path): path for path in second[n]}
        pairs = ((path, twins.get(_hash(path))) for path in first[n])
        same += [f"{path.name} = {twin.name}" for path, twin in pairs if twin]
    return same


def _by_bytes(files: Iterable[Path]) -> dict[int, list[Path]]:
    found = defaultdict[int, list[Path]](list)
    for path in files:
        try:
            found[path.stat().st_size].append(path)
        except (OSError, ValueError):
            pass  # missing: said
    return found


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
