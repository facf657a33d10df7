"""Checkpoints of a run: complete or absent, verified by checksums, and free of code.

``<run>/checkpoints/it_00001000/`` holds

* ``state.safetensors`` (layout ``single``), or ``shard_*.safetensors`` and ``index.json`` (layout
  ``sharded``, written and read by ``torch.distributed.checkpoint`` through storage classes of ours);
* ``meta.json``: plain values (iteration, layout, and what the caller adds);
* ``manifest.json``: size and SHA-256 of every other file.

A checkpoint is written as ``it_00001000.tmp`` and renamed when every byte is on disk. A process with nested
state, such as an optimizer's ``state_dict()``, uses :func:`save_state` and :func:`load_state`.
"""

from typing import TYPE_CHECKING, Any

from pretrain.checkpoints.found import Found, find, newest, open_checkpoint
from pretrain.checkpoints.store import clean, whole_directories
from pretrain.checkpoints.writer import Writer, consolidate, load_state, save, save_state

if TYPE_CHECKING:
    from pretrain.checkpoints.sharded import load, save_sharded

__all__ = ["Found", "Writer", "clean", "consolidate", "find", "load", "load_state", "newest"]
__all__ += ["open_checkpoint", "save", "save_sharded", "save_state", "whole_directories"]


def __getattr__(name: str) -> Any:
    """What needs ``torch.distributed.checkpoint``, whose import takes a second, when it is first used."""
    if name not in ("load", "save_sharded"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pretrain.checkpoints import sharded

    return getattr(sharded, name)
