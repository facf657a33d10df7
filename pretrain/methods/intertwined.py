"""Intertwined content and position (paper 3; eq. 6), on DINOv2's losses; DINOv2 is another config of it.

L = L_image + L_content + L_pos + lambda_koleo L_koleo. The teacher, an exponential moving average of the
student, sees every patch with its content and its crop-tied position; the student's global crops lose the
content or the position of some patches.

A rank's batch may come in micro-batches (gradient accumulation). What couples the samples of a batch still
holds for the whole: the teacher goes first over all micro-batches, so centers and Sinkhorn-Knopp see all of
it, and KoLeo looks for neighbors among the [CLS] tokens of all of them.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.backbones.vit import Tokens, ViewGroup
from pretrain.errors import UserError
from pretrain.heads import HeadOutput, HeadSettings, ProjectionHead
from pretrain.losses import (
    effective_rank,
    explained_share,
    image_loss,
    koleo_loss,
    patch_loss,
    sinkhorn_center,
    teacher_entropies,
    updated_center,
)
from pretrain.methods.backbones import check_crops, new_backbone
from pretrain.methods.method import EMATeacher, LossTerms, Progress, TeacherSettings, recipe_setting
from pretrain.optim import TeacherOptimSettings, parameter_groups
from pretrain.parallel import StepSettings
from pretrain.settings import Settings as Group
from pretrain.settings import setting
from pretrain.views import ColorSettings, CropSettings, MaskSettings, PositionSettings, ViewSettings
from pretrain.views.batch import Batch

KINDS = ("content", "position")
COLLAPSED, ONE_LINE = (
    0.02,
    1.2,
)  # share of what chance gives, effective rank; below, a run has collapsed (ours)
# head -> the teacher's output: ``image`` [G, B, d], ``content`` and ``position`` [M, d]
Targets = dict[str, HeadOutput]
Centers = dict[str, Tensor]  # head -> [1, K]


class LossSettings(Group):
    """Weights of eq. 6 and what its terms need."""

    image: float = setting(1.0, "weight of the image loss", source="eq. 6", ge=0)
    content: float = setting(1.0, "weight of the content loss", source="eq. 6", ge=0)
    position: float = setting(1.0, "weight of the position loss", source="eq. 6", ge=0)
    koleo: float = setting(1.0, "weight of the KoLeo loss", source="sec. 3.4", ge=0)
    koleo_scope: Literal["global", "local"] = setting(
        "global", "neighbors are: global (over all ranks) | local (within a rank; DINOv2)"
    )
    centering: Literal["softmax_center", "sinkhorn_knopp"] = setting(
        "softmax_center", "of the teacher's logits", source="DINOv2 on ImageNet-1K"
    )
    center_momentum: float = setting(0.9, "of the running center", source="DINOv2", ge=0, le=1)
    sinkhorn_iterations: int = setting(3, "of Sinkhorn-Knopp", source="DINOv2", ge=1, le=1000)
    teacher_temperature: float = setting(
        0.04, "temperature of the teacher, constant", source="Table 6", ge=1e-4
    )
    student_temperature: float = setting(0.1, "temperature of the student", source="DINOv2", ge=1e-4)


class IntertwinedOptimSettings(TeacherOptimSettings):
    """The optimizer, whose heads wait."""

    freeze_last_layer_epochs: int = setting(
        1, "epochs during which the prototypes do not learn", source="DINOv2", ge=0
    )


class IntertwinedStepSettings(StepSettings):
    """The step, whose logits are too many to hold."""

    loss_rows: int = setting(
        512, "rows of [N, n_prototypes] that exist at a time; 0: all at once, the plain form", ge=0
    )


@dataclass(frozen=True)
class Prepared:
    """What a batch has in common."""

    targets: list[Targets]  # of each micro-batch
    centers: Centers
    # each micro-batch's global [CLS] of the student, [G, b, D], for KoLeo over several
    neighbors: list[Tensor] | None
    # L_pos of each micro-batch, without its weight in the loss, as soon as :meth:`Intertwined.loss` has it
    position_losses: list[Tensor] = field(default_factory=list)


class Intertwined(EMATeacher):
    """Teacher and student, each a backbone and a head for each loss that is on.

    Children: ``student`` and ``teacher`` (ModuleDicts with ``backbone``, ``image``, and ``content`` /
    ``position`` where that loss is on), and one buffer ``center_<head>`` [1, K] a head.
    """

    class Settings(TeacherSettings):
        """Defaults: Table 6, ViT-S/16 on ImageNet-1K."""

        recipe: str = recipe_setting("intertwined-100ep")
        crops: CropSettings = CropSettings()
        positions: PositionSettings = PositionSettings()
        color: ColorSettings = ColorSettings()
        masks: MaskSettings = MaskSettings()
        heads: HeadSettings = HeadSettings()
        losses: LossSettings = LossSettings()
        optim: IntertwinedOptimSettings = IntertwinedOptimSettings()
        step: IntertwinedStepSettings = IntertwinedStepSettings()

        def view_settings(self) -> ViewSettings:
            """Crops with their colors, positions and masks."""
            # a learned grid ignores crops by itself
            tied = self.positions.follows_crops or self.positions.encoding == "standard"
            patch_size = self.backbone.patch_size
            return ViewSettings(self.crops, self.color, self.positions, self.masks, patch_size, tied)

        @model_validator(mode="after")
        def _check(self) -> Self:
            check_crops(self.crops, self.backbone.patch_size, least_globals=2)
            positions, (side, _) = self.positions, self.view_settings().grid
            if positions.encoding == "standard" and positions.grid != side:
                size = f"a global crop has {side} x {side} patches"
                warnings.warn(f"config: positions.grid={positions.grid}, but {size}", stacklevel=2)
            for kind in KINDS:
                if (getattr(self.masks, f"{kind}_share") > 0) != (getattr(self.losses, kind) > 0):
                    both = f"masks.{kind}_share and losses.{kind}"
                    warnings.warn(f"config: {both} act only together, and one is 0", stacklevel=2)
            return self

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        weights, masks = settings.losses, settings.masks
        self.kinds = [k for k in KINDS if getattr(weights, k) > 0 and getattr(masks, f"{k}_share") > 0]
        self.head_names = ["image", *self.kinds]
        self.temperatures = (settings.losses.student_temperature, settings.losses.teacher_temperature)
        self.n_rows = settings.step.loss_rows
        self.make_networks()
        self.backbone.mask_token.requires_grad_("content" in self.kinds)
        self.backbone.pos_mask_token.requires_grad_("position" in self.kinds)
        self.next_centers: Centers = {}
        for name in self.head_names:
            self.register_buffer(f"center_{name}", torch.zeros(1, settings.heads.n_prototypes))

    def network(self, drop_path: float) -> nn.ModuleDict:
        """A backbone with mask tokens, and its heads."""
        settings = self.settings
        backbone = new_backbone(settings, drop_path, settings.positions, mask_tokens=True)
        if not backbone.has_cls:
            needed = "has no [CLS] token, which the image loss needs"
            raise UserError(f"backbone.weights: {settings.backbone.weights} {needed}; use another file")
        sizes = settings.heads.model_dump()
        heads = {name: ProjectionHead(backbone.embed_dim, **sizes) for name in self.head_names}
        return nn.ModuleDict({"backbone": backbone, **heads})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As all methods', with prototypes that wait."""
        optim = self.settings.optim
        frozen = lambda name: optim.freeze_last_layer_epochs if "last_layer" in name else 0  # noqa: E731
        return parameter_groups(self.student, optim.head_lr_factor, frozen)

    @torch.no_grad()
    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Prepared:
        """The teacher's targets, the centers for them, and the neighbors that KoLeo needs."""
        targets = [self.teacher_targets(batch) for batch in micro_batches]
        losses, neighbors = self.settings.losses, None
        centers = self.centers(targets)
        if len(micro_batches) > 1 and losses.koleo > 0 and losses.koleo_scope == "global":
            neighbors = []
            for i, batch in enumerate(micro_batches):
                progress.seed_micro_batch(i)
                tokens, *_ = self.student_tokens(batch, with_locals=False)
                neighbors.append(tokens.cls.unflatten(0, (batch.views.n_global, -1)))
        return Prepared(targets, centers, neighbors)

    def teacher_targets(self, batch: Batch) -> Targets:
        """What the student has to predict: no mask, every crop with its own positions."""
        boxes, flips = batch.views.globals
        teacher: Any = self.teacher
        (tokens,) = teacher["backbone"].forward_views([ViewGroup(batch.global_crops, boxes, flips)])
        targets = {kind: teacher[kind](masked_patches(tokens, batch, kind)) for kind in self.kinds}
        return {"image": teacher["image"](tokens.cls.unflatten(0, (batch.views.n_global, -1))), **targets}

    def centers(self, targets: Sequence[Targets]) -> Centers:
        """The centers for a batch, given the targets of all its micro-batches; the batch's own logits
        count from the next step on (DINOv2), when :meth:`after_step` moves the running ones."""
        losses, centers, self.next_centers = self.settings.losses, {}, {}
        for name in self.head_names:
            rows = torch.cat([target[name].bottleneck.flatten(0, -2) for target in targets])
            teacher = HeadOutput(rows, targets[0][name].prototypes)
            if losses.centering == "sinkhorn_knopp":
                how = self.temperatures[1], losses.sinkhorn_iterations, self.n_rows
                centers[name] = sinkhorn_center(teacher, *how)
            else:
                centers[name] = getattr(self, f"center_{name}")
                self.next_centers[name] = updated_center(centers[name], teacher, losses.center_momentum)
        return centers

    def student_tokens(self, batch: Batch, with_locals: bool = True) -> list[Tokens]:
        """One packed pass over the masked global crops and, where there are any, the local ones."""
        boxes, flips = batch.views.globals
        masks = {f"{kind}_mask": getattr(batch.masks, kind) for kind in self.kinds}
        groups = [ViewGroup(batch.global_crops, boxes, flips, **masks)]
        if with_locals and len(batch.local_crops):
            groups.append(ViewGroup(batch.local_crops, *batch.views.locals, is_local=True))
        return self.backbone.forward_views(groups)

    def loss(self, micro_batch: Batch, prepared: Prepared, i: int) -> LossTerms:
        """Eq. 6. With several micro-batches KoLeo is that of the whole batch, its value the same for each;
        in ``total`` it counts once a micro-batch, so that the mean of their gradients is the batch's."""
        batch, targets, centers = micro_batch, prepared.targets[i], prepared.centers
        losses, student, how = self.settings.losses, self.student, (self.temperatures, self.n_rows)
        tokens = self.student_tokens(batch)
        global_cls = tokens[0].cls.unflatten(0, (batch.views.n_global, -1))  # [G, B, D]
        cls = torch.cat([group.cls for group in tokens]).unflatten(0, (-1, batch.n_images))  # [G + L, B, D]
        image = image_loss(student["image"](cls), targets["image"], centers["image"], *how)
        terms = {"image": losses.image * image}
        for kind in self.kinds:
            weights, n_crops = getattr(batch.masks, f"{kind}_weight"), len(tokens[0].cls)
            output = student[kind](masked_patches(tokens[0], batch, kind))
            value = patch_loss(output, targets[kind], centers[kind], weights, n_crops, *how)
            terms[kind] = getattr(losses, kind) * value
            if kind == "position":
                prepared.position_losses.append(value.detach())
        terms |= self.further_terms(tokens, batch)
        total = torch.stack(list(terms.values())).sum()
        if losses.koleo > 0:
            everyone = global_cls if prepared.neighbors is None else among(prepared.neighbors, i, global_cls)
            # Apart for each global view: two crops of one image are no neighbors to push away.
            terms["koleo"] = losses.koleo * sum(koleo_loss(view, losses.koleo_scope) for view in everyone)
            total = total + len(prepared.neighbors or [i]) * terms["koleo"]
        return LossTerms(total, terms)

    def further_terms(self, tokens: Sequence[Tokens], batch: Batch) -> dict[str, Tensor]:
        """Weighted addends to eq. 6, by the names under which they are logged, for a method that stands on this one.

        Args:
            tokens: the student's, of the masked global crops and, where there are any, of the local ones.
            batch: the micro-batch.
        """
        return {}

    def after_step(self, progress: Progress) -> dict[str, float]:
        """The teacher follows the student; the running centers take in the batch's logits."""
        for name, center in self.next_centers.items():
            setattr(self, f"center_{name}", center)
        return super().after_step(progress)

    @torch.no_grad()
    def diagnostics(self, micro_batches: Sequence[Batch], prepared: Prepared) -> dict[str, Tensor]:
        """Entropies of the teacher's [CLS] distributions, the spread of its bottleneck and its effective rank; and what
        L_pos is to be seen beside.

        ``teacher_entropy`` near ln K: all alike; ``mean_entropy`` near 0: one prototype takes all;
        ``feature_std`` near 0: all images are one point (1 / sqrt(d) is that of directions at random);
        ``effective_rank`` near 1: they lie on a line. ``position_entropy``: of the teacher's distributions at the
        patches whose position is masked, the least that L_pos can be there; ``position_explained`` at most 0: the
        student predicts these no better than their mean does (:func:`pretrain.losses.explained_share`).
        """
        image = prepared.targets[0]["image"]
        rows = image.bottleneck.flatten(0, -2)[:256]
        teacher = HeadOutput(rows, image.prototypes)
        entropy, mean_entropy = teacher_entropies(teacher, prepared.centers["image"], self.temperatures[1])
        spread = {"feature_std": rows.std(0).mean(), "effective_rank": effective_rank(rows)}
        signs = {"teacher_entropy": entropy, "mean_entropy": mean_entropy, **spread}
        if "position" in self.kinds:
            signs |= self.position_signs(micro_batches, prepared)
        return signs

    def position_signs(self, micro_batches: Sequence[Batch], prepared: Prepared) -> dict[str, Tensor]:
        """What :meth:`diagnostics` says of L_pos."""
        targets = [target["position"] for target in prepared.targets]
        teacher = HeadOutput(torch.cat([target.bottleneck for target in targets]), targets[0].prototypes)
        center, weights = prepared.centers["position"], list[Tensor]()
        for batch in micro_batches:
            assert batch.masks is not None
            weights.append(batch.masks.position_weight.to(center) / len(batch.global_crops))
        loss = torch.stack(prepared.position_losses).sum()
        how = self.temperatures[1], torch.cat(weights), loss, self.n_rows
        entropy, explained = explained_share(teacher, center, *how)
        return {"position_entropy": entropy, "position_explained": explained}

    def collapse(self, signs: Mapping[str, float]) -> str:
        """By :meth:`diagnostics`, against what is reached by chance; the limits are ours. Of a step with numbers that are
        not finite, which the engine leaves out, nothing is said."""
        if not {"feature_std", "effective_rank", "teacher_entropy", "mean_entropy"} <= signs.keys():
            return ""
        heads = self.settings.heads
        most, width = math.log(heads.n_prototypes), heads.bottleneck_dim
        found = ""
        if signs["feature_std"] < COLLAPSED * width**-0.5:
            found = f"all images are one point (feature_std {signs['feature_std']:.1e})"
        elif signs["effective_rank"] < ONE_LINE:
            found = f"all images lie on a line (effective_rank {signs['effective_rank']:.2f})"
        elif signs["teacher_entropy"] > (1 - COLLAPSED) * most:
            found = f"the teacher tells no images apart (teacher_entropy {signs['teacher_entropy']:.2f} of {most:.2f})"
        elif signs["mean_entropy"] < COLLAPSED * most:
            found = f"one prototype takes all images (mean_entropy {signs['mean_entropy']:.2f} of {most:.2f})"
        way = "lower optim.base_lr, lengthen optim.warmup_epochs, or set losses.centering=sinkhorn_knopp"
        return found and f"{found}; {way}"


def among(neighbors: Sequence[Tensor], own: int, cls: Tensor) -> Tensor:
    """All micro-batches' tokens [G, B, D], the own ones replaced by ``cls`` [G, b, D] with a gradient."""
    return torch.cat([cls if i == own else tokens for i, tokens in enumerate(neighbors)], dim=1)


def masked_patches(tokens: Tokens, batch: Batch, kind: str) -> Tensor:
    """The masked patches' tokens, [M, D]. Picked by index: for a boolean mask the host would wait."""
    index: Tensor = getattr(batch.masks, f"{kind}_index")
    return tokens.patches.flatten(0, 1).index_select(0, index)
