"""Intertwined content and position (paper 3; eq. 6), on DINOv2's losses. The DINOv2 baseline is this file with another config.

L = L_image + L_content + L_pos + lambda_koleo L_koleo. The teacher, an exponential moving average of the student, sees every patch
with its content and its crop-tied position; the student's global crops lose the content or the position of some patches.

A rank's batch may come in parts (gradient accumulation). What couples the samples of a batch then still holds for the whole: the
teacher goes first over all parts, so centers and Sinkhorn-Knopp see all of it, and KoLeo looks for neighbours among the [CLS]
tokens of all parts (:meth:`Intertwined.student_cls`).
"""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pretrain.backbones.vit import Tokens, ViewGroup, ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.heads import HeadOutput, ProjectionHead
from pretrain.losses import image_loss, koleo_loss, patch_loss, sinkhorn_center, teacher_entropies, updated_center
from pretrain.methods.method import Method, Neighbours
from pretrain.views.batch import Batch

PATCH_KINDS = ("content", "position")
Targets = dict[str, HeadOutput]  # head -> the teacher's output: ``image`` [G, B, d], ``content`` and ``position`` [M, d]
Centers = dict[str, Tensor]  # head -> [1, K]


class Intertwined(Method):
    """Teacher and student, each a backbone and a head a loss.

    Children: ``student`` and ``teacher`` (ModuleDicts with ``backbone``, ``image``, and ``content`` / ``position`` where that loss
    is on), and one buffer ``center_<head>`` [1, K] a head.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_kinds = [k for k in PATCH_KINDS if config.losses[k] > 0 and config.masks[f"{k}_share"] > 0]
        self.head_names = ["image", *self.patch_kinds]
        self.temperatures = (config.losses.student_temperature, config.losses.teacher_temperature)
        self.student = self._network(drop_path=config.backbone.drop_path)
        self.teacher = self._network(drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        backbone = self.backbone_of("student")
        backbone.checkpointing = config.step.checkpointing
        backbone.mask_token.requires_grad_("content" in self.patch_kinds)
        backbone.pos_mask_token.requires_grad_("position" in self.patch_kinds)
        self.n_rows = config.step.loss_rows
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

    @property
    def has_neighbours(self) -> bool:
        """With KoLeo, unless ``koleo_scope: local`` looks within a part, which costs nothing more."""
        return bool(self.config.losses.koleo > 0 and self.config.losses.koleo_scope == "global")

    @torch.no_grad()
    def teacher_targets(self, batch: Batch) -> Targets:
        """What the student has to predict: no mask, every crop with its own positions."""
        boxes, flips = batch.views.globals
        (tokens,) = self.backbone_of("teacher").forward_views([ViewGroup(batch.global_crops, boxes, flips)])
        heads = self.teacher
        targets = {kind: heads[kind](masked_patches(tokens, batch, kind)) for kind in self.patch_kinds}
        return {"image": heads["image"](tokens.cls.unflatten(0, (batch.views.n_global, -1))), **targets}

    @torch.no_grad()
    def statistics(self, parts: Sequence[Targets]) -> Centers:
        """The centers for a batch, given the targets of all its parts; the running ones move on for the next step (DINOv2)."""
        losses, centers = self.config.losses, {}
        for name in self.head_names:
            rows = torch.cat([part[name].bottleneck.flatten(0, -2) for part in parts])
            teacher = HeadOutput(rows, parts[0][name].prototypes)
            if losses.centering == "sinkhorn_knopp":
                centers[name] = sinkhorn_center(teacher, self.temperatures[1], losses.sinkhorn_iterations, self.n_rows)
                continue
            centers[name] = getattr(self, f"center_{name}")
            if self.training:
                # The batch's own logits count from the next step on.
                setattr(self, f"center_{name}", updated_center(centers[name], teacher, losses.center_momentum))
        return centers

    def student_tokens(self, batch: Batch) -> list[Tokens]:
        """One packed pass over the masked global crops and, where there are any, the local ones."""
        boxes, flips = batch.views.globals
        masks = {f"{kind}_mask": getattr(batch.masks, kind) for kind in self.patch_kinds}
        groups = [ViewGroup(batch.global_crops, boxes, flips, **masks)]
        if len(batch.local_crops):
            groups.append(ViewGroup(batch.local_crops, *batch.views.locals))
        return self.backbone_of("student").forward_views(groups)

    @torch.no_grad()
    def student_cls(self, batch: Batch) -> Tensor:
        """[CLS] of the masked global crops alone, [G, B, D]: what :meth:`forward` will give for the same random state."""
        boxes, flips = batch.views.globals
        masks = {f"{kind}_mask": getattr(batch.masks, kind) for kind in self.patch_kinds}
        (tokens,) = self.backbone_of("student").forward_views([ViewGroup(batch.global_crops, boxes, flips, **masks)])
        return tokens.cls.unflatten(0, (batch.views.n_global, -1))

    def forward(
        self, batch: Batch, targets: Targets, statistics: Centers, neighbours: Neighbours | None = None
    ) -> dict[str, Tensor]:
        """The weighted loss terms of a batch, or of a part of it, and their sum under ``loss``.

        Args:
            batch: what the student sees.
            targets: :meth:`teacher_targets` of the same images.
            statistics: :meth:`statistics` of the whole batch.
            neighbours: for a part of a batch: KoLeo is then that of the whole batch (its value the same for every part), times the
                number of parts, so that the mean of the parts' losses is the loss of the batch.
        """
        losses, student, n_rows = self.config.losses, self.student, self.n_rows
        tokens = self.student_tokens(batch)
        global_cls = tokens[0].cls.unflatten(0, (batch.views.n_global, -1))  # [G, B, D]
        cls = torch.cat([group.cls for group in tokens]).unflatten(0, (-1, batch.n_images))  # [G + L, B, D]
        image = image_loss(student["image"](cls), targets["image"], statistics["image"], self.temperatures, n_rows)
        terms = {"image": losses.image * image}
        for kind in self.patch_kinds:
            weights, n_crops = getattr(batch.masks, f"{kind}_weight"), len(tokens[0].cls)
            projection = student[kind](masked_patches(tokens[0], batch, kind))
            value = patch_loss(projection, targets[kind], statistics[kind], weights, n_crops, self.temperatures, n_rows)
            terms[kind] = losses[kind] * value
        if losses.koleo > 0:
            n_parts = len(neighbours.parts) if neighbours else 1
            everyone = neighbours.around(global_cls) if neighbours else global_cls
            # Apart for each global view: two crops of one image are no neighbours to push away.
            terms["koleo"] = losses.koleo * sum(koleo_loss(view, losses.koleo_scope) for view in everyone)
            loss = torch.stack([v for k, v in terms.items() if k != "koleo"]).sum() + n_parts * terms["koleo"]
            return {"loss": loss, **terms}
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    @torch.no_grad()
    def health(self, targets: Targets, statistics: Centers) -> dict[str, Tensor]:
        """Signs of collapse, for the logs: entropies of the teacher's [CLS] distributions and the spread of its bottleneck.

        ``teacher_entropy`` near ln K: all alike; ``mean_entropy`` near 0: one prototype takes all; ``feature_std`` near 0: all
        images are one point (1 / sqrt(d) is that of directions at random).
        """
        rows = targets["image"].bottleneck.flatten(0, -2)[:256]
        teacher = HeadOutput(rows, targets["image"].prototypes)
        entropy, mean_entropy = teacher_entropies(teacher, statistics["image"], self.temperatures[1])
        return {"teacher_entropy": entropy, "mean_entropy": mean_entropy, "feature_std": rows.std(0).mean()}


def masked_patches(tokens: Tokens, batch: Batch, kind: str) -> Tensor:
    """The tokens of the masked patches of a kind, [M, D]. Picked by index: for a boolean mask the host would wait."""
    index: Tensor = getattr(batch.masks, f"{kind}_index")
    return tokens.patches.flatten(0, 1).index_select(0, index)


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
    vit = build_backbone(backbone.name, weights=backbone.weights or None, **flags)
    if not vit.has_cls:
        raise UserError(f"backbone.weights: {backbone.weights} has no [CLS] token, which the image loss needs")
    return vit
