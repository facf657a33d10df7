"""A fine-tuning's state, one step, and its evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from det_plugin.coco.annotations import CocoSplit, read_split
from det_plugin.protocol import DetectionProtocol
from det_plugin.run import DetectionRun
from det_plugin.step import averaging, mean_losses, micro_batch_size
from det_plugin.torchvision_engine.evaluate import Prediction, coco_metrics, predict
from det_plugin.torchvision_engine.folder import PREDICTIONS, write_json
from det_plugin.torchvision_engine.loader import Sample, to_device
from det_plugin.torchvision_engine.model import build_model
from det_plugin.torchvision_engine.optim import build_optimizer, lr_at, set_lr
from pretrain import distributed
from pretrain.build import build_for_fine_tuning
from pretrain.errors import UserError

EVAL_BATCH = 8  # images at a time in evaluation; the outcome does not depend on it


@dataclass(frozen=True)
class Data:
    """Both splits. They have the same classes."""

    train: CocoSplit
    val: CocoSplit

    @staticmethod
    def read(data: Path, protocol: DetectionProtocol) -> "Data":
        """Read and check both annotation files and, by their headers, all images.

        Raises:
            UserError: a file is damaged, or the splits have different classes; names the file.
        """
        classes = protocol.num_classes
        train = read_split(data, "train", num_classes=classes, training=True, share=protocol.train_share)
        val = read_split(data, "val", num_classes=classes, training=False)
        if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
            raise UserError(f"data: {train.file} and {val.file} have different categories")
        for split in (train, val):
            split.check_headers()
        return Data(train, val)


class Trainer:
    """Model, optimizer and iteration.

    Mixed precision only applies on CUDA. With float16 the loss is scaled so that small gradients survive. A
    step whose scaled gradients overflow changes no weights but counts as an iteration, as in Detectron2's
    AMPTrainer.

    Raises:
        UserError: the batch cannot be shared; the weights do not fit.
    """

    def __init__(self, run: DetectionRun, device: torch.device) -> None:
        protocol = run.protocol
        self.micro_batch_size = micro_batch_size(protocol.batch_size, run.accumulate)
        self.run, self.protocol, self.device, self.iteration = run, protocol, device, 0
        torch.manual_seed(run.seed)
        self.vit = build_for_fine_tuning(
            run.backbone, run.weights, **{"drop_path": protocol.drop_path, **run.model_kwargs}
        )
        self.model = build_model(self.vit, protocol, checkpointing=run.checkpointing, compile=run.compile).to(
            device
        )
        self.optimizer = build_optimizer(self.model, protocol)
        self.amp_dtype = (
            getattr(torch, protocol.amp_dtype) if protocol.amp and device.type == "cuda" else None
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        self.ranks: nn.Module = self.model
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.ranks = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)

    def step(self, samples: list[Sample]) -> dict[str, float]:
        """One iteration on this rank's share of the batch. Returns the losses, averaged over micro-batches
        and ranks, and lr.

        Raises:
            FloatingPointError: a loss is not finite. The weights are those before the step.
        """
        lr = lr_at(self.iteration, self.protocol)
        set_lr(self.optimizer, lr)
        # For drop path and the sampling of boxes. Seeded by the iteration, so a resumed run draws the same.
        torch.manual_seed(self.run.seed * 1_000_003 + self.iteration * 1009 + distributed.rank())
        self.ranks.train()
        self.optimizer.zero_grad(set_to_none=True)
        terms: list[dict[str, Tensor]] = []
        for i in range(0, len(samples), self.micro_batch_size):
            with averaging(self.ranks, now=i + self.micro_batch_size == len(samples)):
                with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    losses = self.ranks(*to_device(samples[i : i + self.micro_batch_size], self.device))
                self.scaler.scale(torch.stack(list(losses.values())).sum() / self.run.accumulate).backward()
            terms.append(losses)
        values = mean_losses(terms, self.iteration)
        if self.protocol.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.protocol.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        return {"loss": sum(values.values()), **values, "lr": lr}

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on, as tensors and plain values."""
        states = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {"iteration": self.iteration, **{name: part.state_dict() for name, part in states.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # empty where the checkpoint is from a CPU
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]


def evaluate(
    model: nn.Module,
    split: CocoSplit,
    protocol: DetectionProtocol,
    *,
    workers: int,
    device: torch.device,
    output: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """COCO metrics of a split (only on the main process) and its predictions. Writes
    ``output/predictions.json``."""
    size = protocol.image_size_px
    predictions = predict(
        model,
        split,
        image_size_px=size,
        batch_size=EVAL_BATCH,
        workers=workers,
        device=device,
        progress=progress,
    )
    if not distributed.is_main():
        return {}, predictions
    write_json(output / PREDICTIONS, predictions)
    return coco_metrics(split.file, predictions), predictions
