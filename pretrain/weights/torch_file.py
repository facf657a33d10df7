"""Read PyTorch's files without running anything in them: the zip of ``torch.save``, which is mapped, and the
older format."""

import argparse
import io
import pathlib
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from pretrain.errors import UserError, ensure
from pretrain.weights.limits import MAX_DIRECTORY_BYTES, MAX_NAME, MAX_PICKLE_BYTES, MAX_TUPLE

ZIP = b"PK\x03\x04"
# the number that torch.save wrote first, until version 1.5
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# ends of the names of records that tell other archives
NOT_WEIGHTS = {
    ".npy": "a NumPy archive; torch's, safetensors' and Flax's files are read",
    "constants.pkl": "a TorchScript program, which is code; a state dict is wanted",
}
RECORD_HEADER_BYTES = 30  # at the least: a name and a supplement follow, whose lengths are the last four
ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4} | dict.fromkeys(("Half", "BFloat16", "Short"), 2)
ITEM_BYTES |= dict.fromkeys(("Char", "Byte", "Bool"), 1)
LEGACY_PICKLES = 5  # number, version, machine, content, keys of the storages

# What a checkpoint of plain tensors is made of. torch's own list for weights_only is longer: a bytearray of
# any size, sparse and quantized tensors. Namespace, paths and numpy's scalars are in public full checkpoints
# (arguments, losses).
ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|(__builtin__|builtins) set|pathlib(\._local)? (Posix|Windows)Path"
    r"|_codecs encode|numpy dtype|numpy\._?core\.multiarray scalar"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter|torch (Size|device)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch ((float|int)(16|32|64)|bfloat16|u?int8|bool)"
)
DTYPES = {dtype.str[1:]: dtype for dtype in map(numpy.dtype, "fdeilqILQbBhH?")}
# pure: of any system, and no file's
PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
# Codecs from bytes to bytes: encoding again and again would double a few bytes without end.
BYTE_CODECS = frozenset("hex base64 base_64 bz2 quopri quoted_printable quotedprintable uu zip zlib".split())


def read_torch_file(path: Path) -> Any:
    """The content, on the CPU; tensors of a zip are mapped and cost memory only when they are used.

    Raises:
        UserError: the file is damaged, holds more than plain tensors, or declares more bytes than it has.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    try:
        for stream, stored in _zip_pickles(path) if is_zip else _legacy_pickles(path):
            _check_pickle(path, stream, stored)
        with _only_ours():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    # on damaged bytes the readers fail in any way: KeyError, IndexError, struct.error, ...
    except Exception as error:
        what = f"no checkpoint of plain tensors ({type(error).__name__})"
        raise UserError(f"weights: {path} is {what}") from error


@contextmanager
def _only_ours() -> Iterator[None]:
    """Set torch's list of safe globals to ours; it belongs to the process, so the entries of others
    (mmengine) come back."""
    scalar: Any = numpy.float64(0).__reduce__()[0]
    ours: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    for module in ("pathlib", "pathlib._local"):
        ours += [(pure, f"{module}.{name}") for name, pure in PATHS.items()]
    ours += [argparse.Namespace, (_dtype, "numpy.dtype"), *{type(dtype) for dtype in DTYPES.values()}]
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(ours)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _dtype(name: str, *_: Any) -> Any:
    """The dtype of a plain number; a copy, since a pickle may change it.

    Raises:
        KeyError: another dtype; a scalar of ``V1000000000`` takes a gigabyte.
    """
    return numpy.dtype(DTYPES[name], copy=True)


class _Bounded(io.FileIO):
    """A file that refuses reads of more than :data:`MAX_DIRECTORY_BYTES`: zipfile believes any size of a
    directory."""

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        is_small = size is None or size <= MAX_DIRECTORY_BYTES
        ensure(is_small, f"weights: {self.name!s} has a directory of {size} bytes")
        return super().read(-1 if size is None else size) or b""


def _zip_pickles(path: Path) -> Iterator[tuple[io.BytesIO, dict[str, int]]]:
    """The pickles of a zip, and {name: bytes} of its records. Each record has to be stored uncompressed,
    once, in a place of its own."""
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        # torch's reader: a is A
        is_once = len({record.filename.lower() for record in records}) == len(records)
        ensure(is_once, f"weights: {path} holds a record twice")
        for suffix, what in NOT_WEIGHTS.items():
            ensure(
                not any(record.filename.endswith(suffix) for record in records), f"weights: {path} is {what}"
            )
        ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
            place = f"weights: {path}: record {_shown(record.filename)}"
            is_stored = (
                record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
            )
            ensure(is_stored, f"{place} is compressed, as torch never does")
            file.seek(record.header_offset)
            lengths = file.read(RECORD_HEADER_BYTES)[-4:]
            begin = (
                file.tell() + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            )
            is_whole = begin + record.file_size <= end
            ensure(is_whole, f"{place} declares more bytes than it has")
        stored = {record.filename: record.file_size for record in records}
        for record in records:
            if record.filename.endswith(".pkl"):
                folder = record.filename.rpartition("/")[0] + "/data/"  # torch's, of this pickle
                of_it = {key.removeprefix(folder): n for key, n in stored.items() if key.startswith(folder)}
                said = f"{_shown(record.filename)} has {record.file_size} bytes, no structure of tensors"
                ensure(record.file_size <= MAX_PICKLE_BYTES, f"weights: {path}: {said}")
                yield io.BytesIO(archive.read(record)), of_it


def _shown(name: str) -> str:
    """A record's name, in one line."""
    return name if name.isprintable() and len(name) <= MAX_NAME else repr(name[:MAX_NAME])


def _legacy_pickles(path: Path) -> Iterator[tuple[io.BufferedReader, None]]:
    with open(path, "rb") as file:
        for _ in range(LEGACY_PICKLES):
            # torch compares the lengths itself; each check reads one pickle and leaves the file behind it
            yield (
                file,
                None,
            )
            said = f"{file.tell()} bytes of structure before its tensors"
            ensure(file.tell() <= MAX_PICKLE_BYTES, f"weights: {path} has {said}")


def _check_pickle(path: Path, stream: Any, stored: Mapping[str, int] | None) -> None:
    """Refuse, by name, what is not data, and a tensor of more bytes than are ``stored`` for it, before
    anything is built."""
    encodes, codecs, tuples = False, set(), _Tuples()
    other = f"weights: {path} is no checkpoint of plain tensors"
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "BINPERSID" and stored is not None:
            _check_stored(path, tuples.top, stored)
        largest = tuples.largest_after(opcode, argument)
        ensure(largest <= MAX_TUPLE, f"{other}: a tuple of more than {MAX_TUPLE} items")
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            what = (argument or "code").replace(" ", ".")[:80]
            ensure(argument and ALLOWED.fullmatch(argument), f"{other}: it holds {what!r}")
            encodes |= argument == "_codecs encode"
        elif isinstance(argument, str) and len(argument) < 32:
            codecs.add(re.sub(r"\W+", "_", argument.lower()).removesuffix("_codec"))
    found = ", ".join(sorted(codecs & BYTE_CODECS))
    ensure(not (encodes and found), f"weights: {path} encodes bytes as {found}, as no checkpoint does")


def _check_stored(path: Path, storage: Any, stored: Mapping[str, int]) -> None:
    """Compare what a pickle says of a storage with the record that holds it: torch maps as many bytes as the
    pickle says, those of the next records, too."""
    match storage:
        case ("storage", str(kind), str(key), _, int(numel)) if numel >= 0:
            item = ITEM_BYTES.get(kind.removeprefix("torch ").removesuffix("Storage"))
        case _:
            item, key, numel = None, "", 0
    ensure(item, f"weights: {path} is no checkpoint of plain tensors: it names a storage as torch never does")
    record = f"weights: {path}: record data/{_shown(key)}"
    ensure(key in stored, f"{record} is missing; copy or download the file again")
    wanted = numel * (item or 0)
    said = f"{record} has {stored.get(key)} bytes, the tensor in it {wanted}"
    ensure(wanted <= stored[key], f"{said}; copy or download the file again")


class _Tuples:
    """Follows a pickle's stack and counts the items of each tuple on it, including those of nested tuples.

    A tuple that holds the same tuple twice, and so on, takes a few bytes a level. As a key it takes 2^levels
    steps, because a tuple does not cache its hash.
    """

    MARK: tuple[int, Any] = (0, "a mark")

    def __init__(self) -> None:
        self.stack: list[tuple[int, Any]] = []  # (items, the text, number or tuple; None of anything else)
        self.memo: dict[int, tuple[int, Any]] = {}

    @property
    def top(self) -> Any:
        """The text, number or tuple at the top of the stack; None for anything else."""
        return self.stack[-1][1] if self.stack else None

    def largest_after(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Items of the top of the stack after one step; 1 if it is no tuple."""
        stack, name = self.stack, opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):  # torch knows no other ways to remember
            self.memo[argument] = stack[-1] if stack else (1, None)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo.get(argument, (1, None)))
        elif name == "MARK":
            stack.append(self.MARK)
        else:
            inside = self._popped(opcode.stack_before)
            made: tuple[int, Any] = (1, argument)
            if "TUPLE" in name:
                made = (1 + sum(n for n, _ in inside), tuple(value for _, value in inside))
            stack += [made for _ in opcode.stack_after]
        return stack[-1][0] if stack else 1

    def _popped(self, taken: list[pickletools.StackObject]) -> list[tuple[int, Any]]:
        """Pop what a step takes, down to the mark if it takes one; returns it in its order."""
        popped, n_below = [], len(taken)
        if pickletools.markobject in taken:
            while self.stack and (item := self.stack.pop()) is not self.MARK:
                popped.append(item)
            n_below = taken.index(pickletools.markobject)
        popped += [self.stack.pop() for _ in range(min(n_below, len(self.stack)))]
        return popped[::-1]
