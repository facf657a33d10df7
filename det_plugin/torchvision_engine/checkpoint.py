"""Checkpoints of a detection run: written in one step, read as plain tensors, nothing executed."""

import os
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``folder/checkpoint.pt``: the old one stays whole until the new one is on the disk."""
    path = folder / NAME
    temporary = path.with_name(NAME + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The run's last checkpoint, none where there is none.

    Raises:
        UserError: the file cannot be read as tensors and plain values.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler fails in any way: KeyError, IndexError, struct.error, ...
        raise UserError(f"resume: {path} is no whole checkpoint ({type(error).__name__})") from error
    return state
