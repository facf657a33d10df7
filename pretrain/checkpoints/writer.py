"""Write checkpoints: at once, or while training continues (copied at once, written in the background).

In the layout ``single`` one process writes one safetensors file. Nested Python state, such as an optimizer's
``state_dict()``, becomes such a file without pickle: tensors go into ``state.safetensors``, everything else
into ``meta.json``.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoints import store
from pretrain.checkpoints.found import Found
from pretrain.checkpoints.store import META
from pretrain.checkpoints.tensors import STATE, copy_to_cpu, write_tensors
from pretrain.errors import UserError


def save(
    folder: Path, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int | None
) -> Path:
    """Write a checkpoint of the run in ``folder``; only the main process calls this.

    Args:
        folder: of the run.
        iteration: steps done.
        tensors: on any device, by name; they may share memory.
        meta: JSON values; ``iteration`` and ``layout`` are added.
        keep: how many of the newest checkpoints stay; None: all.

    Raises:
        OSError: names the folder that cannot be written; earlier checkpoints stay whole.
    """
    return write(folder, iteration, copy_to_cpu(tensors), meta, keep)


def write(
    folder: Path, iteration: int, copies: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int | None
) -> Path:
    """:func:`save` for tensors that :func:`copy_to_cpu` made."""
    with store.failing_whole(folder, iteration):
        part = store.begin(folder, iteration)
        records = {STATE: write_tensors(part / STATE, copies)}
        return store.publish(folder, iteration, {**meta, "layout": "single"}, records, keep)


def consolidate(found: Found, folder: Path) -> Path:
    """Write a checkpoint of either layout as a ``single`` one of the run in ``folder`` (its own, or another).

    Runs in one process on the CPU, whose memory must hold the whole state. In the run's own folder it
    replaces the sharded checkpoint; it removes nothing else.
    """
    return write(folder, found.iteration, found.tensors(), found.meta, keep=None)


class Writer:
    """Writes the checkpoints of one run, at most one at a time.

    A thread of ours rather than ``dcp.async_save``: one form for both layouts and every version of torch. DCP
    runs in it on a gloo group of its own, so its collectives never mix with those of training.
    """

    def __init__(self, folder: Path, keep: int, is_sharded: bool = False, in_background: bool = True) -> None:
        """Every rank creates one. The main process removes what a killed run left half-written in ``folder``.

        Args:
            folder: of the run.
            keep: how many of the newest checkpoints stay.
            is_sharded: every rank writes its shards; otherwise the main process writes everything.
            in_background: if False, :meth:`save` returns when the checkpoint is complete.
        """
        self.folder, self.keep, self.is_sharded, self.in_background = folder, keep, is_sharded, in_background
        self.group: Any = dist.new_group(backend="gloo") if is_sharded else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.buffers: dict[str, Tensor] = {}
        if distributed.is_main():
            store.clean(folder)

    def save(self, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copy ``tensors`` now and write them; first wait for the previous checkpoint. Every rank calls this.

        Args:
            iteration: steps done.
            tensors, meta: as for :func:`save` and :func:`save_sharded`.

        Raises:
            OSError: this checkpoint (foreground) or the previous one (background) could not be written.
        """
        self.wait()
        if not self.is_sharded and not distributed.is_main():
            return
        arguments = iteration, dict(tensors), copy_to_cpu(tensors, self.buffers), dict(meta)
        # A thread that writes shards may wait for dead ranks: it must not keep this process from ending.
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=self.is_sharded)
        self.thread.start()
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            OSError: it could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(self, iteration: int, tensors: Any, copies: Mapping[str, Tensor], meta: Any) -> None:
        """Write; what fails is kept for :meth:`wait`, which raises it."""
        try:
            if self.is_sharded:
                from pretrain.checkpoints.sharded import save_sharded  # as in the package

                save_sharded(self.folder, iteration, tensors, meta, self.keep, self.group, copies)
            else:
                write(self.folder, iteration, copies, meta, self.keep)
        except BaseException as error:
            self.error = error


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
        reason = f"describes no state ({type(error).__name__})"
        raise UserError(f"checkpoint: {found.path / META} {reason}") from error


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
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise AssertionError(f"{name}: {type(value)} has no place in a checkpoint")


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
