"""The state of a pre-training run, and one step of it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain import distributed
from pretrain.backbones.vit import ViT
from pretrain.cpu_tuning import keep_freed_memory
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.methods import TrainSettings, find_method
from pretrain.methods.method import LossTerms, Progress
from pretrain.optim import OptimSettings, clip_gradients, empty_state, set_schedules
from pretrain.parallel import Ranks
from pretrain.registry import BACKBONES
from pretrain.schedules import cosine, scaled_lr, warmup_cosine
from pretrain.views.batch import Batch
from pretrain.views.device_pixels import CanvasBatch


@dataclass(frozen=True)
class Length:
    """How long a run is, in iterations."""

    epoch_iters: int
    total_iters: int
    warmup_iters: int

    @staticmethod
    def of(config: TrainSettings, n_images: int) -> "Length":
        """From epochs to iterations; an epoch is images / batch unless the config says how long it is."""
        optim = config.optim
        epoch_iters = optim.epoch_iters or n_images // optim.batch_size
        if not epoch_iters:
            few = f"is more than the {n_images} images of {config.data.root}"
            way = f"set optim.batch_size={1 << (n_images.bit_length() - 1)}, or optim.epoch_iters"
            raise UserError(f"config: optim.batch_size={optim.batch_size} {few}; {way}")
        return Length(epoch_iters, optim.epochs * epoch_iters, optim.warmup_epochs * epoch_iters)


def scheduled_at(iteration: int, optim: OptimSettings, length: Length) -> dict[str, float]:
    """METHOD.md 6: warm-up and cosine of the ``lr``, cosine of the ``weight_decay``."""
    total_iters, peak = length.total_iters, scaled_lr(optim.base_lr, optim.batch_size, optim.lr_rule)
    return {
        "lr": warmup_cosine(iteration, total_iters, length.warmup_iters, peak, optim.min_lr),
        "weight_decay": cosine(iteration, total_iters, optim.weight_decay, optim.weight_decay_end),
    }


@dataclass(frozen=True)
class StepLogs:
    """What a step says.

    Attributes:
        losses: ``loss``, its terms, the norm of the gradient, diagnostics; scalars on the device.
        terms: names of the loss's terms among them.
        scheduled: plain numbers: lr, weight decay, and what the method's ``after_step`` returns.
    """

    losses: dict[str, Tensor]
    terms: tuple[str, ...]
    scheduled: dict[str, float]


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, AbstractContextManager[Any]]:
    """Dtype of the parameters and autocast context of a step; ``auto``: bf16 on CUDA, float32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "float32"
    if name == "bf16":
        return torch.float32, torch.autocast(device.type, torch.bfloat16)
    return (torch.float64 if name == "float64" else torch.float32), nullcontext()


class Trainer:
    """The state of a run, and one step of it.

    Args:
        config: of the run.
        length: of the run.
    """

    def __init__(self, config: TrainSettings, length: Length) -> None:
        self.config, self.length = config, length
        self.device = choose_device(config.run.device)
        self.dtype, self.autocast = choose_precision(config.run.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.run.seed)
        self.method = find_method(config.method)(config).to(self.device, self.dtype)
        self.ranks = Ranks(self.method, config.step.parallel, compiled=config.step.compile)
        groups = self.method.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
        empty_state(self.optimizer)
        self.iteration, self.n_skipped = 0, 0

    def step(self, micro_batches: Sequence[Batch | CanvasBatch], examine: bool = False) -> StepLogs:
        """One iteration: prepare, losses and gradients, clip, step, what follows.

        Args:
            micro_batches: this rank's share of the batch, ``step.accumulate`` of them; still on the host.
            examine: also look for collapse (:meth:`Method.diagnostics`).
        """
        config, length = self.config, self.length
        progress = Progress(self.iteration, length.total_iters, length.epoch_iters, config.run.seed)
        scheduled = scheduled_at(self.iteration, config.optim, length)
        set_schedules(self.optimizer, **scheduled, epoch=self.iteration // length.epoch_iters)
        here = [batch.to(self.device, self.dtype) for batch in micro_batches]
        progress.seed_micro_batch(0)  # what preparing draws, a resumed run draws alike
        with self.autocast:
            prepared = self.method.prepare(here, progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(here, prepared, progress)
        with self.autocast:
            signs = self.method.diagnostics(here, prepared) if examine else {}
        self.ranks.reshard()
        grad_norm = clip_gradients(self.method.student, config.optim.clip_grad)
        losses = {"loss": loss.total, **loss.terms, "grad_norm": grad_norm}
        if config.step.on_nan == "skip" and not self.is_finite(losses):
            self.n_skipped += 1
        else:
            self.optimizer.step()
            scheduled |= self.method.after_step(progress)
        self.iteration += 1
        return StepLogs(losses | signs, tuple(loss.terms), scheduled)

    def backward(self, micro_batches: Sequence[Batch], prepared: Any, progress: Progress) -> LossTerms:
        """Gradients of the batch's loss, one micro-batch after the other; returns mean loss and terms."""
        n, sums, terms = len(micro_batches), list[Tensor](), dict[str, Tensor]()
        for i, batch in enumerate(micro_batches):
            progress.seed_micro_batch(i)
            with self.ranks.averaging(i == n - 1):
                with self.autocast:
                    loss = self.ranks(batch, prepared, i)
                (loss.total / n).backward()
            sums.append(loss.total.detach())
            for name, term in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + term.detach() / n
        # What couples micro-batches may count in the total of each: then only the terms' sum is the batch's.
        return LossTerms(sums[0] if n == 1 else torch.stack(list(terms.values())).sum(), terms)

    def is_finite(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether loss and gradient are finite on all ranks. The host waits for the device."""
        bad = (~torch.isfinite(torch.stack([losses["loss"], losses["grad_norm"]]))).any().float()
        return not bool(distributed.max_over_ranks(bad))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next iteration depends on besides its number: the live tensors, by name.

        ``method.*``: networks and buffers; ``optimizer.PARAMETER.*``: AdamW's moments and step.
        """
        state = self.networks()
        for name, parameter in self.method.student.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
        return state

    def networks(self) -> dict[str, Tensor]:
        """The part of :meth:`tensors` that another run can start from: networks, heads and centers."""
        return {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}

    def exported_backbone(self) -> ViT | None:
        """The backbone that the run leaves (:meth:`Method.exported_backbone`), whole; of a sharded one a
        copy, on the main process only. Every rank must call this."""
        backbone = self.method.exported_backbone()
        if not self.ranks.is_sharded:
            return backbone
        state = backbone.state_dict()
        state = {k: distributed.whole(v) for k, v in state.items()}
        if not distributed.is_main():
            return None
        whole: ViT = BACKBONES.get(self.config.backbone.name)(**backbone.model_kwargs)
        whole = whole.to(self.device, self.dtype)
        whole.load_state_dict(state)
        return whole
