"""The directories of a run's checkpoints: written aside, renamed when complete, verified, pruned.

``it_N.tmp`` is incomplete: it is being written, or the run was killed while writing. ``it_N`` is complete.
``it_N.old`` is complete, too: a second ``it_N`` is about to replace it. The rename makes a checkpoint valid.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.errors import Unwritable, UserError
from pretrain.files import read_mapping, sync

FORMAT = 1
META, MANIFEST = "meta.json", "manifest.json"
WHOLE = re.compile(r"it_(\d{8,})(\.old)?")
UNFINISHED = re.compile(r"it_\d{8,}(\.old)?(\.gone)?\.tmp")
Record = dict[str, Any]  # {"size": bytes, "sha256": hex}


def directory(folder: Path, iteration: int) -> Path:
    """The directory of the checkpoint after ``iteration`` steps of the run in ``folder``."""
    return folder / "checkpoints" / f"it_{iteration:08}"


def unfinished(folder: Path, iteration: int) -> Path:
    """Where that checkpoint is written before the rename."""
    return folder / "checkpoints" / f"it_{iteration:08}.tmp"


def whole_directories(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, newest first; their contents are not read."""
    found = []
    for path in (folder / "checkpoints").glob("it_*"):
        if (match := WHOLE.fullmatch(path.name)) and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def clean(folder: Path) -> None:
    """Remove what killed processes left unfinished. The main process calls this before it writes."""
    for path in (folder / "checkpoints").glob("it_*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def begin(folder: Path, iteration: int) -> Path:
    """Create an empty ``it_N.tmp`` to write into."""
    parent = folder / "checkpoints"
    if not parent.is_dir():
        parent.mkdir(parents=True)
        sync(folder)
    part = unfinished(folder, iteration)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    return part


def publish(
    folder: Path, iteration: int, meta: Mapping[str, Any], records: Mapping[str, Record], keep: int | None
) -> Path:
    """Make ``it_N.tmp`` the run's newest checkpoint; ``records`` lists its files, which are on disk.

    Removes all but the ``keep`` newest, and those of later iterations, which remain if a run went back.
    ``keep=None`` removes nothing.
    """
    final = directory(folder, iteration)
    part, old = unfinished(folder, iteration), final.with_name(f"{final.name}.old")
    files = {**records, META: write_json(part / META, {**meta, "iteration": iteration})}
    write_json(part / MANIFEST, {"format": FORMAT, "files": files})
    sync(part)
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(part, final)
    sync(final.parent)
    _remove(old)
    if keep is not None:
        whole = whole_directories(folder)
        at = whole.index(final)
        for path in whole[:at] + whole[at + keep :]:
            _remove(path)
    return final


@contextmanager
def failing_whole(folder: Path, iteration: int) -> Iterator[None]:
    """Around the writing of a checkpoint: an :class:`Unwritable` names it, and its unfinished part goes."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(unfinished(folder, iteration), ignore_errors=True)
        raise Unwritable(f"checkpoint {directory(folder, iteration)}", error) from error


def write_json(path: Path, values: Any) -> Record:
    """Write JSON values and flush them to disk; returns the file's record."""
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    sync(path)
    return record_of(path)


def record_of(path: Path) -> Record:
    """Size and checksum of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def verify(path: Path) -> dict[str, Record]:
    """Compare every file of a checkpoint with its manifest; returns the records.

    Raises:
        UserError: names the file that is missing, damaged or unknown.
    """
    if path.suffix == ".tmp":
        raise UserError(f"checkpoint: {path} was never finished")
    manifest = read_mapping(path / MANIFEST, "checkpoint")
    records = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(records, dict) or META not in records:
        raise UserError(f"checkpoint: {path / MANIFEST} is no manifest of format {FORMAT}")
    for name, record in records.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"checkpoint: {file} is missing")
        if not isinstance(record, dict) or file.stat().st_size != record.get("size"):
            raise UserError(f"checkpoint: {file} has {file.stat().st_size} bytes, not what {MANIFEST} says")
        try:
            same = record_of(file) == record
        except OSError as error:
            raise UserError(f"checkpoint: {file} cannot be read ({error.strerror})") from error
        if not same:
            raise UserError(f"checkpoint: {file} is damaged (SHA-256)")
    return records


def _remove(path: Path) -> None:
    """Remove a checkpoint. Rename it first: a directory under its name counts as whole."""
    if path.exists():
        gone = path.with_name(f"{path.name}.gone.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
