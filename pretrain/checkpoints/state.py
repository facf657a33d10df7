"""Nested Python state, such as an optimizer's ``state_dict()``, as a checkpoint without pickle.

Tensors go into ``state.safetensors``, everything else into ``meta.json``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoints.found import Found
from pretrain.checkpoints.single import save
from pretrain.checkpoints.store import META
from pretrain.errors import UserError


def save_state(folder: Path, iteration: int, state: Mapping[str, Any], keep: int | None) -> Path:
    """Write ``state`` as a checkpoint of the run in ``folder``; only the main process calls this.

    Args:
        folder: of the run.
        iteration: steps done.
        state: nested mappings (string or integer keys), lists, tuples, tensors, strings, numbers and None.
        keep: how many of the newest checkpoints stay; None: all.

    Raises:
        OSError: names the folder that cannot be written; earlier checkpoints stay whole.
    """
    tensors: dict[str, Tensor] = {}
    plain = {key: _pack(value, key, tensors) for key, value in state.items()}
    return save(folder, iteration, tensors, {"state": plain}, keep)


def load_state(found: Found) -> dict[str, Any]:
    """The state that :func:`save_state` wrote, equal in every type and bit; tensors are on the CPU.

    Raises:
        UserError: names the file that cannot be read.
    """
    tensors = found.tensors()
    try:
        return {key: _unpack(value, tensors) for key, value in found.meta["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"checkpoint: {found.path / META} describes no state ({type(error).__name__})"
        ) from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors``. What JSON lacks becomes ``{kind: content}``."""
    if isinstance(value, Tensor):
        assert name not in tensors, f"two tensors are called {name}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        assert all(isinstance(key, (str, int)) for key in value), f"{name}: keys must be strings or integers"
        return {"mapping": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    assert value is None or isinstance(value, (str, int, float)), (
        f"{name}: {type(value)} has no place in a checkpoint"
    )
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    if kind == "mapping":
        return {key: _unpack(item, tensors) for key, item in content}
    raise KeyError(kind)
