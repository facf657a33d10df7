"""A fine-tuning's state, and one step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from det_plugin.loader import Sample
from det_plugin.loop import averaging, mean_losses, micro_batch_size
from det_plugin.run import DetectionRun
from det_plugin.torchvision_engine.loader import to_device
from det_plugin.torchvision_engine.model import build_model
from det_plugin.torchvision_engine.optim import build_optimizer, lr_at, set_lr
from pretrain import distributed
from pretrain.build import build_for_fine_tuning


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
        model_kwargs = {"drop_path": protocol.drop_path, **run.model_kwargs}
        self.vit = build_for_fine_tuning(run.backbone, run.weights, **model_kwargs)
        model = build_model(self.vit, protocol, checkpointing=run.checkpointing, compile=run.compile)
        self.model = model.to(device)
        self.optimizer = build_optimizer(self.model, protocol)
        has_amp = protocol.amp and device.type == "cuda"
        self.amp_dtype = getattr(torch, protocol.amp_dtype) if has_amp else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        self.ranks: nn.Module = self.model
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.ranks = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)

    def step(self, samples: list[Sample]) -> dict[str, float]:
        """One iteration on this rank's share. Returns the losses, means over micro-batches and ranks, and lr.

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
