"""Checkpoints of our loop on Detectron2. Each file is whole or absent, and a damaged last one does not lose
the run.

The files are Detectron2's (``model_0004999.pth``, ``model_final.pth``, ``last_checkpoint``), so its launcher
can resume from them.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase

from pretrain.distributed import log
from pretrain.errors import UserError

LAST = "last_checkpoint"
SAVE_PERIOD_S = 900  # the most that a killed process loses


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer. A file appears under its name once all of it is on disk."""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name.pth``, then its name into ``last_checkpoint``."""
        if self.save_to_disk:
            parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
            state = {"model": self.model.state_dict(), **parts, **extra}
            _replace(Path(self.save_dir) / f"{name}.pth", lambda file: torch.save(state, file))
            _replace(Path(self.save_dir) / LAST, lambda file: file.write(f"{name}.pth".encode()))


class Checkpoints(HookBase):
    """Saves every ``period`` iterations, every 15 minutes and at the end; keeps ``max_to_keep`` and the last.

    Args:
        start_iter: where this process begins. Files of earlier iterations count toward ``max_to_keep``.
    """

    def __init__(
        self, checkpointer: WholeCheckpointer, start_iter: int, *, period: int, max_to_keep: int
    ) -> None:
        self.checkpointer, self.period, self.max_to_keep = checkpointer, period, max_to_keep
        self.saved_s = time.monotonic()
        files = sorted(Path(checkpointer.save_dir).glob("model_[0-9]*.pth"))
        self.files = [file for file in files if file.stem < f"model_{start_iter:07d}"]

    def after_step(self) -> None:
        """Called by the trainer."""
        it: int = self.trainer.iter
        if (it + 1) % self.period == 0 or time.monotonic() - self.saved_s > SAVE_PERIOD_S:
            self.save()
        if it + 1 == self.trainer.max_iter:
            self.checkpointer.save("model_final", iteration=it)

    def save(self) -> None:
        """Save the state after the trainer's current iteration."""
        name = f"model_{self.trainer.iter:07d}"
        self.checkpointer.save(name, iteration=self.trainer.iter)
        file = Path(self.checkpointer.save_dir) / f"{name}.pth"
        self.files = [*(f for f in self.files if f != file), file]
        for old in self.files[: -self.max_to_keep]:
            old.unlink(missing_ok=True)
        self.files, self.saved_s = self.files[-self.max_to_keep :], time.monotonic()


def last_whole(folder: Path) -> Path | None:
    """A run's last checkpoint, or None. One that cannot be read is skipped and named on stderr.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    if not (folder / LAST).is_file():
        return None
    last = folder / (folder / LAST).read_text().strip()
    files = sorted(folder.glob("model_*.pth"), reverse=True)
    for file in dict.fromkeys([last, *files]):
        try:
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
            return file
        except Exception as error:  # on damaged bytes the unpickler may raise anything
            reason = f"is no whole checkpoint ({type(error).__name__})"
            log(f"warning: {file} {reason}; looking for the one before")
    raise UserError(f"output: {folder} has no whole checkpoint to go on from; the last is {last}")


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
