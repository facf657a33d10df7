"""Images in a column of tables: parquet files, or a set that Hugging Face's ``datasets`` saved.

Rows hold Hugging Face's ``struct<bytes: binary, path: string>`` or plain bytes; nothing in a folder is executed.

Arrow files are mapped into memory by ``datasets``: a row is read without its neighbors, in any order. To reach
a row of parquet, the image column of its whole row group is read; each process keeps the last two groups. In
the random order of training that is one row group for each image, which is slow if they are large (Hugging
Face writes 100 to 1,000 rows). Parquet is read by pyarrow itself, because ``datasets`` would first write a
second copy of the whole set as arrow files (and its streaming has no access by index). Whoever has room for
that copy makes it once, with ``save_to_disk``; tar shards are as fast.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.decode import BrokenImage
from pretrain.data.digest import Digest, hash_of_names
from pretrain.data.sources.files import Handles, read_file, whole_files
from pretrain.errors import UserError
from pretrain.files import read_mapping

MAX_OPEN = 16  # parquet files a process
MAX_GROUPS = 2  # row groups a process
BINARY = (pa.binary(), pa.large_binary(), pa.binary_view())


class Rows(ABC):
    """The rows of tables that are stored in parts, one after the other.

    Args:
        root: for the message that there is no row, a UserError.
        parts: file, name in messages (``train-00000-of-00002.parquet: row group 3``) and number of rows.
        sizes: of each part, in bytes.
    """

    def __init__(self, root: str, parts: Sequence[tuple[Path, str, int]], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = parts, np.array(sizes, np.int64)
        # rows up to and with each part
        self.ends = np.cumsum([n_rows for _, _, n_rows in parts], dtype=np.int64)
        if not self.ends[-1:].any():
            raise UserError(f"data.root: no row in {root}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """The part of a row, and its place there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part - 1] if part else 0)

    def name(self, index: int) -> str:
        """File and row, such as ``train/data-00000-of-00002.arrow: row 17``, counted from 0."""
        part, row = self.place(index)
        return f"{self.parts[part][1]}row {row}"

    def read(self, index: int) -> bytes:
        """The encoded image of a row; raises BrokenImage."""
        part, row = self.place(index)
        try:
            return image_bytes(self.images(part)[row], self.parts[part][0].parent)
        except (pa.ArrowException, OSError) as error:
            raise BrokenImage(f"cannot be read: {_reason(error)}") from error

    def digest(self) -> Digest:
        """Of the parts' names, numbers of rows and sizes: of parquet what the files' ends say."""
        names = hash_of_names(f"{name}{n_rows}" for _, name, n_rows in self.parts)
        return Digest(len(self), names, lambda: self.sizes)

    @abstractmethod
    def images(self, part: int) -> pa.ChunkedArray:
        """The column of the images in a part."""


class ParquetSource(Rows):
    """The rows of all files, by file name; a part is a row group.

    Args:
        root: a .parquet file, a folder of them, or a pattern such as ``train-*.parquet``.
        split: a sub-folder, or the start of the files' names.
        column: the column of the images; "": the only one of this type.

    Raises:
        UserError: a file is missing or damaged; there is no image column, or several; there is no row.
    """

    def __init__(self, root: str, split: str = "", column: str = "") -> None:
        parts: list[tuple[Path, str, int]] = []
        in_bytes: list[int] = []
        self.groups: list[int] = []  # row group of each part in its file
        for path in whole_files(root, split, ".parquet"):
            try:
                with pq.ParquetFile(path) as file:
                    self.column = column = image_column(file.schema_arrow, column, path)
                    groups = range(file.metadata.num_row_groups)
                    found = [file.metadata.row_group(group) for group in groups]
                    sizes = [group.num_rows for group in found]
                    in_bytes += [group.total_byte_size for group in found]
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"data.root: cannot read {path}: {_reason(error)}") from error
            parts += [(path, f"{path.name}: row group {k}, ", size) for k, size in enumerate(sizes)]
            self.groups += groups
        super().__init__(root, parts, in_bytes)
        self._open: Handles[Any] = Handles(MAX_OPEN)
        self._read: Handles[Any] = Handles(MAX_GROUPS)

    def images(self, part: int) -> pa.ChunkedArray:
        """The row group, read whole."""
        path = self.parts[part][0]

        def read() -> Any:
            file = self._open.get(path, lambda: pq.ParquetFile(path))
            return file.read_row_group(self.groups[part], columns=[self.column], use_threads=False)[
                self.column
            ]

        return self._read.get(part, read)


class HuggingFaceSource(Rows):
    """The rows of a saved ``Dataset``, or of one split (several joined with ``+``) of a saved
    ``DatasetDict``, in their order; a part is a file.

    Args:
        root: the folder, with state.json or dataset_dict.json.
        split: required if a DatasetDict has several.
        column: the column of the images; "": the only one of this type.

    Raises:
        UserError: the folder or split does not exist; a file is missing or damaged; a selection of rows was
            not written out; there is no image column, or several; there is no row.
        ImportError: ``datasets`` is not installed.
    """

    def __init__(self, root: str, split: str = "", column: str = "") -> None:
        from datasets import Dataset  # takes most of a second

        parts: list[tuple[Path, str, int]] = []
        self.tables: list[Any] = []  # mapped; a pickle holds the paths alone
        for path in [path for folder in _folders(Path(root), split) for path in _data_files(folder)]:
            try:
                table = Dataset.from_file(str(path)).data
            except Exception as error:  # pyarrow's, OSError; for damaged metadata, any
                raise UserError(f"data.root: cannot read {path}: {_reason(error)}") from error
            self.column = column = image_column(table.schema, column, path)
            self.tables.append(table)
            parts.append((path, f"{path.relative_to(root)}: ", table.num_rows))
        super().__init__(root, parts, [path.stat().st_size for path, _, _ in parts])

    def images(self, part: int) -> pa.ChunkedArray:
        """The file's, mapped."""
        return self.tables[part][self.column]


def image_column(schema: pa.Schema, wanted: str, path: Path) -> str:
    """The name of the image column: ``wanted``, or the only column with the type of images.

    Raises:
        UserError: there is no such column, no image column, or several; names data.image_column and the file.
    """

    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and field.type in BINARY for field in kind)
        return kind in BINARY

    images = [field.name for field in schema if is_image(field.type)]
    told = ""
    if wanted and wanted not in schema.names:
        told = f"{path} has no column {wanted}, only {', '.join(schema.names)}"
    elif wanted and wanted not in images:
        kind = schema.field(wanted).type
        told = f"{wanted} in {path} is {kind}, neither binary nor a struct with binary 'bytes'"
    elif not wanted and len(images) != 1:
        told = f"which of {path}'s columns? Of images: {', '.join(images) or 'none'}"
    if told:
        raise UserError(f"data.image_column: {told}")
    return wanted or images[0]


def image_bytes(row: pa.Scalar, folder: Path) -> bytes:
    """The encoded image of a row. If the row has only a path, read that file, relative to ``folder``.

    Raises:
        BrokenImage: the row has no image; the file cannot be read.
    """
    value = row.as_py()
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return read_file(os.fsencode(folder / value["path"]))
        value = value["bytes"]
    if value is None:
        raise BrokenImage("a row without an image")
    return bytes(value)


def _folders(root: Path, split: str) -> list[Path]:
    """The folders of the data sets: ``root``, or those of its splits."""
    if not (root / "dataset_dict.json").is_file():
        if not (root / "state.json").is_file():
            told = "holds neither state.json nor dataset_dict.json, so save_to_disk did not write it"
            raise UserError(f"data.root: {root} {told}")
        own = read_mapping(root / "state.json", "data.root").get("_split")
        if split and split != own:
            raise UserError(f"data.split={split}: {root} is the data set of one split, {own}")
        return [root]
    there = [str(name) for name in read_mapping(root / "dataset_dict.json", "data.root").get("splits", [])]
    wanted = split.split("+") if split else there
    if not set(wanted) <= set(there) or len(wanted) > 1 and not split:
        told = f"{root} has the splits {', '.join(there) or '(none)'}; several are joined with +"
        raise UserError(f"data.split={split}: {told}")
    return [root / name for name in wanted]


def _data_files(folder: Path) -> list[Path]:
    """The arrow files of a data set, in their order."""
    state = read_mapping(folder / "state.json", "data.root")
    if state.get("_indices_data_files"):
        said = "holds a selection of rows (_indices_data_files), which is not applied here"
        raise UserError(f"data.root: {folder / 'state.json'} {said}: save it again with flatten_indices()")
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (TypeError, KeyError) as error:
        raise UserError(f"data.root: {folder / 'state.json'} does not say _data_files") from error
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"data.root: no file {missing[0]}, which {folder / 'state.json'} names")
    return files


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
