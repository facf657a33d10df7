"""Write checkpoints while training continues: copy at once, write in the background."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain import distributed
from pretrain.checkpoints import sharded, single, store
from pretrain.checkpoints.tensors import copy_to_cpu


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
        copies = copy_to_cpu(tensors, self.buffers)
        if not self.in_background:
            self._write(iteration, tensors, copies, meta)
            return
        # A thread that writes shards may wait for dead ranks: it must not keep this process from ending.
        self.thread = threading.Thread(
            target=self._try, args=(iteration, dict(tensors), copies, dict(meta)), daemon=self.is_sharded
        )
        self.thread.start()

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

    def _try(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # :meth:`wait` raises it again
            self.error = error

    def _write(
        self,
        iteration: int,
        tensors: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
        meta: Mapping[str, Any],
    ) -> None:
        if self.is_sharded:
            sharded.save_sharded(self.folder, iteration, tensors, meta, self.keep, self.group, copies)
        else:
            single.write(self.folder, iteration, copies, meta, self.keep)
