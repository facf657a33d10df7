"""Checkpoints of a detection run, in the format of :mod:`pretrain.checkpoints`.

The ``checkpoint.pt`` of older versions is still read, as tensors and plain values, and never written.
"""

from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoints
from pretrain.distributed import log
from pretrain.errors import UserError

OLD = "checkpoint.pt"
KEEP = 2  # where the newest is damaged, the one before is used


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``folder/checkpoints/it_<iteration>``; for the main process alone.

    Args:
        state: ``iteration``, and what :func:`pretrain.checkpoints.save_state` takes.

    Raises:
        OSError: names the folder that cannot be written; earlier checkpoints stay whole.
    """
    return checkpoints.save_state(folder, state["iteration"], state, KEEP)


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a checkpoint; its contents are not read."""
    return bool(checkpoints.whole_directories(folder)) or (folder / OLD).is_file()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in the run's newest whole checkpoint, None where there is none.

    Raises:
        UserError: there are checkpoints, and none is whole; names the file.
    """
    found, messages = checkpoints.newest(folder)
    for message in messages:
        log(message)
    if found is not None:
        return checkpoints.load_state(found)
    if messages:
        raise UserError(f"resume: {folder} has checkpoints, but no whole one; move them away to start anew")
    old = folder / OLD
    if not old.is_file():
        return None
    try:
        return torch.load(old, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # on damaged bytes the unpickler may raise anything: KeyError, IndexError, struct.error
        raise UserError(f"resume: {old} is no whole checkpoint ({type(error).__name__})") from error
