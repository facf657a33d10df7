"""Read Flax's checkpoints (msgpack with arrays as an extension type) without Flax or JAX.

Format: flax.serialization. An array is extension 1, a NumPy scalar 3: msgpack of (shape, name of the dtype,
row-major bytes). A native complex number is 2. An array of more than 2^30 bytes is a dictionary with the key
``__msgpack_chunked_array__``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.weights.limits import MAX_DEPTH, MAX_ITEMS

STARTS = frozenset([*range(0x81, 0x90), 0xDE, 0xDF])  # the first byte of a map that is not empty
NDARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"
SKIPPED = ("opt_state", "optimizer")  # half of a training state; never read
LONGEST = {"max_array_len": 1 << 10, "max_map_len": 1 << 16}  # msgpack allocates what a file declares
MAX_LEAF_BYTES = 2**31 - 1  # msgpack's own
DTYPES = {
    name: getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint32 uint16 bool complex64".split()
}


def read_flax_file(path: Path) -> dict[str, Any]:
    """Nested dictionaries of tensors and plain values, without those of the optimizer.

    Raises:
        UserError: the file is damaged, or an array is not what it declares.
    """
    tree, n_items = dict[str, Any](), 0

    def counted(items: list[Any]) -> list[Any]:
        nonlocal n_items
        n_items += len(items)  # an empty dictionary takes one byte in a file and 60 in memory
        if n_items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items")
        return items

    try:
        with open(path, "rb") as file:
            unpacker = msgpack.Unpacker(
                file,
                raw=False,
                strict_map_key=False,
                ext_hook=_extension,
                list_hook=counted,
                object_pairs_hook=lambda pairs: dict(counted(pairs)),
                max_buffer_size=MAX_LEAF_BYTES,
                **LONGEST,
            )
            for _ in range(unpacker.read_map_header()):
                key = str(unpacker.unpack())
                if key in SKIPPED:
                    unpacker.skip()
                else:
                    tree[key] = _whole(unpacker.unpack())
            if unpacker.tell() != path.stat().st_size:
                raise ValueError("more bytes follow")
    # on damaged bytes msgpack raises its own, ValueError, TypeError, UnicodeDecodeError, ...
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        raise UserError(f"weights: {path} is no readable Flax checkpoint ({reason})") from error
    return tree


def _extension(code: int, data: bytes) -> Any:
    if code == COMPLEX:
        return complex(*msgpack.unpackb(data, **LONGEST))
    if code not in (NDARRAY, SCALAR):
        return None
    shape, dtype, buffer = msgpack.unpackb(data, raw=True, **LONGEST)
    name = dtype.decode("ascii")
    if name not in DTYPES:
        raise ValueError(f"an array of {name[:32]}")
    is_shape = all(isinstance(n, int) and n >= 0 for n in shape)
    if not is_shape or math.prod(shape) * DTYPES[name].itemsize != len(buffer):
        raise ValueError(f"{len(buffer)} bytes for an array {tuple(shape)}")
    if not buffer:
        return torch.empty(shape, dtype=DTYPES[name])
    return torch.frombuffer(bytearray(buffer), dtype=DTYPES[name]).reshape(shape)


def _whole(item: Any, depth: int = 0) -> Any:
    """The tree with each chunked array in one piece."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if not isinstance(item, Mapping):
        return item
    if CHUNKED not in item:
        return {str(key): _whole(value, depth + 1) for key, value in item.items()}
    # Flax writes a tuple as a dictionary of its places
    shape, chunks = ([item[key][str(i)] for i in range(len(item[key]))] for key in ("shape", "chunks"))
    if not all(isinstance(chunk, Tensor) for chunk in chunks):
        raise ValueError("a chunk that is no array")
    n_items = sum(chunk.numel() for chunk in chunks)
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != n_items:
        raise ValueError(f"chunks of {n_items} numbers for an array {tuple(shape)}")
    return torch.cat(chunks).reshape(shape)
