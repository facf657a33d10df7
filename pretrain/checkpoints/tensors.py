"""Tensors in safetensors files: complete (layout ``single``) or in pieces (layout ``sharded``)."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoints.store import Record, record_of
from pretrain.distributed import local
from pretrain.errors import Unwritable, UserError
from pretrain.files import read_mapping, sync

STATE, INDEX = "state.safetensors", "index.json"
# Names of the safetensors format.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: ``shape`` values starting at ``offsets``, stored under ``key`` in ``file``."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its place in the tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.shape))


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def copy_to_cpu(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """This rank's values of all tensors at this moment, contiguous and sharing no memory.

    Args:
        tensors: on any device.
        buffers: pinned memory for CUDA tensors, filled here and reused by the next call, since pinning takes
            longer than copying. None: pageable memory.
    """
    copies: dict[str, Tensor] = {}
    on_cuda = False
    for name, tensor in tensors.items():
        values = local(tensor.detach())
        is_pinned = values.is_cuda and buffers is not None
        copy = buffers.get(name) if buffers is not None else None
        if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_pinned)
        on_cuda |= values.is_cuda
        if buffers is not None and values.is_cuda:
            buffers[name] = copy
        copies[name] = copy.copy_(values, non_blocking=values.is_cuda)
    if on_cuda:
        torch.cuda.synchronize()
    return copies


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Record:
    """Write CPU tensors that share no memory and flush them to disk; returns the file's record.

    Raises:
        OSError: for example, the disk is full.
    """
    for name, tensor in tensors.items():
        assert tensor.dtype in NAMES, f"{name}: {tensor.dtype} has no place in a checkpoint"
    path.touch()
    mode = path.stat().st_mode  # safetensors makes a file that only its owner can read
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # this is how it reports a full disk
        raise Unwritable(path, error) from error
    path.chmod(mode)
    sync(path)
    return record_of(path)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which only the header is read.

    Raises:
        UserError: names a file that cannot be read, on opening and on reading.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"checkpoint: {path} cannot be read as safetensors ({error})") from error


def contents(path: Path, layout: str, records: Mapping[str, Record]) -> dict[str, Entry]:
    """Names, dtypes, shapes and locations of the tensors in the checkpoint ``path``.

    Raises:
        UserError: names the file that is not a safetensors file or not an index.
    """
    if layout == "sharded":
        return _index(path, records)
    entries = {}
    with opened(path / STATE) as file:
        for name in file.keys():
            part = file.get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in DTYPES:
                raise UserError(f"checkpoint: {path / STATE}: {name} has the unknown dtype {dtype}")
            entries[name] = Entry(DTYPES[dtype], shape, (Piece(STATE, name, (0,) * len(shape), shape),))
    return entries


def _index(path: Path, records: Mapping[str, Record]) -> dict[str, Entry]:
    """``index.json`` of a sharded checkpoint. It is not trusted: inconsistent entries are rejected."""
    n_bytes, entries = sum(record["size"] for record in records.values()), {}
    for name, values in read_mapping(path / INDEX, "checkpoint").items():
        try:
            described = [(p["file"], str(p["key"]), p["offsets"], p["shape"]) for p in values["pieces"]]
            pieces = tuple(Piece(file, key, _ints(at), _ints(shape)) for file, key, at, shape in described)
            entry = Entry(DTYPES[values["dtype"]], _ints(values["shape"]), pieces)
            inside = all(p.file in records and _lies_in(p, entry.shape) for p in pieces)
            numel, stored = math.prod(entry.shape), sum(math.prod(p.shape) for p in pieces)
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"{name} is described wrongly ({type(error).__name__})"
            raise UserError(f"checkpoint: {path / INDEX}: {wrong}") from error
        if not inside or numel != stored or numel * entry.dtype.itemsize > n_bytes:
            raise UserError(f"checkpoint: {path / INDEX}: the pieces of {name} do not make it up")
        entries[name] = entry
    return entries


def _lies_in(piece: Piece, shape: tuple[int, ...]) -> bool:
    places = zip(piece.offsets, piece.shape, shape)
    has_rank = len(piece.shape) == len(piece.offsets) == len(shape)
    return has_rank and all(0 <= start < start + size <= end for start, size, end in places)


def _ints(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def read_piece(file: Any, piece: Piece, dtype: torch.dtype, block: tuple[slice, ...] | None = None) -> Tensor:
    """Values of a piece in an opened file: all of them, or a block."""
    part = file.get_slice(piece.key)
    if (part.get_dtype(), tuple(part.get_shape())) != (NAMES[dtype], piece.shape):
        wanted = f"{NAMES[dtype]} {list(piece.shape)}"
        raise SafetensorError(f"{piece.key} is {part.get_dtype()} {part.get_shape()}, not {wanted}")
    return file.get_tensor(piece.key) if block is None else part[block]


def read_pieces(path: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Piece, Tensor]]:
    """Every stored piece of ``entries`` with its name and its values on the CPU, file by file."""
    by_file: dict[str, list[tuple[str, Piece]]] = {}
    for name, entry in entries.items():
        for piece in entry.pieces:
            by_file.setdefault(piece.file, []).append((name, piece))
    for name_of_file, items in by_file.items():
        with opened(path / name_of_file) as file:
            for name, piece in items:
                yield name, piece, read_piece(file, piece, entries[name].dtype)
