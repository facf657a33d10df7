"""A run folder as the report reads it: result.json, metrics.jsonl, probes.jsonl, figures/ and captions.json."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain import files
from pretrain.errors import UserError, one_line
from pretrain.results.rows import backbone_label
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
Read = TypeVar("Read")
# {iteration: {term: value}}, sorted by iteration
Log = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """An image of a run: its title and caption as plain text, its PNG file as bytes."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Run:
    """All that a run left; without metrics.jsonl and probes.jsonl its log is empty.

    left_out  a line for each file, or number of one, that cannot be shown, and why.
    """

    result: Result
    log: Log
    figures: list[Figure]
    left_out: tuple[str, ...] = ()


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
    return Run(result, dict(sorted(log.items())), figures, tuple(map(one_line, left)))


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
    captions: dict[str, dict[str, str]] = {}
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
            _check_png(png, folder / name)
        except UserError as error:
            left.append(str(error))
            continue
        if (n_bytes := n_bytes + len(png)) > MAX_FIGURES_BYTES:
            left.append(f"{folder / name}: with it the figures have more than {MAX_FIGURES_BYTES:,} bytes")
            break
        words = captions.get(name, {"title": Path(name).stem.replace("_", " "), "caption": ""})
        figures.append(Figure(words["title"], words["caption"], png))
    return figures


def _check_png(png: bytes, path: Path) -> None:
    """Raises UserError for a file that is no whole PNG, or whose pixels would fill the memory."""
    from PIL import Image

    try:
        # Pillow warns of large ones; ours is the limit
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PNG_PIXELS:
                raise UserError(
                    f"{path}: has {image.width} x {image.height} px, more than {MAX_PNG_PIXELS:,}"
                )
            image.load()
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


def add_caption(figure: Path, title: str, caption: str) -> None:
    """Enter a figure into the ``captions.json`` beside it."""
    captions = figure.with_name("captions.json")
    entries = files.read_json(captions) if captions.is_file() else {}
    files.write_json(captions, entries | {figure.name: {"title": title, "caption": caption}})


def _read_captions(path: Path) -> dict[str, dict[str, str]]:
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


def run_names(results: Sequence[Result]) -> list[str]:
    """A short name for each run, unique within its kind: the method, and what sets it apart from its like.

    "intertwined" alone; "intertwined, seed 0" and "intertwined, seed 1" for two runs that differ in the seed.
    """
    names = [result.method for result in results]
    own = [(r.protocol.label, f"seed {r.seed}", f"config {r.config_hash}") for r in results]
    backbones = [backbone_label(result.network) for result in results]
    for parts in (backbones, *zip(*own), [f"run {i}" for i in range(1, len(results) + 1)]):
        full = [(result.kind, name) for result, name in zip(results, names)]
        like = [{part for part, other in zip(parts, full) if other == this} for this in full]
        names = [f"{name}, {part}" if len(same) > 1 else name for name, part, same in zip(names, parts, like)]
    return names
