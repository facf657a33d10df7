"""A run folder as the report reads it: result.json, metrics.jsonl, probes.jsonl, figures/ and captions.json."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import read_json, write_json
from pretrain.results.rows import backbone_label
from pretrain.results.schema import FILE_NAME, Result, read_result

POINTS = "points"  # in a sweep's folder, the folder of its runs
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
    """All that a run left; without metrics.jsonl and probes.jsonl its log is empty."""

    result: Result
    log: Log
    figures: list[Figure]


def find_results(paths: Iterable[str | Path]) -> list[Path]:
    """The result files under the paths: a `result.json`, its folder, or any folder above; each file once.

    The result of a sweep stands for its runs: those are left out, unless a path leads straight to them.

    Raises UserError naming the path under which there is none.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(path.rglob(FILE_NAME)) if path.is_dir() else [path]
        files = [file for file in files if not _is_swept(file, path)]
        if not files:
            raise UserError(f"{path}: no {FILE_NAME} in this folder or below")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_swept(file: Path, above: Path) -> bool:
    """Whether the file belongs to a sweep whose result lies between it and the folder `above`."""
    folders = [folder for folder in file.parents if folder != above and above in folder.parents]
    return any(folder.name == POINTS and (folder.parent / FILE_NAME).is_file() for folder in folders)


def read_run(result_file: Path) -> Run:
    """The run whose `result.json` is given. Raises UserError for malformed files (see the readers below)."""
    folder, log = result_file.parent, Log()
    for file in (folder / "metrics.jsonl", folder / "probes.jsonl"):
        for iteration, terms in (read_log(file) if file.exists() else {}).items():
            log.setdefault(iteration, {}).update(terms)
    return Run(read_result(result_file), dict(sorted(log.items())), read_figures(folder / "figures"))


def read_log(path: Path) -> Log:
    """A metrics.jsonl or probes.jsonl: one object a line, with "iteration" and numbers.

    Of lines of the same iteration (a resumed run repeats some) the last one counts; what is not a finite
    number is no term and is left out. A last line that was cut off, by a kill, is skipped with a warning; any
    other malformed line is a UserError that names the file and the line.
    """
    log: Log = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")  # not splitlines(): the last item is "" exactly when the last line is complete
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                warnings.warn(f"{path}:{number}: the last line is cut off and is skipped", stacklevel=2)
                continue
            raise UserError(f"{path}:{number}: not a JSON object: {line.strip()[:60]!r}") from error
        iteration = entry.get("iteration") if isinstance(entry, dict) else None
        if type(iteration) is not int:
            raise UserError(f"{path}:{number}: no whole number 'iteration' in {line.strip()[:60]!r}")
        del entry["iteration"]
        log[iteration] = {k: float(v) for k, v in entry.items() if type(v) in (int, float) and isfinite(v)}
    return dict(sorted(log.items()))


def read_figures(folder: Path) -> list[Figure]:
    """The PNG files of a folder: first those of captions.json in its order, then the others by name.

    Raises UserError for a captions.json that is malformed or names an absent file, and for a file that is no
    PNG.
    """
    captions = _read_captions(folder / "captions.json")
    others = sorted(path.name for path in folder.glob("*.png") if path.name not in captions)
    figures = []
    for name in [*captions, *others]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / 'captions.json'}: names {name!r}, which is not in {folder}")
        png = (folder / name).read_bytes()
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise UserError(f"{folder / name}: not a PNG file")
        words = captions.get(name, {"title": Path(name).stem.replace("_", " "), "caption": ""})
        figures.append(Figure(words["title"], words["caption"], png))
    return figures


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
    entries = read_json(captions) if captions.is_file() else {}
    write_json(captions, entries | {figure.name: {"title": title, "caption": caption}})


def _read_captions(path: Path) -> dict[str, dict[str, str]]:
    captions = read_json(path) if path.exists() else {}
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
