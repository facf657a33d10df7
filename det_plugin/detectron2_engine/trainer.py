"""A step of our loop on Detectron2's trainer, with gradient accumulation, also on the CPU; and the checkpoints.

The files are Detectron2's (``model_0004999.pth``, ``model_final.pth``, ``last_checkpoint``), so its launcher
can resume from them. Each is whole or absent, and a damaged last one does not lose the run.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer
from torch import nn

from det_plugin.loop import averaging, mean_losses
from pretrain.errors import UserError
from pretrain.files import replacing
from pretrain.log import log

LAST = "last_checkpoint"


class AccumulatingTrainer(SimpleTrainer):
    """A step over ``accumulate`` parts of a batch, in turn. The loss is the parts' mean.

    Args:
        model: the detector, or DistributedDataParallel around it. Ranks average their gradients after the
            last part only.
        data_loader: parts, without end (:meth:`det_plugin.detectron2_engine.loader.TrainLoader.parts`).
        amp: float16 with loss scaling, as in Detectron2's AMPTrainer. CUDA only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int,
        amp: bool,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulate, self.amp, self.started = accumulate, amp, time.monotonic()
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp)
        self.last: dict[str, float] = {}  # losses and learning rate of the last step, by Detectron2's names

    def run_step(self) -> None:
        """One update.

        Raises:
            FloatingPointError: a loss is not finite; names the iteration and the losses. The weights are
                those before the step.
        """
        self.optimizer.zero_grad()
        self.waited_s, terms = 0.0, []
        for part in range(self.accumulate):
            start = time.perf_counter()
            samples = next(self._data_loader_iter)
            self.waited_s += time.perf_counter() - start
            with averaging(self.model, now=part + 1 == self.accumulate):
                with torch.autocast("cuda", torch.float16, enabled=self.amp):
                    losses = self.model(samples)
                self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
            terms.append({name: loss.detach() for name, loss in losses.items()})
        values = mean_losses(terms, self.iter)
        losses = {"total_loss": sum(values.values()), **values}
        self.last = {**losses, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def terms(self) -> dict[str, float]:
        """The last losses and learning rate by the log's names; {} after another trainer's checkpoint."""
        return {"loss" if name == "total_loss" else name: value for name, value in self.last.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state of Detectron2's AMPTrainer, with the last losses and the time so far."""
        own = {"last": self.last, "wall_time_s": time.monotonic() - self.started}
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it. States of Detectron2's own trainers load, too."""
        super().load_state_dict(state_dict)
        self.last = state_dict.get("last", {})
        self.started -= state_dict.get("wall_time_s", 0.0)
        if state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])


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
        UserError: there are checkpoints, but none can be read; ``last_checkpoint`` names no ``.pth`` of the folder,
            which Detectron2 would fetch or unpickle.
    """
    if not (folder / LAST).is_file():
        return None
    name = (folder / LAST).read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or not name.endswith(".pth") or not name.isprintable():
        told = "should name a *.pth in its folder"
        raise UserError(f"{folder / LAST} {told}, not {name[:80]!r}; write the name of one there")
    last = folder / name
    files = sorted(folder.glob("model_*.pth"), reverse=True)
    for file in dict.fromkeys([last, *files]):
        try:
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)["model"]
            return file
        except Exception as error:  # on damaged bytes the unpickler may raise anything
            reason = f"is no whole checkpoint ({type(error).__name__})"
            log(f"warning: {file} {reason}; looking for the one before")
    raise UserError(f"output: {folder} has no whole checkpoint to go on from; the last is {last}")
