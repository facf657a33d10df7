"""Dense post-training of a backbone that is already good: PaKA, and Gram anchoring beside it on the same data.

PaKA (patch-level kernel alignment, arXiv:2509.05606): the teacher, a moving average of the student, sees global crops without any
augmentation; the student sees local ones. Where two crops overlap, both patch maps are read on one grid of bins, and the loss is
1 - CKA of the two sets of features. Gram anchoring (DINOv3) compares cosines instead, with a teacher that does not move
(``optim.teacher_momentum=1``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pretrain.backbones.vit import ViewGroup
from pretrain.distributed import sum_over_ranks, world_size
from pretrain.heads import mlp
from pretrain.losses import alignment_loss
from pretrain.methods.method import Method, Neighbours
from pretrain.methods.start import build_started_backbone
from pretrain.views.batch import Batch
from pretrain.views.boxes import Views, parents
from pretrain.views.regions import overlaps, read_regions


class Targets(NamedTuple):
    """What the teacher saw in the overlaps of a batch."""

    regions: Tensor  # [B, G, L, 4] in image units
    are: Tensor  # [B, G, L] bool: the crops overlap enough
    features: Tensor  # [B, G, L, n, d]


class Dense(Method):
    """Children: ``student`` and ``teacher``, each ``backbone`` and, with ``dense.head``, ``head``."""

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        self.student = self._network(config.backbone.drop_path)
        self.teacher = self._network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.backbone_of("student").checkpointing = config.step.checkpointing

    def _network(self, drop_path: float) -> nn.ModuleDict:
        backbone, heads = build_started_backbone(self.config, drop_path), self.config.heads
        network = nn.ModuleDict({"backbone": backbone})
        if self.config.dense.head:
            head = mlp(backbone.embed_dim, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
            # Centred kernels do not see a common shift: the gradient would be rounding alone, which AdamW makes a whole step of.
            head.get_parameter(f"{len(head) - 1}.bias").requires_grad_(self.config.dense.loss == "gram")
            network["head"] = head
        return network

    @torch.no_grad()
    def teacher_targets(self, batch: Batch) -> Targets:
        """The teacher's features in every overlap of a global and a local crop."""
        regions, are = self._regions(batch)
        features = self._features("teacher", batch.global_crops, batch.views, slice(0, batch.views.n_global), regions)
        return Targets(regions, are, features)

    @torch.no_grad()
    def statistics(self, parts: Sequence[Targets]) -> Tensor:
        """Overlaps of an average part and rank: of sums divided by it, the mean over parts and ranks is the mean over overlaps."""
        n = torch.stack([part.are.sum() for part in parts]).sum()
        n = n.to(torch.promote_types(parts[0].features.dtype, torch.float32))
        return sum_over_ranks(n) / (len(parts) * world_size())

    def forward(
        self, batch: Batch, targets: Targets, statistics: Tensor, neighbours: Neighbours | None = None
    ) -> dict[str, Tensor]:
        """``loss``, and the same by its own name: the mean over all overlaps of the batch, scalars; without any overlap 0."""
        dense, local = self.config.dense, slice(batch.views.n_global, None)
        regions = targets.regions.transpose(1, 2)  # [B, L, G, 4]
        features = self._features("student", batch.local_crops, batch.views, local, regions)
        student = features.transpose(1, 2).flatten(0, 2)  # [B G L, n, d]
        losses = alignment_loss(dense.loss, student, targets.features.flatten(0, 2), dense.kernel, dense.bandwidth)
        loss = (losses * targets.are.flatten()).sum() / statistics.clamp(min=1e-6)
        return {"loss": loss, dense.loss: loss}

    def _regions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where each global and each local crop of an image are compared, [B, G, L, 4], and whether they are, [B, G, L]."""
        views, dense = batch.views, self.config.dense
        n_local = views.boxes.shape[1] - views.n_global
        device = views.boxes.device
        own = parents(views.n_global, n_local, device) == torch.arange(views.n_global, device=device)[:, None]  # [G, L]
        if self.config.crops.local_rule == "same":  # the crop itself: with a bin a patch and one point a bin, its very patches
            whole = views.boxes[:, None, views.n_global :].expand(-1, views.n_global, -1, -1)
            return whole, own.expand(len(whole), -1, -1)
        regions, are = overlaps(views, self._grid(batch.global_crops), self._grid(batch.local_crops), dense.min_overlap_patches)
        return regions, are & own if dense.pairs == "parent" else are

    def _features(self, network: str, crops: Tensor, views: Views, which: slice, regions: Tensor) -> Tensor:
        """Head(ROI-Align(patches)) of some views: [B, V, K, n, d].

        Args:
            crops: [V * B, 3, S, S] of ``views.boxes[:, which]``, view-major.
            regions: [B, V, K, 4] in image units, of each of them.
        """
        dense, modules, grid = self.config.dense, getattr(self, network), self._grid(crops)
        (tokens,) = self.backbone_of(network).forward_views([ViewGroup(crops, *views.of(which))])
        boxes, flips, of_views = (x.transpose(0, 1).flatten(0, 1) for x in (views.boxes[:, which], views.flips[:, which], regions))
        x = read_regions(tokens.patches, grid, boxes, flips, of_views, dense.region_grid, dense.region_samples)
        x = modules["head"](x) if "head" in modules else x  # [V * B, K, n, d]
        return x.unflatten(0, (-1, len(views.boxes))).transpose(0, 1)

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        patch_size = self.backbone_of("student").patch_size
        return crops.shape[2] // patch_size, crops.shape[3] // patch_size

    @torch.no_grad()
    def health(self, targets: Targets, statistics: Tensor) -> dict[str, Tensor]:
        """``overlaps``: the share of the pairs of crops that overlap; ``feature_std``: the spread of the teacher's features in a
        region, relative to their size (near 0: all patches are one point)."""
        x = targets.features.flatten(0, 2)[:256].float()
        spread = (x - x.mean(1, keepdim=True)).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-12)
        return {"overlaps": targets.are.float().mean(), "feature_std": spread}
