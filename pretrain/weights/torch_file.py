"""PyTorch's files, read without running anything in them: the zip of ``torch.save`` (mapped, not read), and what came before it."""

import argparse
import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from pretrain.errors import UserError
from pretrain.weights.limits import MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote first, before version 1.6
RECORD_HEADER_BYTES = 30  # at the least
LEGACY_PICKLES = 5  # number, version, machine, content, keys of the storages

# What a checkpoint of plain tensors is made of. torch's own list for weights_only is longer: a bytearray of any size,
# sparse and quantised tensors. Namespace and numpy's scalars are in public full checkpoints (arguments, losses).
ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|(__builtin__|builtins) set"
    r"|_codecs encode|numpy dtype|numpy\._?core\.multiarray scalar"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter|torch (Size|device)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch (float|int)(16|32|64)|torch bfloat16"
)
SCALARS: list[Any] = [numpy.dtype, *{type(numpy.dtype(kind)) for kind in "fdeilqILQbBhH?"}]
# Codecs from bytes to bytes: encoding again and again would double a few bytes without end.
BYTE_CODECS = {"hex", "base64", "base_64", "bz2", "quopri", "quoted_printable", "quotedprintable", "uu", "zip", "zlib"}


def read_torch_file(path: Path) -> Any:
    """The content, on the CPU; tensors of a zip are mapped and cost memory only when they are used.

    Raises:
        UserError: damaged, of no plain tensors, or larger inside than outside.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    try:
        pickles = _zip_pickles(path) if is_zip else _legacy_pickles(path)
        for stream in pickles:
            _check_pickle(path, stream)
        with _numpy_scalars():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except Exception as error:  # on damaged bytes the readers fail in any way: KeyError, IndexError, struct.error, ...
        raise UserError(f"weights: {path} is no checkpoint of plain tensors ({type(error).__name__})") from error


@contextmanager
def _numpy_scalars() -> Iterator[None]:
    scalar: Any = numpy.float64(0).__reduce__()[0]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    before = torch.serialization.get_safe_globals()
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *named, *SCALARS]):
            yield
    finally:  # leaving it, torch takes away what others had added before, too: mmengine's
        torch.serialization.add_safe_globals(before)


class _Bounded(io.FileIO):
    """A file from which no more is read at once than a directory of :data:`MAX_DIRECTORY_BYTES`: zipfile believes any size."""

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise UserError(f"weights: {self.name!s} has a directory of {size} bytes")
        return super().read(-1 if size is None else size) or b""


def _zip_pickles(path: Path) -> Iterator[io.BytesIO]:
    """The pickles of a zip in which each record is what it says: stored as it is, in a place of its own, once."""
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if len({record.filename for record in records}) != len(records):
            raise UserError(f"weights: {path} holds a record twice")
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record in records:
            if record.filename.endswith(".npy"):
                raise UserError(f"weights: {path} is a NumPy archive; torch's, safetensors' and Flax's files are read")
            if record.filename.endswith("constants.pkl"):
                raise UserError(f"weights: {path} is a TorchScript program, which is code; a state dict is wanted")
        for record, end in zip(records, ends):
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise UserError(f"weights: {path}: record {record.filename} is compressed, as torch never does")
            if record.header_offset + RECORD_HEADER_BYTES + record.file_size > end:
                raise UserError(f"weights: {path}: record {record.filename} declares more bytes than it has")
        for record in records:
            if record.filename.endswith(".pkl"):
                if record.file_size > MAX_PICKLE_BYTES:
                    raise UserError(f"weights: {path}: {record.filename} has {record.file_size} bytes, no structure of tensors")
                yield io.BytesIO(archive.read(record))


def _legacy_pickles(path: Path) -> Iterator[io.BufferedReader]:
    with open(path, "rb") as file:
        for _ in range(LEGACY_PICKLES):
            yield file  # each check reads one pickle and leaves the file behind it
            if file.tell() > MAX_PICKLE_BYTES:
                raise UserError(f"weights: {path} has {file.tell()} bytes of structure before its tensors")


def _check_pickle(path: Path, stream: Any) -> None:
    """Refuse by name what is no data, before anything is built."""
    encodes, codecs = False, set()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            if argument is None or not ALLOWED.fullmatch(argument):
                what = "code" if argument is None else argument.replace(" ", ".")
                raise UserError(f"weights: {path} is no checkpoint of plain tensors: it holds {what[:80]!r}")
            encodes |= argument == "_codecs encode"
        elif isinstance(argument, str) and len(argument) < 32:
            codecs.add(re.sub(r"\W+", "_", argument.lower()).removesuffix("_codec"))
    if encodes and codecs & BYTE_CODECS:
        raise UserError(f"weights: {path} encodes bytes as {', '.join(sorted(codecs & BYTE_CODECS))}, as no checkpoint does")
