"""What the trainer asks of a method: two networks, and losses from the one to the other."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.backbones.vit import ViT
from pretrain.views.batch import Batch


@dataclass(frozen=True)
class Neighbours:
    """[CLS] tokens of a rank's whole batch, among which KoLeo looks while one part of it is computed.

    Attributes:
        parts: the student's global [CLS] of each part, [G, b, D], without gradient.
        own: which part is being computed.
    """

    parts: Sequence[Tensor]
    own: int

    def around(self, cls: Tensor) -> Tensor:
        """All parts' tokens [G, B, D], the own ones replaced by ``cls`` [G, b, D], through which the gradient goes."""
        return torch.cat([cls if i == self.own else part for i, part in enumerate(self.parts)], dim=1)


class Method(nn.Module, ABC):
    """Teacher and student, ModuleDicts of the same modules in the same order: ``backbone`` (a ViT) and heads.

    A step is: :meth:`teacher_targets` of every part of the batch, :meth:`statistics` of all of them, and for each part
    :meth:`forward`, whose ``loss`` is then differentiated. The teacher follows by a moving average of the student.
    """

    student: nn.ModuleDict
    teacher: nn.ModuleDict

    def backbone_of(self, network: str) -> ViT:
        """The backbone of ``student`` or ``teacher``."""
        backbone = getattr(self, network)["backbone"]
        assert isinstance(backbone, ViT)
        return backbone

    @property
    def has_neighbours(self) -> bool:
        """Whether the samples of a whole batch meet in the loss, so that :meth:`forward` needs :class:`Neighbours`."""
        return False

    @abstractmethod
    def teacher_targets(self, batch: Batch) -> Any:
        """What the student has to agree with; without gradient."""

    @abstractmethod
    def statistics(self, parts: Sequence[Any]) -> Any:
        """What the targets of all parts of a batch, on all ranks, have in common: centres, counts. Without gradient."""

    @abstractmethod
    def forward(self, batch: Batch, targets: Any, statistics: Any, neighbours: Neighbours | None = None) -> dict[str, Tensor]:
        """The weighted loss terms of a batch, or of a part of it, and their sum under ``loss``."""

    def student_cls(self, batch: Batch) -> Tensor:
        """[CLS] of the student's global crops, [G, B, D], for :class:`Neighbours`."""
        raise AssertionError("only a method whose samples meet in the loss is asked")

    @abstractmethod
    def health(self, targets: Any, statistics: Any) -> dict[str, Tensor]:
        """Signs of collapse, for the logs."""
