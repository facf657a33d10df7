"""What the engine asks of a method, and what all runs have in common.

A method is one file: its settings, its networks, its loss. The engine builds it, feeds it micro-batches and
steps AdamW; it knows no method by name. A step is :meth:`Method.prepare` of all micro-batches,
:meth:`Method.loss` and a backward pass of each, clipping, the optimizer's step, :meth:`Method.after_step`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain import distributed
from pretrain.backbones.vit import ViT
from pretrain.build import BackboneSettings
from pretrain.data.sources import DataSettings
from pretrain.evaluation.probes import ProbeSettings
from pretrain.metrics_log import LogSettings
from pretrain.optim import OptimSettings, TeacherOptimSettings, ema_update, parameter_groups
from pretrain.parallel import StepSettings
from pretrain.schedules import cosine
from pretrain.settings import Settings, setting
from pretrain.views import ViewSettings
from pretrain.views.batch import Batch


class RunSettings(Settings):
    """Where a run goes, and what it computes with."""

    in_recipe = False
    name: str = setting("", "under which results are reported; without: the method's", min_length=0)
    output: str = setting("runs/pretrain", "folder of this run", fixed=False, min_length=1)
    init_from: str = setting(
        "", "folder of an earlier run: its networks, heads and centers, at iteration 0 with a fresh optimizer"
    )
    seed: int = setting(
        0, "of everything that is drawn: networks, order, views, masks, drop path", ge=0, le=2**31
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "the run computes on", fixed=False)
    precision: Literal["auto", "float32", "bf16", "float64"] = setting(
        "auto", "auto: bf16 on CUDA, float32 elsewhere"
    )
    deterministic: Literal["cpu", "always", "never"] = setting(
        "cpu", "torch's deterministic algorithms: cpu (there only: on CUDA they cost speed) | always | never"
    )


def recipe_setting(default: str) -> Any:
    """The field ``recipe`` of a method's settings, with its own recipe as the default."""
    text = "recipe that the run stands on and is compared with; set by base: NAME"
    return setting(default, text, in_recipe=False, fixed=False)


class TrainSettings(Settings):
    """Settings of a run that every method has; a method adds its own groups."""

    method: str = setting(
        "intertwined", "module in pretrain/methods, a dotted module or a .py file that holds the method"
    )
    recipe: str = recipe_setting("")
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    optim: OptimSettings = OptimSettings()
    step: StepSettings = StepSettings()
    probes: ProbeSettings = ProbeSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def groups(cls) -> list[str]:
        """The groups of keys."""
        return [key for key, info in cls.model_fields.items() if isinstance(info.default, Settings)]

    def view_settings(self) -> ViewSettings:
        """The crops, colors, positions and masks that the loader draws for this method."""
        raise AssertionError(f"{type(self).__module__}: Settings has no view_settings")


@dataclass(frozen=True)
class Progress:
    """Where the run stands.

    Attributes:
        iteration: of the step under way, from 0.
        total_iters, epoch_iters: length of the run and of an epoch.
        seed: of the run.
    """

    iteration: int
    total_iters: int
    epoch_iters: int
    seed: int

    def seed_micro_batch(self, i: int) -> None:
        """Seed torch from (seed, iteration, rank, i): micro-batch i always draws the same dropped paths."""
        words = [self.seed, self.iteration, distributed.rank(), i]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


class LossTerms(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        total: the scalar that is differentiated; its mean over the micro-batches has the gradient of the
            batch's loss.
        terms: {name: weighted addend of the loss}, as logged. Their means over the micro-batches sum to the
            batch's loss.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A method: ``student``, the network that learns, and its loss.

    Attributes:
        Settings: of its runs.
        stage: ``pretrain``, or ``posttrain`` of a backbone that is trained already; tables tell them apart.
        student: ``backbone`` (a ViT) and what stands on it; the norm of each child's gradient is clipped by
            itself.
    """

    Settings: ClassVar[type[TrainSettings]]
    stage: ClassVar[Literal["pretrain", "posttrain"]] = "pretrain"
    student: nn.ModuleDict

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @property
    def backbone(self) -> ViT:
        """The student's."""
        backbone = self.student["backbone"]
        assert isinstance(backbone, ViT)
        return backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of :func:`pretrain.optim.parameter_groups`."""
        return parameter_groups(self.student, self.settings.optim.head_lr_factor)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Any:
        """What needs the whole batch (a teacher's targets, centers, neighbors), without gradient. Changes
        no state that a skipped step would have to undo."""
        return None

    @abstractmethod
    def loss(self, micro_batch: Batch, prepared: Any, i: int) -> LossTerms:
        """The loss of micro-batch ``i``, given what :meth:`prepare` made of all of them."""

    def forward(self, micro_batch: Batch, prepared: Any, i: int) -> LossTerms:
        """:meth:`loss`, by the name under which DDP calls it."""
        return self.loss(micro_batch, prepared, i)

    def after_step(self, progress: Progress) -> dict[str, float]:
        """What follows a step that is not skipped (a teacher, centers). Returns values to log."""
        return {}

    def exported_backbone(self) -> ViT:
        """The backbone that the run leaves and that probes and images look at."""
        return self.backbone

    def diagnostics(self, micro_batches: Sequence[Batch], prepared: Any) -> dict[str, Tensor]:
        """Signs of collapse and the like for the logs, without gradient. Asked for after the losses of all
        micro-batches, before the optimizer's step."""
        return {}

    def collapse(self, signs: Mapping[str, float]) -> str:
        """What logged :meth:`diagnostics` say is wrong, with the remedy, in a line; nothing: "". The engine tells it
        where it is said again and again after the warm-up."""
        return ""


class TeacherRunSettings(RunSettings):
    """Of a method with a teacher."""

    export_network: Literal["teacher", "student"] = setting(
        "teacher",
        "network that probes and pictures look at and that backbone.safetensors holds",
        source="DINOv2",
    )


class TeacherSettings(TrainSettings):
    """Settings of a method whose teacher is a moving average of its student."""

    run: TeacherRunSettings = TeacherRunSettings()
    optim: TeacherOptimSettings = TeacherOptimSettings()


class EMATeacher(Method):
    """A method whose teacher, a ModuleDict of the same modules, is a moving average of the student."""

    teacher: nn.ModuleDict

    def make_networks(self) -> None:
        """``student`` and ``teacher`` from :meth:`network`, with the same weights."""
        self.student = self.network(self.settings.backbone.drop_path)
        self.teacher = self.network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, ViT)
        backbone.rescale = 1.0  # its places are as in inference (DINOv3)
        self.teacher.requires_grad_(False)

    @abstractmethod
    def network(self, drop_path: float) -> nn.ModuleDict:
        """A backbone and its heads, new."""

    def after_step(self, progress: Progress) -> dict[str, float]:
        """teacher <- m teacher + (1 - m) student; m rises along a cosine."""
        start, end = self.settings.optim.teacher_momentum, self.settings.optim.teacher_momentum_end
        momentum = cosine(progress.iteration, progress.total_iters, start, end)
        ema_update(self.teacher, self.student, momentum)
        return {"teacher_momentum": momentum}

    def exported_backbone(self) -> ViT:
        """The teacher's, or the student's where ``run.export_network`` says so."""
        backbone = getattr(self, self.settings.run.export_network)["backbone"]
        assert isinstance(backbone, ViT)
        return backbone
