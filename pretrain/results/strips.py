"""Pages of pictures of several runs, taken apart: what each run makes of a picture, side by side."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from pretrain.results.runs import PREDICTED, Cell, Figure, Run

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Strip:
    """Pictures of a stage, row by row.

    rows    (name of the picture, {column: PNG}): what the runs share first, then a column a run.
    legend  (name, color) of what they are colored by.
    """

    head: str
    caption: str
    rows: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    legend: dict[str, str] = field(default_factory=dict)

    @property
    def n_columns(self) -> int:
        """Of the widest row."""
        return max(len(row) for _, row in self.rows)


def strips(
    runs: Sequence[Run], names: Sequence[str], stages: Mapping[str, str]
) -> tuple[list[Strip], list[list[Figure]]]:
    """The pages of pictures of each stage side by side, and each run's other figures.

    Pictures stand in one row where they have one name and equal pixels (and, of a segmentation, equal labels): runs on
    other data have rows of their own. A stage where no page says which picture is where has no strip.

    Args:
        names: of the runs; stages: {stage: its head}.
    """
    found = []
    for stage, head in stages.items():
        strip, together = Strip(head, ""), dict[tuple[str, bytes], dict[str, bytes]]()
        for run, name in zip(runs, names):
            for figure in run.figures if run.result.stage == stage else ():
                strip.caption = strip.caption or figure.caption * bool(figure.cells)
                strip.legend |= dict(figure.legend)
                for key, cells in _rows(figure):
                    row = together.setdefault(key, {})
                    for column, pixels in cells.items():
                        row[f"{name}{column.removeprefix(PREDICTED)}" if _is_own(column) else column] = pixels
        strip.rows = [(title, row) for (title, _), row in together.items()]
        found += [strip] if strip.rows else []
    return found, [[figure for figure in run.figures if not figure.cells] for run in runs]


def _is_own(column: str) -> bool:
    return column.startswith(PREDICTED)


def _rows(figure: Figure) -> list[tuple[tuple[str, bytes], dict[str, bytes]]]:
    """By row: its name and a digest of the pixels that other runs may share, and its columns as PNG."""
    from PIL import Image

    if not figure.cells:
        return []
    page = Image.open(io.BytesIO(figure.png)).convert(
        "RGB"
    )  # whole and of a bounded size: read_figures saw to it
    together: dict[str, list[Cell]] = {}
    for cell in figure.cells:
        together.setdefault(cell.row, []).append(cell)
    found = []
    for row, cells in together.items():
        pictures = {cell.column: page.crop(cell.box) for cell in cells}
        digest = sha256()
        for column, picture in pictures.items():
            digest.update(b"" if _is_own(column) else picture.tobytes())
        found.append(((row, digest.digest()), {column: _png(p) for column, p in pictures.items()}))
    return found


def _png(picture: "Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
