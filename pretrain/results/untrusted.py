"""Files of result folders that anybody may have made: plain files of that folder, and JSON, bounded in all that a
page must hold."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, SupportsFloat

from pretrain.errors import UserError

MAX_JSON_BYTES = 16 << 20
MAX_LOG_BYTES = 256 << 20
MAX_LINE_BYTES = 1 << 20
MAX_PNG_BYTES = 64 << 20
MAX_PNG_PIXELS = 64_000_000
MAX_VALUES = 200_000  # of a file of JSON, keys counted
MAX_DEPTH = 64  # of JSON; Python's recursion ends near 1000
LARGEST = 1e100  # of numbers, so that sums, squares and axes are finite; float32 ends at 3e38
MAX_DIGITS = 310


@contextmanager
def opened(path: Path, folder: Path, most_bytes: int) -> Iterator[BinaryIO]:
    """A plain file of a run's folder, to read.

    Raises:
        UserError: it cannot be read, is a link out of ``folder``, no plain file (a pipe would wait for good), or larger.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise UserError(f"{path}: is a link out of its run's folder; give the folder that it points to")
        if not real.is_file():
            raise UserError(f"{path}: is no plain file")
        if (size := real.stat().st_size) > most_bytes:
            raise UserError(f"{path}: has {size:,} bytes, more than the {most_bytes:,} that are read")
        with open(real, "rb") as file:
            yield file
    except UserError:
        raise
    # RuntimeError: links in a circle; ValueError: a name that no file can have
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_bytes(path: Path, folder: Path, most_bytes: int) -> bytes:
    """The content of a file; arguments and errors are those of :func:`opened`."""
    with opened(path, folder, most_bytes) as file:
        return file.read(most_bytes)


def parsed(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, in UTF-8, or is nested too deep, or holds too many values or half a surrogate pair.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode(), parse_int=_whole)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    left, n = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        if (n := n + 1) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]
        elif isinstance(item, str) and not item.isascii():
            item.encode()  # UnicodeEncodeError is a ValueError
    return value


def read_json(path: Path, folder: Path) -> Any:
    """What a small file of JSON says.

    Raises:
        UserError: as :func:`opened` and :func:`parsed`; names the file.
    """
    data = read_bytes(path, folder, MAX_JSON_BYTES)
    try:
        return parsed(data)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def is_plain(number: SupportsFloat) -> bool:
    """Whether a number is finite, and its sums and squares are; false for NaN."""
    # NumPy would cast the limits to its own type
    value = number if isinstance(number, int) else float(number)
    return -LARGEST <= value <= LARGEST


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # int() would refuse more than 4300, by a hint for programmers
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)
