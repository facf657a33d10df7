"""Small files of text, JSON and csv; written in one step, so that no reader sees half of one."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Write a file as UTF-8 in one step, with the folders that are missing; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)
    return path


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        UserError: no file, or no JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({error})") from error


def write_json(path: Path, content: Any) -> Path:
    """Readable JSON, keys in their order; returns the path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A line of names and a line a row; floats are exact."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    write_text(path, file.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Its rows by the names of the columns."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
