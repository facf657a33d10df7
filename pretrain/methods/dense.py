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

from pretrain.alignment import alignment_loss
from pretrain.backbones.vit import ViewGroup
from pretrain.distributed import sum_over_ranks, world_size
from pretrain.heads import mlp
from pretrain.methods.method import Method, Neighbours
from pretrain.methods.start import build_started_backbone
from pretrain.views.batch import Batch
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
            network["head"] = mlp(backbone.embed_dim, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
        return network

    @torch.no_grad()
    def teacher_targets(self, batch: Batch) -> Targets:
        """The teacher's features in every overlap of a global and a local crop."""
        dense, views = self.config.dense, batch.views
        global_grid, local_grid = self._grid(batch.global_crops), self._grid(batch.local_crops)
        regions, are = overlaps(views, global_grid, local_grid, dense.min_overlap_patches)
        if dense.pairs == "parent":
            are = are & parents(views.n_global, are.shape[2], are.device)
        features = self._features("teacher", batch.global_crops, views.globals, views.boxes[:, : views.n_global], regions)
        return Targets(regions, are, features)

    @torch.no_grad()
    def statistics(self, parts: Sequence[Targets]) -> Tensor:
        """Overlaps of an average part and rank: of sums divided by it, the mean over parts and ranks is the mean over overlaps."""
        n = torch.stack([part.are.sum() for part in parts]).sum().to(parts[0].regions.dtype)
        return sum_over_ranks(n) / (len(parts) * world_size())

    def forward(
        self, batch: Batch, targets: Targets, statistics: Tensor, neighbours: Neighbours | None = None
    ) -> dict[str, Tensor]:
        """``loss``: the mean over all overlaps of the batch; one without any overlap has the loss 0."""
        dense, views = self.config.dense, batch.views
        regions = targets.regions.transpose(1, 2)  # [B, L, G, 4]
        features = self._features("student", batch.local_crops, views.locals, views.boxes[:, views.n_global :], regions)
        student = features.transpose(1, 2).flatten(0, 2)  # [B G L, n, d]
        losses = alignment_loss(dense.loss, student, targets.features.flatten(0, 2), dense.kernel, dense.bandwidth)
        loss = (losses * targets.are.flatten()).sum() / statistics.clamp(min=1e-6)
        return {"loss": loss, dense.loss: loss}

    def _features(self, network: str, crops: Tensor, views: tuple[Tensor, Tensor], boxes: Tensor, regions: Tensor) -> Tensor:
        """Head(ROI-Align(patches)) of some views: [B, V, K, n, d].

        Args:
            crops: [V * B, 3, S, S] view-major; views: their position boxes and flips.
            boxes: [B, V, 4] in image units; regions: [B, V, K, 4].
        """
        dense, modules = self.config.dense, getattr(self, network)
        position_boxes, flips = views
        (tokens,) = self.backbone_of(network).forward_views([ViewGroup(crops, position_boxes, flips)])
        boxes, regions = boxes.transpose(0, 1).flatten(0, 1), regions.transpose(0, 1)  # view-major, as the crops
        n_views, n_images = regions.shape[:2]
        grid = self._grid(crops)
        x = read_regions(tokens.patches, grid, boxes, flips, regions.flatten(0, 1), dense.region_grid, dense.region_samples)
        x = modules["head"](x) if "head" in modules else x
        return x.unflatten(0, (n_views, n_images)).transpose(0, 1)

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


def parents(n_global: int, n_local: int, device: torch.device) -> Tensor:
    """[G, L] bool: local crop l is drawn in global crop l mod G (``crops.local_rule``)."""
    return torch.arange(n_local, device=device) % n_global == torch.arange(n_global, device=device)[:, None]
