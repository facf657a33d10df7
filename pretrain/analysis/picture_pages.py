"""Pages of pictures: what runs make of images beside the ground truth, with what a report needs to take them apart."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pretrain.files import replacing
from pretrain.results.runs import add_caption

GAP_PX, HEADER_PX = 12, 24  # between pictures; of the line of text above each
Color = tuple[int, int, int]


class Cell(NamedTuple):
    """One picture, uint8 [H, W, 3]: the image's name, and what it shows ("ground truth", "prediction", ...)."""

    row: str
    column: str
    pixels: np.ndarray


def save_page(
    path: Path, cells: Sequence[Cell], n_columns: int, *, title: str, caption: str,
    legend: Sequence[tuple[str, Color]] = (), more: str = "",
) -> Path:  # fmt: skip
    """Write the pictures as a PNG, in rows of ``n_columns`` with a line of text above each, and enter it with the places
    of its pictures into ``captions.json`` beside it.

    Args:
        legend: (name, color) of what the pictures are colored by, below them.
        more: a line at the end of the legend.
    """
    rows = [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]
    side = max(cell.pixels.shape[1] for cell in cells)
    width = min(n_columns, len(cells)) * (side + GAP_PX) + GAP_PX
    heights = [HEADER_PX + max(cell.pixels.shape[0] for cell in row) + GAP_PX for row in rows]
    lines = _lines([name for name, _ in legend], width)
    below = HEADER_PX * (len(lines) + bool(more))
    page = Image.new("RGB", (width, sum(heights) + GAP_PX + below), "white")
    pen, y, places = ImageDraw.Draw(page), GAP_PX, list[dict[str, Any]]()
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            x, (h, w) = GAP_PX + column * (side + GAP_PX), cell.pixels.shape[:2]
            pen.text((x, y), _shortened(f"{cell.row}: {cell.column}", side), fill="black", font=font(14))
            page.paste(Image.fromarray(cell.pixels), (x, y + HEADER_PX))
            box = [x, y + HEADER_PX, x + w, y + HEADER_PX + h]
            places.append({"row": cell.row, "column": cell.column, "box": box})
        y += height
    for line in lines:
        for i, x in line:
            pen.rectangle((x, y + 3, x + 14, y + 17), fill=legend[i][1], outline="gray")
            pen.text((x + 20, y), legend[i][0], fill="black", font=font(14))
        y += HEADER_PX
    pen.text((GAP_PX, y), more, fill="black", font=font(14))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        page.save(partial, "PNG")
    colors = [[name, "#{:02x}{:02x}{:02x}".format(*color)] for name, color in legend]
    add_caption(path, title, caption, cells=places, legend=colors)
    return path


def _lines(names: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """Lines of a legend of this width: (index of the entry, its x)."""
    lines, x = list[list[tuple[int, int]]](), width
    for i, name in enumerate(names):
        needed = 40 + round(font(14).getlength(name))
        if x + needed > width:
            lines.append([])
            x = GAP_PX
        lines[-1].append((i, x))
        x += needed
    return lines


def _shortened(text: str, width: int) -> str:
    """A long name loses its beginning."""
    while len(text) > 4 and font(14).getlength(text) > width:
        text = "…" + text[2:]
    return text


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own font: every machine has it, and it knows more than Latin letters."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
