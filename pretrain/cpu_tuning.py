"""Memory reuse that makes a step on the CPU faster and changes no number.

The system takes longer to hand out and clear a hundred fresh megabytes than the CPU takes to fill them.
On every other device these functions are the plain operations: CUDA's allocator keeps memory by itself.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

_TABLES: dict[tuple[str, torch.dtype], Tensor] = {}


def keep_freed_memory() -> bool:
    """With glibc: keep freed memory in the process instead of returning it to the system (a tenth of a step).

    Returns:
        whether it could be set.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def product(a: Tensor, b: Tensor, table: str) -> Tensor:
    """a @ b.T of [m, d] and [n, d]: [m, n], valid until the next call with the same ``table``."""
    return torch.mm(a, b.T, out=_table(table, len(a), len(b), a))


def softmax(x: Tensor, table: str) -> Tensor:
    """Softmax of each row of ``x`` [m, n], valid until the next call with the same ``table``."""
    return torch.softmax(x, dim=-1, out=_table(table, len(x), x.shape[1], x))


def softmax_(x: Tensor) -> Tensor:
    """Softmax over the last dimension of ``x``, which may be overwritten."""
    in_place = x if x.device.type == "cpu" else None  # safe there: the CPU goes row by row
    return torch.softmax(x, dim=-1, out=in_place)


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Tensors times a scalar, in place; nothing to do for 1 (only the CPU looks: a GPU would wait)."""
    if factor.device.type != "cpu" or factor != 1:
        for x in tensors:
            x.mul_(factor)


def _table(name: str, n_rows: int, width: int, like: Tensor) -> Tensor:
    """Uninitialized [n_rows, width]; on the CPU, one memory for all calls of that name. Not thread-safe."""
    assert not torch.is_grad_enabled(), "tables are overwritten: autograd must not keep them"
    if like.device.type != "cpu":
        return like.new_empty(n_rows, width)
    key = name, like.dtype
    if key not in _TABLES or _TABLES[key].numel() < n_rows * width:
        _TABLES.pop(key, None)
        _TABLES[key] = like.new_empty(n_rows * width)
    return _TABLES[key][: n_rows * width].view(n_rows, width)
