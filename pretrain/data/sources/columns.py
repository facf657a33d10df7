"""Rows of tables, and their image column: Hugging Face's ``struct<bytes: binary, path: string>`` or plain
bytes. Needs pyarrow."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pretrain.data.decode import BrokenImage
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError


class Rows:
    """The rows of a table that is stored in parts, one after the other.

    Raises:
        UserError: there is no row; names ``root``.
    """

    def __init__(self, root: str, sizes: Sequence[int]) -> None:
        self.ends = np.cumsum(sizes, dtype=np.int64)  # rows up to and with each part
        if not sum(sizes):
            raise UserError(f"data.root: no row in {root}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """The part of a row, and its place there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part - 1] if part else 0)


def pyarrow(submodule: str) -> tuple[ModuleType, ModuleType]:
    """``pyarrow`` and one of its modules.

    Raises:
        UserError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module(f"pyarrow.{submodule}")
    except ImportError as error:
        raise UserError(
            "data.root: parquet and Hugging Face data need pyarrow: pip install pyarrow"
        ) from error


def image_column(schema: Any, wanted: str, path: Path) -> str:
    """The name of the image column in a ``pyarrow.Schema``: ``wanted``, or the only column with the type of
    images.

    Raises:
        UserError: there is no such column, no image column, or several; names data.image_column and the file.
    """
    pa, types = pyarrow("types")

    def is_bytes(kind: Any) -> bool:
        return (
            types.is_binary(kind)
            or types.is_large_binary(kind)
            or getattr(types, "is_binary_view", lambda _: False)(kind)
        )

    def is_image(kind: Any) -> bool:
        if not types.is_struct(kind):
            return is_bytes(kind)
        at = kind.get_field_index("bytes")
        return at >= 0 and is_bytes(kind.field(at).type)

    images = [field.name for field in schema if is_image(field.type)]
    if wanted and wanted not in schema.names:
        raise UserError(f"data.image_column: {path} has no column {wanted}, only {', '.join(schema.names)}")
    if wanted and wanted not in images:
        kind = schema.field(wanted).type
        raise UserError(
            f"data.image_column: {wanted} in {path} is {kind}, neither binary nor a struct with binary 'bytes'"
        )
    if wanted:
        return wanted
    if len(images) != 1:
        raise UserError(
            f"data.image_column: which of {path}'s columns? Of images: {', '.join(images) or 'none'}"
        )
    return images[0]


def image_bytes(row: Any, folder: Path) -> bytes:
    """The encoded image of a row (a ``pyarrow.Scalar``). If the row has only a path, read that file, relative
    to ``folder``.

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
