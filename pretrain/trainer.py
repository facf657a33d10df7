"""The state of a pre-training run, and one step of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain import distributed
from pretrain.backbones.vit import ViT
from pretrain.cpu_tuning import keep_freed_memory
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.methods import build_method
from pretrain.methods.method import Neighbours
from pretrain.optim import clip_gradients, ema_update, empty_state, parameter_groups, set_schedules
from pretrain.parallel import Ranks
from pretrain.schedules import cosine, scaled_lr, warmup_cosine
from pretrain.views.batch import Batch
from pretrain.views.device_pixels import CanvasBatch


@dataclass(frozen=True)
class Length:
    """How long a run is, in iterations."""

    epoch_it: int
    total_it: int
    warmup_it: int
    freeze_it: int

    @staticmethod
    def of(config: DictConfig, n_images: int) -> "Length":
        """From epochs to iterations; an epoch is images / batch unless the config says how long it is."""
        optim = config.optim
        epoch_it = optim.epoch_length_it or n_images // optim.batch_size
        if not epoch_it:
            raise UserError(f"config: optim.batch_size={optim.batch_size} is more than the {n_images} images of {config.data.root}")
        return Length(
            epoch_it,
            optim.epochs * epoch_it,
            optim.warmup_epochs * epoch_it,
            optim.freeze_last_layer_epochs * epoch_it,
        )


@dataclass(frozen=True)
class Values:
    """What the schedules say at one iteration."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    teacher_momentum: float

    def logged(self) -> dict[str, float]:
        """What goes into the logs."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "teacher_momentum": self.teacher_momentum}

    @staticmethod
    def at(it: int, config: DictConfig, length: Length) -> "Values":
        """METHOD.md 6: warm-up and cosine of the lr, cosines of weight decay and momentum, last layer frozen at first."""
        optim = config.optim
        peak = scaled_lr(optim.base_lr, optim.batch_size, optim.lr_rule)
        lr = warmup_cosine(it, length.total_it, length.warmup_it, peak, optim.min_lr)
        return Values(
            lr,
            0.0 if it < length.freeze_it else lr,
            cosine(it, length.total_it, optim.weight_decay, optim.weight_decay_end),
            cosine(it, length.total_it, optim.teacher_momentum, optim.teacher_momentum_end),
        )


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, AbstractContextManager[Any]]:
    """Dtype of the parameters and the autocast context of a step; ``auto`` is bf16 on CUDA, float32 elsewhere."""
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

    def __init__(self, config: DictConfig, length: Length) -> None:
        self.config, self.length = config, length
        self.device = choose_device(config.run.device)
        self.dtype, self.autocast = choose_precision(config.run.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.run.seed)
        self.method = build_method(config).to(self.device, self.dtype)
        self.ranks = Ranks(self.method, config.step.parallel, compiled=config.step.compile)
        groups = parameter_groups(self.method.student)
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(config.optim.betas), fused=True)
        empty_state(self.optimizer)
        self.iteration, self.n_skipped = 0, 0

    def step(self, parts: Sequence[Batch | CanvasBatch], examine: bool = False) -> tuple[dict[str, Tensor], Values]:
        """One iteration: teacher, student, losses, backward, step, EMA.

        Args:
            parts: this rank's share of the batch, in ``step.accumulate`` parts; still on the host.
            examine: also look for collapse (:meth:`Method.health`).

        Returns:
            the loss terms and the norm of the backbone's gradient, still on the device, and what the schedules said.
        """
        values = Values.at(self.iteration, self.config, self.length)
        set_schedules(self.optimizer, values.lr, values.last_layer_lr, values.weight_decay, self.config.optim.head_lr_factor)
        here = [part.to(self.device, self.dtype) for part in parts]
        before = self.centers()
        with self.autocast:
            targets = [self.method.teacher_targets(part) for part in here]
            statistics = self.method.statistics(targets)
            health = self.method.health(targets[0], statistics) if examine else {}
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.backward(here, targets, statistics)
        self.ranks.reshard()
        terms["grad_norm"] = clip_gradients(self.method.student, self.config.optim.clip_grad)
        if self.config.step.on_nan == "skip" and not self.is_finite(terms):
            self.n_skipped += 1
            for name, center in before.items():
                setattr(self.method, name, center)
        else:
            self.optimizer.step()
            ema_update(self.method.teacher, self.method.student, values.teacher_momentum)
        self.iteration += 1
        return terms | health, values

    def backward(self, parts: Sequence[Batch], targets: Sequence[Any], statistics: Any) -> dict[str, Tensor]:
        """Gradients of the batch's loss, one part after the other; returns its terms."""
        neighbours = self.neighbours(parts)
        total: dict[str, Tensor] = {}
        for i, (part, target) in enumerate(zip(parts, targets)):
            self.seed(i)
            with self.ranks.averaging(i == len(parts) - 1):
                with self.autocast:
                    terms = self.ranks(part, target, statistics, neighbours[i])
                (terms["loss"] / len(parts)).backward()
            for name, term in terms.items():
                total[name] = total.get(name, 0.0) + term.detach() / len(parts)
        if len(parts) > 1:  # a part's loss counts the batch's KoLeo as often as there are parts
            total["loss"] = torch.stack([term for name, term in total.items() if name != "loss"]).sum()
        return total

    def neighbours(self, parts: Sequence[Batch]) -> list[Neighbours | None]:
        """For KoLeo over a batch that comes in parts: the [CLS] tokens of all of them, for one more pass without gradient."""
        if len(parts) == 1 or not self.method.has_neighbours:
            return [None] * len(parts)
        cls = []
        for i, part in enumerate(parts):
            self.seed(i)
            with self.autocast:
                cls.append(self.method.student_cls(part))
        return [Neighbours(cls, i) for i in range(len(parts))]

    def seed(self, part: int) -> None:
        """Drop path is the only thing drawn on the device: from (seed, iteration, rank, part), so a resumed run draws the same."""
        words = [self.config.run.seed, self.iteration, distributed.rank(), part]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))

    def is_finite(self, terms: Mapping[str, Tensor]) -> bool:
        """Whether loss and gradient are numbers, on all ranks. The host waits for the device."""
        bad = (~torch.isfinite(torch.stack([terms["loss"], terms["grad_norm"]]))).any().float()
        return not bool(distributed.max_over_ranks(bad))

    def centers(self) -> dict[str, Tensor]:
        """The running centres, by the name of their buffer."""
        return {name: buffer for name, buffer in self.method.named_buffers() if name.startswith("center_")}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next iteration depends on besides its number: the live tensors, by name.

        ``method.*``: networks and centres; ``optimizer.PARAMETER.*``: AdamW's moments and step.
        """
        state = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        return state | dict(self._moments())

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.method.student.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{name}.{key}", tensor

    def networks(self) -> dict[str, Tensor]:
        """The part of :meth:`tensors` that another run can start from: networks, heads and centres."""
        return {name: tensor for name, tensor in self.tensors().items() if name.startswith("method.")}

    def kept_backbone(self) -> ViT | None:
        """The backbone that the run leaves (``run.leaves``), whole; of a sharded one a copy, on the main process only. Every rank
        must call this."""
        backbone = self.method.backbone_of(self.config.run.leaves)
        if not self.ranks.is_sharded:
            return backbone
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in backbone.state_dict().items()}
        if not distributed.is_main():
            return None
        whole = ViT(**backbone.flags).to(self.device, self.dtype)
        whole.load_state_dict(state)
        return whole
