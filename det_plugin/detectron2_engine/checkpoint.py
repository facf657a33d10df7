"""Checkpoints of our loop on Detectron2. Each file is whole or absent, and a damaged last one does not lose
the run.

The files are Detectron2's (``model_0004999.pth``, ``model_final.pth``, ``last_checkpoint``), so its launcher
can resume from them.
"""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from pretrain.errors import UserError
from pretrain.files import replacing
from pretrain.log import log

LAST = "last_checkpoint"


class WholeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer. A file appears under its name once all of it is on disk."""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name.pth``, then its name into ``last_checkpoint``."""
        if self.save_to_disk:
            parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
            state = {"model": self.model.state_dict(), **parts, **extra}
            with replacing(Path(self.save_dir) / f"{name}.pth") as partial, open(partial, "wb") as file:
                torch.save(state, file)
            with replacing(Path(self.save_dir) / LAST) as partial:
                partial.write_text(f"{name}.pth")


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
