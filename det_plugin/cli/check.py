"""Look at a detection set before you train on it: what is in it, and everything odd.

posfield data check photos/ --output check        (writes check/index.html, with samples as they are labeled)

The set may be COCO's json, Pascal VOC's xml or YOLO's txt, in most layouts (det_plugin/coco/layout.py lists them);
the format is found out. Nothing is changed. Ends with code 0 where posfield detect would begin a training on it,
with 2 where it would refuse; the last lines say why.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from det_plugin.check import NAMED, Report, Split, check, counts, sizes_in_words
from det_plugin.coco.content import UNREADABLE
from det_plugin.coco.layout import in_words
from det_plugin.figures import draw_entries
from pretrain.cli import at_least, command_parser
from pretrain.data.decode import BrokenImage, decode
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.log import say
from pretrain.results.pages import from_template

MOST_NAMES = 1000  # of one kind on the page


def lines_of(report: Report) -> list[str]:
    """The report for a terminal."""
    heads, rows = counts(report)
    table = [list(map(str, row)) for row in [heads, *rows]]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = [first_line(report)]
    for first, *others in table:
        numbers = (text.rjust(width) for text, width in zip(others, widths[1:]))
        lines.append(f"  {first.ljust(widths[0])}  {'  '.join(numbers)}".rstrip())
    lines += [sizes_in_words(report), *map(str, report.odd)]
    return [*lines, *report.notes, *([] if report.refused else ["usable: posfield detect would train on it"])]


def first_line(report: Report) -> str:
    """The format, and the splits."""
    return in_words((split.name, split.files, len(split.names)) for split in report.splits)


def pictures(report: Report, count: int) -> list[dict[str, Any]]:
    """``count`` images of all splits, evenly, and the first with an odd box of each kind; drawn."""
    having = [
        (split, id)
        for split in report.splits
        for id in dict.fromkeys(image for _, image, _, _ in split.objects)
    ]
    if not having or not count:
        return []
    chosen = [
        having[i] for i in np.unique(np.linspace(0, len(having) - 1, count).round().astype(int)).tolist()
    ]
    odd = {
        (each.split, each.names[0].partition(" (annotation")[0])
        for each in report.odd
        if "boxes" in each.what
    }
    first = [(split, id) for split, id in having if (split.name, split.names[id]) in odd]
    drawn = list[dict[str, Any]]()
    for split, id in dict.fromkeys((s.name, i) for s, i in [*first[:count], *chosen]):
        own = next(each for each in report.splits if each.name == split)
        png = picture(own, id)
        if png is not None:
            n = sum(image == id for _, image, _, _ in own.objects)
            drawn.append({"title": own.names[id], "caption": f"{split}, {n} objects", "png": png})
    return drawn


def picture(split: Split, id: int) -> bytes | None:
    """A PNG of an image with its objects; None where it cannot be read."""
    try:
        pixels = decode((split.files.images / split.names[id]).read_bytes())
    except (*UNREADABLE, BrokenImage):
        return None
    own = [(each, category, box) for each, image, category, box in split.objects if image == id]
    file = io.BytesIO()
    Image.fromarray(draw_entries(pixels, own, split.classes)).save(file, "PNG")
    return file.getvalue()


def write_page(report: Report, folder: Path, samples: int) -> Path:
    """Write ``index.html``; returns its path."""
    heads, rows = counts(report)
    kinds = [(each.what, each.split, len(each.names), list(each.names[:MOST_NAMES])) for each in report.odd]
    about = dict(
        title=f"Data: {report.root.resolve().name}",
        first=first_line(report),
        sizes=sizes_in_words(report),
        refused=report.refused,
        notes=report.notes,
    )
    found = dict(heads=heads, rows=rows, odd=kinds, named=NAMED, figures=pictures(report, samples))
    return write_text(folder / "index.html", from_template("data.html", **about, **found))


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="FOLDER", help="as --data of posfield detect")
    add("--output", type=Path, metavar="DIR", help="write a page with samples")
    add("--samples", type=int, default=24, metavar="N", help="images on the page (%(default)s)")
    add("--val-share", type=float, default=0.0, metavar="SHARE", help="as of posfield detect")
    add(
        "--crowds",
        default="ignored",
        choices=("ignored", "objects"),
        help="as of posfield detect (%(default)s)",
    )
    options = parser.parse_args(arguments)
    at_least(options, samples=0)
    report = check(options.data, options.crowds, options.val_share)
    say("\n".join(lines_of(report)))
    if options.output is not None:
        say(f"page: {write_page(report, options.output, options.samples)}")
    if report.refused:
        raise UserError(f"a training would refuse it: {report.refused}")
