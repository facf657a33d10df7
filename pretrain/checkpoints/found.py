"""Find the checkpoint to resume from: the newest complete one, or a given one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoints.store import MANIFEST, META, Record, directory, verify, whole_directories
from pretrain.checkpoints.tensors import INDEX, STATE, Entry, contents, read_pieces
from pretrain.errors import UserError
from pretrain.files import read_mapping

LAYOUTS = {"single": STATE, "sharded": INDEX}


@dataclass(frozen=True)
class Found:
    """A complete checkpoint: every file matches its manifest."""

    path: Path
    iteration: int  # steps done
    layout: str  # single | sharded
    meta: dict[str, Any]
    records: dict[str, Record]

    def contents(self) -> dict[str, Entry]:
        """Dtype, shape and location of every tensor, by name; reads no values."""
        return contents(self.path, self.layout, self.records)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, complete and on the CPU, for either layout; needs no other process.

        Raises:
            UserError: names the file that cannot be read as tensors.
        """
        entries = self.contents()
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        for name, piece, values in read_pieces(self.path, entries):
            tensors[name][piece.slices].copy_(values)
        return tensors


def open_checkpoint(path: Path) -> Found:
    """The checkpoint in the directory ``path`` (``.../checkpoints/it_00001000``), verified.

    Raises:
        UserError: names the file that is missing, damaged or not part of a checkpoint.
    """
    if not path.is_dir():
        told = f"{path} is no directory with a {MANIFEST}"
        raise UserError(f"checkpoint: {told}; files of other kinds are not read")
    records = verify(path)
    meta = read_mapping(path / META, "checkpoint")
    iteration, layout = meta.get("iteration"), meta.get("layout")
    if not isinstance(iteration, int) or not isinstance(layout, str) or LAYOUTS.get(layout) not in records:
        raise UserError(f"checkpoint: {path / META} names no iteration, or no layout whose files are there")
    return Found(path, iteration, layout, meta, records)


def newest(folder: Path) -> tuple[Found | None, list[str]]:
    """The newest complete checkpoint of a run, or None, and a message for each broken one passed over."""
    messages: list[str] = []
    for path in whole_directories(folder):
        try:
            found = open_checkpoint(path)
            found.contents()
            return found, messages
        except UserError as error:
            messages.append(f"passed over: {error}")
    return None, messages


def find(folder: Path, which: str = "auto") -> tuple[Found | None, list[str]]:
    """The checkpoint to resume from, read by the main process. Every rank must call this, and gets the same.

    Args:
        folder: of the run.
        which: ``auto`` (:func:`newest`), an iteration of this run, a checkpoint's directory, or another run's
            folder (its newest).

    Raises:
        UserError: the given checkpoint is missing or broken.
    """
    answer: list[Any] = [None]  # (checkpoint, messages), or the error that every rank raises
    if distributed.is_main():
        try:
            answer = [_find(folder, which)]
        except (UserError, OSError) as error:
            answer = [error]
    if distributed.world_size() > 1:
        dist.broadcast_object_list(answer, src=0, group=distributed.host_group())
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]  # type: ignore[no-any-return]


def _find(folder: Path, which: str) -> tuple[Found | None, list[str]]:
    if which == "auto":
        return newest(folder)
    path = directory(folder, int(which)) if which.isdecimal() else Path(which)
    if not (path / "checkpoints").is_dir():
        return open_checkpoint(path), []
    found, messages = newest(path)
    if found is None:
        raise UserError("; ".join([f"checkpoint: {path} holds no whole one", *messages]))
    return found, messages
