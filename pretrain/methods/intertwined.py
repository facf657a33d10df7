"""Intertwined content and position (paper 3; eq. 6), on DINOv2's losses. The DINOv2 baseline is this file with another config.

L = L_image + L_content + L_pos + lambda_koleo L_koleo. The teacher, an exponential moving average of the student, sees every patch
with its content and its crop-tied position; the student's global crops lose the content or the position of some patches.
"""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.heads import ProjectionHead
from pretrain.losses import (
    image_loss,
    koleo_loss,
    mask_weights,
    patch_loss,
    sinkhorn_knopp,
    softmax_center,
    updated_center,
)
from pretrain.views.batch import Batch

PATCH_KINDS = ("content", "position")


@dataclass(frozen=True)
class Targets:
    """The teacher's distributions: [CLS] of each global view [G, B, K], and the masked patches of each kind [M, K]."""

    image: Tensor
    patches: dict[str, Tensor]


class Intertwined(nn.Module):
    """Teacher and student, each a backbone and a head a loss.

    Children: ``student`` and ``teacher`` (ModuleDicts with ``backbone``, ``image``, and ``content`` / ``position`` where that loss
    is on), and one buffer ``center_<head>`` [1, K] a head.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_kinds = [k for k in PATCH_KINDS if config.losses[k] > 0 and config.masks[f"{k}_share"] > 0]
        self.head_names = ["image", *self.patch_kinds]
        self.student = self._network(drop_path=config.backbone.drop_path)
        self.teacher = self._network(drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        backbone = self.backbone_of("student")
        backbone.mask_token.requires_grad_("content" in self.patch_kinds)
        backbone.pos_mask_token.requires_grad_("position" in self.patch_kinds)
        for name in self.head_names:
            self.register_buffer(f"center_{name}", torch.zeros(1, config.heads.n_prototypes))

    def _network(self, drop_path: float) -> nn.ModuleDict:
        """A backbone and its heads."""
        backbone = build_student_backbone(self.config, drop_path)
        heads = self.config.heads
        return nn.ModuleDict(
            {"backbone": backbone}
            | {
                name: ProjectionHead(backbone.embed_dim, heads.n_prototypes, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
                for name in self.head_names
            }
        )

    def backbone_of(self, network: str) -> ViT:
        """The backbone of ``student`` or ``teacher``."""
        backbone = getattr(self, network)["backbone"]
        assert isinstance(backbone, ViT)
        return backbone

    def distribution(self, head: str, logits: Tensor) -> Tensor:
        """The teacher's distribution of a head: [M, K] logits -> [M, K]."""
        losses = self.config.losses
        if losses.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, losses.teacher_temperature, losses.sinkhorn_iterations)
        center: Tensor = getattr(self, f"center_{head}")
        probabilities = softmax_center(logits, center, losses.teacher_temperature)
        if self.training:
            # The batch's own logits count from the next step on (DINOv2).
            setattr(self, f"center_{head}", updated_center(center, logits, losses.center_momentum))
        return probabilities

    @torch.no_grad()
    def teacher_targets(self, batch: Batch) -> Targets:
        """What the student has to predict: no mask, every crop with its own positions."""
        boxes, flips = batch.views.globals
        tokens = self.teacher["backbone"](batch.global_crops, boxes, flips)
        cls = self.distribution("image", self.teacher["image"](tokens.cls))  # [G * B, K]
        patches = {}
        for kind in self.patch_kinds:
            masked = tokens.patches[getattr(batch.masks, kind)]  # [M, D]
            patches[kind] = self.distribution(kind, self.teacher[kind](masked))
        return Targets(cls.unflatten(0, (batch.views.n_global, -1)), patches)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted loss terms of a batch, and their sum under ``loss``."""
        targets = self.teacher_targets(batch)
        losses, student = self.config.losses, self.student
        boxes, flips = batch.views.globals
        masks = {f"{kind}_mask": getattr(batch.masks, kind) for kind in self.patch_kinds}
        tokens = student["backbone"](batch.global_crops, boxes, flips, **masks)
        n_global = batch.views.n_global
        global_cls = tokens.cls.unflatten(0, (n_global, -1))  # [G, B, D]

        terms = {"image": losses.image * self._image_term(batch, tokens.cls, targets)}
        for kind in self.patch_kinds:
            mask = getattr(batch.masks, kind)  # [G * B, N]
            logits = student[kind](tokens.patches[mask])  # [M, K]
            weights = mask_weights(mask, targets.image.dtype)
            value = patch_loss(logits, targets.patches[kind], weights, len(mask), losses.student_temperature)
            terms[kind] = losses[kind] * value
        if losses.koleo > 0:
            # Apart for each global view: two crops of one image are no neighbours to push away.
            terms["koleo"] = losses.koleo * sum(koleo_loss(cls, losses.koleo_scope) for cls in global_cls)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _image_term(self, batch: Batch, global_cls: Tensor, targets: Targets) -> Tensor:
        """L_image of a batch; ``global_cls`` is [G * B, D]."""
        n_images, n_global = batch.n_images, batch.views.n_global
        cls = [global_cls]
        if len(batch.local_crops):
            boxes, flips = batch.views.locals
            cls.append(self.student["backbone"](batch.local_crops, boxes, flips).cls)
        logits = self.student["image"](torch.cat(cls)).unflatten(0, (-1, n_images))  # [G + L, B, K]
        return image_loss(logits[:n_global], logits[n_global:], targets.image, self.config.losses.student_temperature)


def build_student_backbone(config: DictConfig, drop_path: float) -> ViT:
    """The backbone that a config asks for, with the mask tokens of pre-training."""
    backbone, positions = config.backbone, config.positions
    flags = dict(
        patch_size=backbone.patch_size,
        layerscale=backbone.layerscale or None,
        drop_path=drop_path,
        attention=backbone.attention,
        pos_encoding=positions.encoding,
        pos_grid=positions.grid,
        pos_interpolation=positions.interpolation,
        mask_tokens=True,
    )
    for key in ("depth", "n_registers"):
        if backbone[key]:  # 0: the name's own
            flags[key] = backbone[key]
    return build_backbone(backbone.name, weights=backbone.weights or None, **flags)
