"""Small files of text, JSON and csv; and how any file gets its name only when it is whole."""

import codecs
import contextlib
import csv
import errno
import io
import json
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.errors import Unwritable, UserError

MAX_HEADER_BYTES = 100_000_000  # of safetensors, by its library
# A cell that a spreadsheet computes (full-width signs, too), perhaps behind apostrophes; and what may begin so
FORMULA = re.compile(r"'*[=+\-@\t\n＝＋－＠]")
PARTIAL = re.compile(r"\..+\.([1-9][0-9]{0,8})\.partial", re.DOTALL)
# How torch's writer and safetensors' say that the disk is full
THEIRS = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d|os error \d")
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
# Of names and the like; of lists of images; of JSON, the annotations of whole data sets
MAX_TEXT_BYTES, MAX_LIST_BYTES, MAX_JSON_BYTES = 2**24, 2**31, 2**33


def read_regular(path: str | os.PathLike[str], most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file that may be any of this machine.

    Raises:
        OSError: it cannot be read, or is not regular (reading a pipe would block).
        ValueError: it is larger than ``most`` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if found.st_size > most:
            raise ValueError(f"{found.st_size} bytes, more than {most}")
        return file.read()


def read_plain(path: str | os.PathLike[str], most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a text file as UTF-8 without a mark; UTF-16 is told by its mark. Errors are those of
    :func:`read_regular`, and a ValueError for damaged UTF-16; none quotes the content."""
    content = read_regular(path, most)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeError:
            raise ValueError("it begins as UTF-16 and is none; save it as UTF-8") from None
    return content.removeprefix(codecs.BOM_UTF8)


def read_lines(path: str | os.PathLike[str], most: int = MAX_TEXT_BYTES) -> list[str]:
    """The lines of a text file, stripped; those at the end that are empty are left out.

    Raises:
        OSError, ValueError: as :func:`read_plain`; it is no UTF-8, or has control characters: names the line.
    """
    lines = []
    for number, line in enumerate(read_plain(path, most).rstrip().splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"line {number} is no UTF-8; save it as UTF-8") from None
        if any(map(breaks_line, text.replace("\t", " "))):
            raise ValueError(f"line {number} has control characters; is it a text?")
        lines.append(text)
    return lines


def breaks_line(letter: str) -> bool:
    """Whether a character breaks a line, controls a terminal or cannot be written (a lone surrogate)."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


def read_mapping(path: Path, area: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        area: what the error begins with: ``weights``, ``data.root``, ...

    Raises:
        UserError: names the file that is missing, is no JSON in UTF-8, or holds no mapping.
    """
    try:
        content = json.loads(read_plain(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{area}: {path} cannot be read as JSON ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{area}: {path} holds no mapping")
    return content


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Write ``path`` in one step: readers see the old file (or folder) or the new one, never a part.

    The body writes to the path that it is given: ``partial``, or a name of this process beside ``path``. After
    an error ``path`` is as it was, and nothing else stays.

    Raises:
        Unwritable: names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write the same
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        remove(partial)  # of a process that was killed
        try:
            yield partial
            put_in_place(partial, path)
        finally:
            remove(partial)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file: what the system says becomes an error that names it, unless it names a file
    elsewhere. torch and safetensors say it in their own words."""
    try:
        yield
    except OSError as error:
        named = error.path if isinstance(error, Unwritable) else error.filename
        if isinstance(named, str | Path) and Path(named).parent != path.parent:
            raise
        raise Unwritable(path, error) from error
    except Exception as error:
        if not THEIRS.search(str(error)):
            raise
        first = error.__context__  # what the file said, before torch's writer met the consequence
        raise Unwritable(path, first if isinstance(first, OSError) else error) from error


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a finished file to disk and name it. A folder of that name is moved aside first, removed last."""
    if partial.is_file():
        sync(partial)
    old = path.with_name(f".replaced-{path.name}")
    if path.is_dir():
        remove(old)  # of a process that was killed
        os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        raise
    remove(old)


def remove_parts(folder: Path) -> list[str]:
    """Remove what killed processes left of :func:`replacing` in a folder and its figures; returns the names.

    Whoever calls holds the folder's lock. What a living process of this machine may write, by its number, stays.
    """
    removed = []
    for where in (folder, folder / "figures"):
        for path in where.glob(".*.partial") if where.is_dir() else ():
            match = PARTIAL.fullmatch(path.name)
            if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
                with contextlib.suppress(OSError):
                    remove(path)
                    removed.append(path.name)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # some network file systems cannot sync folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> Path:
    """Write a file as UTF-8 in one step, with the folders that are missing; returns its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
    return path


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        UserError: no file, or no JSON; names it.
    """
    try:
        return json.loads(read_plain(path, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, MemoryError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    told = "no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:100]
    return getattr(error, "strerror", None) or told


def write_json(path: Path, content: Any) -> Path:
    """Readable JSON, keys in their order; returns the path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def sorted_header(file: BinaryIO) -> bytes | None:
    """The header of an opened safetensors file, its metadata sorted by key; the file stands behind its own.

    safetensors' library orders the metadata by chance, so that files of one state differ.

    Returns:
        8 bytes of length and the JSON; None of another file, and of one whose metadata is sorted already.
    """
    n_bytes = int.from_bytes(file.read(8), "little")
    if not 2 <= n_bytes <= MAX_HEADER_BYTES:
        return None
    try:
        header = json.loads(file.read(n_bytes))
        told = header["__metadata__"]
        if list(told) == sorted(told):
            return None
        header["__metadata__"] = dict(sorted(told.items()))  # it keeps its place, the first
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, data: bytes) -> None:
    """Write what ``safetensors.torch.save`` gives, so that files of one state are equal to the byte."""
    source = io.BytesIO(data)
    header = sorted_header(source)
    with open(path, "wb") as file:
        file.write(header or b"")
        file.write(memoryview(data)[source.tell() if header else 0 :])


def csv_text(records: Iterable[Mapping[str, Any]]) -> str:
    """A line of names, those of the first record, and a line a record; floats are exact. Of none: empty.

    Text that a spreadsheet would take for a formula gets an apostrophe in front, its customary sign of text;
    :func:`read_csv` takes it away.
    """
    records, file = list(records), io.StringIO()
    if records:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writerow({name: _as_text(name) for name in records[0]})
        writer.writerows({name: _as_text(cell) for name, cell in record.items()} for record in records)
    return file.getvalue()


def _as_text(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # a csv writer quotes the line's end alone
    return f"'{cell}" if FORMULA.match(cell) and not NUMBER.fullmatch(cell) else cell


def read_csv(path: Path) -> list[dict[str, str]]:
    """Its rows by the names of the columns; undoes what :func:`csv_text` puts in front of text."""

    def plain(cell: Any) -> Any:
        return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell) else cell

    with open(path, newline="", encoding="utf-8") as file:
        return [{plain(name): plain(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
