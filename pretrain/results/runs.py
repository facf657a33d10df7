"""A run folder as the report reads it: result.json, metrics.jsonl, probes.jsonl, figures/ and captions.json."""

import io
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pretrain import files
from pretrain.errors import UserError, one_line
from pretrain.results.schema import FILE_NAME, Result, read_result
from pretrain.results.untrusted import (
    MAX_LINE_BYTES,
    MAX_LOG_BYTES,
    MAX_PNG_BYTES,
    MAX_PNG_PIXELS,
    is_plain,
    opened,
    parsed,
    read_bytes,
    read_json,
)

POINTS = "points"  # in a sweep's folder, the folder of its runs
MAX_ITERATION = 10**12
MAX_FIGURES_BYTES = 512 << 20  # of a run
MAX_CELLS = 200  # of a figure
PREDICTED = "prediction"  # the column of a page of pictures that is the run's own; the others are of its data
Read = TypeVar("Read")
# {iteration: {term: value}}, sorted by iteration
Log = dict[int, dict[str, float]]


class Cell(NamedTuple):
    """A part of a figure that shows one picture: its row (the picture's name), its column ("ground truth",
    :data:`PREDICTED`, ...), and its place in pixels."""

    row: str
    column: str
    box: tuple[int, int, int, int]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Figure:
    """An image of a run: its title and caption as plain text, its PNG file as bytes.

    cells   of a page of pictures, so that those of several runs can stand side by side.
    legend  (name, color "#rrggbb") of what the pictures are colored by.
    """

    title: str
    caption: str
    png: bytes
    cells: tuple[Cell, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Run:
    """All that a run left; without metrics.jsonl and probes.jsonl its log is empty.

    left_out  a line for each file, or number of one, that cannot be shown, and why.
    folder    that holds it, of which only as much is shown as sets it apart.
    """

    result: Result
    log: Log
    figures: list[Figure]
    left_out: tuple[str, ...] = ()
    folder: Path = Path()


def find_results(paths: Iterable[str | Path]) -> list[Path]:
    """The result files under the paths: a `result.json`, its folder, or any folder above; each file once.

    The result of a sweep stands for its runs: those are left out, unless a path leads straight to them. A folder that
    cannot be read stands for a result, which cannot be read either.

    Raises UserError naming the path under which there is none.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        results = sorted(_below(path)) if path.is_dir() else [path]
        results = [file for file in results if not _is_swept(file, path)]
        if not results:
            raise UserError(f"{path}: no {FILE_NAME} in this folder or below")
        for file in results:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    """Whatever is called `result.json` there, also a link to nothing; links to folders are not followed."""
    found: list[Path] = []
    for at, folders, names in os.walk(
        folder, onerror=lambda error: found.append(Path(error.filename) / FILE_NAME)
    ):
        if FILE_NAME in folders or FILE_NAME in names:
            found.append(Path(at) / FILE_NAME)
    return found


def read_all(paths: Iterable[str | Path], read: Callable[[Path], Read]) -> tuple[list[Read], list[str]]:
    """What is read of the results under the paths, and a line for each that cannot be, with the reason.

    Raises UserError as :func:`find_results`.
    """
    found, left = [], []
    for file in find_results(paths):
        try:
            found.append(read(file))
        except UserError as error:
            left.append(one_line(error))
    return found, left


def tell_left_out(left: Sequence[str], n_shown: int) -> None:
    """Where something was left out of tables or a page: name it, and raise a UserError, for the exit code."""
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    if left:
        shown = f"{n_shown} run{'s' * (n_shown != 1)} are shown"
        raise UserError(f"{len(left)} left out, named above; {shown}. Mend or remove them, and start again")


def _is_swept(file: Path, above: Path) -> bool:
    """Whether the file belongs to a sweep whose result lies between it and the folder `above`."""
    folders = [folder for folder in file.parents if folder != above and above in folder.parents]
    return any(folder.name == POINTS and (folder.parent / FILE_NAME).is_file() for folder in folders)


def read_run(result_file: Path) -> Run:
    """The run whose `result.json` is given. Raises UserError where this cannot be read; the rest is left out then."""
    folder, log, left = result_file.parent, Log(), list[str]()
    result = read_result(result_file)
    for file in (folder / "metrics.jsonl", folder / "probes.jsonl"):
        try:
            for iteration, terms in (read_log(file, left) if os.path.lexists(file) else {}).items():
                log.setdefault(iteration, {}).update(terms)
        except UserError as error:
            left.append(str(error))
    figures = read_figures(folder / "figures", left)
    told = tuple(map(one_line, left))
    return Run(result, dict(sorted(log.items())), figures, told, Path(os.path.abspath(folder)))


def read_log(path: Path, left: list[str]) -> Log:
    """A metrics.jsonl or probes.jsonl: one object a line, with "iteration" and numbers.

    Of lines of the same iteration (a resumed run repeats some) the last one counts; a number that no axis can show is
    left out, with a line in ``left``. A last line that was cut off, by a kill, is skipped with a
    warning; any other malformed line is a UserError that names the file and the line.
    """
    log, bad = Log(), list[str]()
    with opened(path, path.parent, MAX_LOG_BYTES) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            shown = repr(line.decode(errors="replace").strip()[:60])
            try:
                entry = parsed(line.decode(errors="replace"))
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    warnings.warn(f"{path}:{number}: the last line is cut off and is skipped", stacklevel=2)
                    break
                raise UserError(f"{path}:{number}: not a JSON object: {shown}") from error
            iteration = entry.pop("iteration", None) if isinstance(entry, dict) else None
            if type(iteration) is not int or abs(iteration) > MAX_ITERATION:
                raise UserError(f"{path}:{number}: no whole number 'iteration' in {shown}")
            numbers = {key: value for key, value in entry.items() if type(value) in (int, float)}
            log[iteration] = {key: float(value) for key, value in numbers.items() if is_plain(value)}
            bad += [f"{key} in line {number}" for key in numbers if key not in log[iteration]]
    if bad:
        left.append(f"{path}: {len(bad)} numbers that no axis can show, the first: {bad[0]}")
    return dict(sorted(log.items()))


def read_figures(folder: Path, left: list[str]) -> list[Figure]:
    """The PNG files of a folder: first those of captions.json in its order, then the others by name.

    What is no picture of a bounded size, a captions.json that is malformed, and an absent file that it names are left
    out, each with a line in ``left``.
    """
    captions: dict[str, dict[str, Any]] = {}
    if not folder.resolve().is_relative_to(folder.parent.resolve()):
        left.append(f"{folder}: is a link out of its run's folder")
        return []
    try:
        captions = _read_captions(folder / "captions.json")
    except UserError as error:
        left.append(str(error))
    others = sorted(path.name for path in folder.glob("*.png") if path.name not in captions)
    figures, n_bytes = [], 0
    for name in [*captions, *others]:
        try:
            png = read_bytes(folder / name, folder.parent, MAX_PNG_BYTES)
            size = _size_of_png(png, folder / name)
        except UserError as error:
            left.append(str(error))
            continue
        if (n_bytes := n_bytes + len(png)) > MAX_FIGURES_BYTES:
            left.append(f"{folder / name}: with it the figures have more than {MAX_FIGURES_BYTES:,} bytes")
            break
        words = captions.get(name, {"title": Path(name).stem.replace("_", " "), "caption": ""})
        try:
            parts = _cells(words.get("cells", []), size), _legend(words.get("legend", []))
        except (TypeError, ValueError, KeyError):
            left.append(f"{folder / 'captions.json'}: the cells or the legend of {name!r} are malformed")
            parts = (), ()
        figures.append(Figure(words["title"], words["caption"], png, *parts))
    return figures


def _cells(entries: Any, size: tuple[int, int]) -> tuple[Cell, ...]:
    """Cells within an image of this width and height; a ValueError, TypeError or KeyError where they are none."""
    cells: list[Cell] = []
    for entry in entries:
        x0, y0, x1, y1 = box = tuple(map(operator.index, entry["box"]))
        if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] and len(cells) < MAX_CELLS):
            raise ValueError(box)
        cells.append(Cell(str(entry["row"]), str(entry["column"]), (x0, y0, x1, y1)))
    return tuple(cells)


def _legend(entries: Any) -> tuple[tuple[str, str], ...]:
    """Names and colors; a ValueError or TypeError where they are none."""
    found = tuple((str(name), str(color)) for name, color in entries)
    if any(re.fullmatch("#[0-9a-f]{6}", color) is None for _, color in found):
        raise ValueError(entries)
    return found


def _size_of_png(png: bytes, path: Path) -> tuple[int, int]:
    """Width and height. Raises UserError for a file that is no whole PNG, or whose pixels would fill the memory."""
    from PIL import Image

    try:
        # Pillow warns of large ones; ours is the limit
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PNG_PIXELS:
                raise UserError(
                    f"{path}: has {image.width} x {image.height} px, more than {MAX_PNG_PIXELS:,}"
                )
            image.load()
            return image.size
    except UserError:
        raise
    except Exception as error:  # on damaged bytes the decoder may raise anything
        raise UserError(f"{path}: not a PNG file ({error})") from error


def holds_result(
    folder: Path, changed: Mapping[str, list[Any]] | None, has_checkpoint: bool, resume: bool
) -> bool:
    """Whether a folder holds the result of this very run; false for a new folder and for a run to go on with.

    Args:
        changed: in which settings the folder's run differs from this one; none: it says nothing of its
            settings.

    Raises:
        UserError: the folder holds a run of other settings, by name, or an unfinished one and ``resume`` is
            not given.
    """
    is_over = (folder / FILE_NAME).is_file()
    if is_over and changed is None:
        raise UserError(f"output: {folder} holds the result of another kind of run; choose another folder")
    if changed:
        told = "; ".join(f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in sorted(changed)[:3])
        raise UserError(f"output: {folder} holds a run with other settings ({told}); choose another folder")
    if has_checkpoint and not is_over and not resume:
        told = "holds an unfinished run; go on with --resume, or choose another folder"
        raise UserError(f"output: {folder} {told}")
    return is_over


def add_caption(figure: Path, title: str, caption: str, **more: Any) -> None:
    """Enter a figure into the ``captions.json`` beside it; ``more``: the cells and the legend of a page of pictures."""
    captions = figure.with_name("captions.json")
    entries = files.read_json(captions) if captions.is_file() else {}
    files.write_json(captions, entries | {figure.name: {"title": title, "caption": caption, **more}})


def _read_captions(path: Path) -> dict[str, dict[str, Any]]:
    captions = read_json(path, path.parent.parent) if os.path.lexists(path) else {}
    if not isinstance(captions, dict):
        raise UserError(f"{path}: must hold an object of the form {{file: {{title, caption}}}}")
    for name, words in captions.items():
        for key in ("title", "caption"):
            if not isinstance(words, dict) or not isinstance(words.get(key), str):
                raise UserError(f"{path}: {name!r} has no text {key!r}")
        if Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not the name of a file beside it")
    return captions


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its method and its folder, with as much of the path as sets the folder apart.

    "intertwined, seed_0"; "intertwined, a/seed_0" beside "intertwined, b/seed_0"; the folder alone where it is called
    as the method.
    """
    names = []
    for run in runs:
        parts = run.folder.parts[1:] if run.folder.is_absolute() else run.folder.parts
        others = {other.folder for other in runs} - {run.folder}
        n = 1
        while n < len(parts) and any(other.parts[-n:] == parts[-n:] for other in others):
            n += 1
        folder = one_line("/".join(parts[-n:]))
        method = run.result.method
        names.append(folder if folder == method else ", ".join(filter(None, (method, folder))))
    return names
