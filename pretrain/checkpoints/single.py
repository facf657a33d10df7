"""The layout ``single``: one safetensors file that one process writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoints import store
from pretrain.checkpoints.found import Found
from pretrain.checkpoints.tensors import STATE, copy_to_cpu, write_tensors


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
