"""Post-training of a backbone that is already good: PaKA, and Gram anchoring beside it on the same data.

PaKA (patch-level kernel alignment, arXiv:2509.05606): the teacher, a moving average of the student, sees
global crops without any augmentation; the student sees local ones. Where two crops overlap, both patch maps
are read on one grid of bins, and the loss is 1 - CKA of the two sets of features. Gram anchoring (DINOv3)
compares cosines instead, with a teacher that does not move (``optim.teacher_momentum=1``).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.backbones.vit import ViewGroup
from pretrain.distributed import sum_over_ranks, world_size
from pretrain.errors import UserError
from pretrain.heads import MLPSettings, mlp
from pretrain.losses import alignment_loss
from pretrain.methods.backbones import check_crops, started_backbone
from pretrain.methods.method import EMATeacher, LossTerms, Progress, TeacherSettings, recipe_setting
from pretrain.precision import at_least_float32
from pretrain.settings import Settings as Group
from pretrain.settings import setting
from pretrain.views import ColorSettings, CropSettings, PositionSettings, ViewSettings
from pretrain.views.batch import Batch
from pretrain.views.boxes import Views, parents
from pretrain.views.regions import overlaps, read_regions


class AlignmentSettings(Group):
    """Pairs of a global crop (teacher) and a local one (student), and how they compare (METHOD.md 10)."""

    loss: Literal["cka", "frobenius", "gram"] = setting(
        "cka",
        "1 - CKA | frobenius (its variant) | gram (DINOv3's Gram anchoring; its teacher stands still: optim)",
        source="PaKA",
    )
    kernel: Literal["linear", "rbf"] = setting("linear", "of cka and frobenius", source="PaKA")
    bandwidth: float = setting(1.0, "of rbf, in root mean square distances", ge=1e-6)
    pairs: Literal["all", "parent"] = setting(
        "all",
        "all pairs that overlap | parent: a local crop and the global one that it lies in (local_rule=same: these)",
    )
    region_grid: int = setting(
        7,
        "bins a side that the overlap of two crops is read at (local_rule=same: the whole crop)",
        source="NeCo",
        ge=2,
        le=64,
    )
    region_samples: int = setting(2, "points a bin and side", ge=1, le=16)
    min_overlap_patches: float = setting(
        2.0, "pairs whose overlap is narrower in either crop are left out", ge=1e-6
    )
    head: bool = setting(
        True,
        "the MLP of heads before the loss | false: the patches themselves (Gram anchoring)",
        source="PaKA",
    )


class Targets(NamedTuple):
    """What the teacher saw in the overlaps of a batch."""

    regions: Tensor  # [B, G, L, 4] in image units
    are: Tensor  # [B, G, L] bool: the crops overlap enough
    features: Tensor  # [B, G, L, n, d]


class Prepared(NamedTuple):
    """What a batch has in common."""

    targets: list[Targets]  # of each micro-batch
    n_overlaps: Tensor  # of an average micro-batch and rank


class PaKA(EMATeacher):
    """Children: ``student`` and ``teacher``, each ``backbone`` and, with ``alignment.head``, ``head``."""

    stage = "posttrain"

    class Settings(TeacherSettings):
        """Defaults of the engine; ``base: paka-25ep`` and other recipes say what a post-training changes."""

        recipe: str = recipe_setting("paka-25ep")
        crops: CropSettings = CropSettings()
        positions: PositionSettings = PositionSettings()
        color: ColorSettings = ColorSettings()
        heads: MLPSettings = MLPSettings()
        alignment: AlignmentSettings = AlignmentSettings()

        def view_settings(self) -> ViewSettings:
            """Crops without masks. A file may hold a field, and be trained as it is used: read whole."""
            tied = self.positions.follows_crops
            return ViewSettings(self.crops, self.color, self.positions, None, self.backbone.patch_size, tied)

        @model_validator(mode="after")
        def _check(self) -> Self:
            """A start, crops that can overlap, a network that moves."""
            crops, alignment, optim = self.crops, self.alignment, self.optim
            patch_size = self.backbone.patch_size
            check_crops(crops, patch_size, least_globals=2)
            if not self.backbone.weights:
                start = "a post-training starts from a backbone; set backbone.weights=FILE"
                raise UserError(f"backbone.weights is empty, but {start}")
            if not crops.n_local:
                seen = "the student of method=paka sees local crops; set it to 1 or more"
                raise UserError(f"crops.n_local=0, but {seen}")
            for name in ("global_px", "local_px"):
                n = getattr(crops, name) // patch_size
                if crops.local_rule != "same" and alignment.min_overlap_patches >= n - 1:
                    least = f"alignment.min_overlap_patches={alignment.min_overlap_patches:g}"
                    span = f"the centers of crops.{name}={getattr(crops, name)} span {n - 1} patches"
                    raise UserError(f"{least} leaves no overlap: {span}; lower it")
            stands_still = optim.teacher_momentum == optim.teacher_momentum_end == 1
            if stands_still and self.run.export_network == "teacher":
                still = "with optim.teacher_momentum=1 it stays what backbone.weights is"
                raise UserError(f"run.export_network=teacher, but {still}; set run.export_network=student")
            n = min(crops.global_px, crops.local_px) // patch_size
            n_points = alignment.region_grid * alignment.region_samples
            if crops.local_rule == "same" and crops.local_px != crops.global_px and n_points > n:
                points = f"alignment.region_grid * alignment.region_samples={n_points} points"
                rule = "of a whole crop (crops.local_rule=same)"
                warnings.warn(f"config: {points} {rule} repeat the border of {n} patches", stacklevel=2)
            return self

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.make_networks()

    def network(self, drop_path: float) -> nn.ModuleDict:
        """The backbone of ``backbone.weights``, and PaKA's head."""
        settings, heads = self.settings, self.settings.heads
        backbone = started_backbone(settings, drop_path, settings.positions)
        network = nn.ModuleDict({"backbone": backbone})
        if settings.alignment.head:
            head = mlp(backbone.embed_dim, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
            # Centered kernels see no common shift: its gradient is rounding, and AdamW's step whole.
            head.get_parameter(f"{len(head) - 1}.bias").requires_grad_(settings.alignment.loss == "gram")
            network["head"] = head
        return network

    @torch.no_grad()
    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Prepared:
        """The teacher's features, and the overlaps of an average micro-batch and rank: of sums divided by
        it, the mean over micro-batches and ranks is the mean over overlaps."""
        targets = [self.teacher_targets(batch) for batch in micro_batches]
        n = torch.stack([target.are.sum() for target in targets]).sum()
        n = n.to(at_least_float32(targets[0].features).dtype)
        return Prepared(targets, sum_over_ranks(n) / (len(targets) * world_size()))

    def teacher_targets(self, batch: Batch) -> Targets:
        """The teacher's features in every overlap of a global and a local crop."""
        regions, are = self._regions(batch)
        which = slice(0, batch.views.n_global)
        return Targets(
            regions, are, self._features(self.teacher, batch.global_crops, batch.views, which, regions)
        )

    def loss(self, micro_batch: Batch, prepared: Prepared, i: int) -> LossTerms:
        """The mean over all overlaps of the batch; without any overlap 0."""
        batch, targets, alignment = micro_batch, prepared.targets[i], self.settings.alignment
        regions = targets.regions.transpose(1, 2)  # [B, L, G, 4]
        which = slice(batch.views.n_global, None)
        features = self._features(self.student, batch.local_crops, batch.views, which, regions)
        student = features.transpose(1, 2).flatten(0, 2)  # [B G L, n, d]
        kernel = alignment.kernel, alignment.bandwidth
        losses = alignment_loss(alignment.loss, student, targets.features.flatten(0, 2), *kernel)
        loss = (losses * targets.are.flatten()).sum() / prepared.n_overlaps.clamp(min=1e-6)
        return LossTerms(loss, {alignment.loss: loss})

    def _regions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where each global and local crop of an image are compared, [B, G, L, 4]; if at all, [B, G, L]."""
        views, alignment, n_global = batch.views, self.settings.alignment, batch.views.n_global
        n_local, device = views.boxes.shape[1] - n_global, views.boxes.device
        own = parents(n_global, n_local, device) == torch.arange(n_global, device=device)[:, None]  # [G, L]
        # the crop itself: with a bin a patch and one point a bin, its very patches
        if self.settings.crops.local_rule == "same":
            whole = views.boxes[:, None, n_global:].expand(-1, n_global, -1, -1)
            return whole, own.expand(len(whole), -1, -1)
        grids = self._grid(batch.global_crops), self._grid(batch.local_crops)
        regions, are = overlaps(views, *grids, alignment.min_overlap_patches)
        return regions, are & own if alignment.pairs == "parent" else are

    def _features(self, network: Any, crops: Tensor, views: Views, which: slice, regions: Tensor) -> Tensor:
        """Head(ROI-Align(patches)) of some views: [B, V, K, n, d].

        Args:
            crops: [V * B, 3, S, S] of ``views.boxes[:, which]``, view-major.
            regions: [B, V, K, 4] in image units, of each of them.
        """
        alignment, grid = self.settings.alignment, self._grid(crops)
        (tokens,) = network["backbone"].forward_views([ViewGroup(crops, *views.of(which))])
        of_each = views.boxes[:, which], views.flips[:, which], regions
        boxes, flips, of_views = (x.transpose(0, 1).flatten(0, 1) for x in of_each)
        bins = alignment.region_grid, alignment.region_samples
        x = read_regions(tokens.patches, grid, boxes, flips, of_views, *bins)
        x = network["head"](x) if "head" in network else x  # [V * B, K, n, d]
        return x.unflatten(0, (-1, len(views.boxes))).transpose(0, 1)

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        patch_size = self.backbone.patch_size
        return crops.shape[2] // patch_size, crops.shape[3] // patch_size

    @torch.no_grad()
    def diagnostics(self, micro_batches: Sequence[Batch], prepared: Prepared) -> dict[str, Tensor]:
        """``overlaps``: the share of the pairs of crops that overlap; ``feature_std``: the spread of the
        teacher's features in a region, relative to their size (near 0: all patches are one point)."""
        targets = prepared.targets[0]
        x = targets.features.flatten(0, 2)[:256].float()
        spread = (x - x.mean(1, keepdim=True)).square().mean().sqrt()
        relative = spread / x.square().mean().sqrt().clamp(min=1e-12)
        return {"overlaps": targets.are.float().mean(), "feature_std": relative}
