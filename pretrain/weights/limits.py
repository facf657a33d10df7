"""Bounds on what a file of weights may ask for. They lie far above any honest file and keep a hostile one
cheap."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError, ensure, one_line

MAX_JSON_BYTES = 4 << 20  # config.json is some kB; an index of shards is about 100 bytes a tensor
# of safetensors: about 100 bytes a tensor; what is read of it takes ten times as much memory
MAX_HEADER_BYTES = 4 << 20
# the structure without the numbers: about 300 bytes a tensor; each byte can make an object of 60
MAX_PICKLE_BYTES = 4 << 20
# Items of a tuple in it, with those of the tuples inside; the state of Python's random numbers has 628
MAX_TUPLE = 1000
MAX_DIRECTORY_BYTES = 4 << 20  # of a zip: about 100 bytes a record, one a tensor
MAX_ITEMS = 1_000_000  # of all dictionaries and lists of a Flax file: training states have some thousands
MAX_DEPTH = 64  # of nested dictionaries: training states have about 8
# Bytes of all tensors to bytes of their file: parameters that are views of a common buffer, and that buffer
MAX_SHARING = 4
MAX_NAME = 200  # characters of a tensor's name, which errors repeat
MAX_LABEL = 255  # characters of a method's name, as of a file's, which may be it
MAX_SIDE = 1 << 20  # of a network's sizes (width, depth, heads, ...)
UNSTORED = 1 << 24  # parameters that a network may have beyond its file's: mask tokens, a grid of positions


@contextmanager
def in_one_line() -> Iterator[None]:
    """Escape the line breaks and control characters that a message repeats from a file."""
    try:
        yield
    except UserError as error:
        if (told := str(error)).isprintable():
            raise
        raise UserError(one_line(told)) from error


def check_regular(path: Path) -> int:
    """Size of a file in bytes.

    Raises:
        UserError: the file is missing, cannot be examined, is not regular, or is empty.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or str(error)
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        said = (
            f"no file {path}; docs/weights.md says where each method publishes its own"
            if absent
            else f"{path} cannot be read ({reason})"
        )
        raise UserError(f"weights: {said}") from error
    ensure(stat.S_ISREG(found.st_mode), f"weights: {path} is no regular file")
    ensure(found.st_size, f"weights: {path} is empty")
    return found.st_size


def check_tensors(path: Path, tree: Mapping[str, Any], file_bytes: int) -> None:
    """Compare every tensor of a tree with what its file can hold, whatever shape it declares.

    Raises:
        UserError: a tensor has no printable name, is sparse, quantized or larger than its storage; too many
            views share a storage.
    """
    total, seen = 0, {id(tree)}
    left: list[tuple[str, int, Any]] = [("", 0, tree)]
    while left:
        name, depth, item = left.pop()
        place = f"weights: {path}: {name}"
        if isinstance(item, Tensor):
            named = len(name) <= MAX_NAME and name.isprintable()
            ensure(named, f"weights: {path} names a tensor {name[:MAX_NAME]!r}")
            is_plain = item.layout == torch.strided and not item.is_quantized and item.device.type == "cpu"
            ensure(is_plain, f"{place} is no plain tensor ({item.layout}, {item.dtype}, {item.device})")
            n_bytes = item.numel() * item.element_size()
            last = item.storage_offset() + sum((n - 1) * step for n, step in zip(item.shape, item.stride()))
            ends = (last + 1) * item.element_size() if item.numel() else 0
            is_stored = max(n_bytes, ends) <= item.untyped_storage().nbytes()
            ensure(is_stored, f"{place} declares {tuple(item.shape)}, more than is stored for it")
            total += n_bytes
            continue
        ensure(depth <= MAX_DEPTH, f"{place} is nested more than {MAX_DEPTH} deep")
        for key, value in item.items() if isinstance(item, Mapping) else enumerate(item):
            if isinstance(value, Tensor | Mapping | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                left.append((f"{name}.{key}" if name else str(key), depth + 1, value))
    shared = total <= MAX_SHARING * file_bytes
    ensure(shared, f"weights: {path} has {file_bytes} bytes and declares tensors of {total}")
