"""SimCLR (Chen et al. 2020, arXiv:2002.05709): two crops of an image find each other among those of a batch.

A method in one file, as a stranger would add it: one network, no teacher, InfoNCE over all ranks. Ours, where
the paper has a ResNet: a ViT's [CLS] token, GELU and no batch norm in the head, AdamW in place of LARS.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.backbones.vit import ViewGroup
from pretrain.distributed import gather_rows, rank
from pretrain.heads import mlp
from pretrain.methods.backbones import check_crops, new_backbone
from pretrain.methods.method import LossTerms, Method, Progress, TrainSettings
from pretrain.precision import at_least_float32
from pretrain.settings import Settings as Group
from pretrain.settings import setting
from pretrain.views import ColorSettings, CropSettings, ViewSettings
from pretrain.views.batch import Batch
from pretrain.views.boxes import Share
from pretrain.views.color import Probability


class Crops(CropSettings):
    """Two crops an image, drawn alike."""

    n_global: int = setting(2, "crops of an image", source="SimCLR, 2.1", ge=2, le=2)
    n_local: int = setting(0, "no other crops", source="SimCLR, 2.1", ge=0, le=0)
    global_scale: tuple[Share, Share] = setting((0.08, 1.0), "share of the image's area", source="SimCLR, A")


class Colors(ColorSettings):
    """The paper's augmentation, at strength 1."""

    jitter: tuple[float, float, float, float] = setting(
        (0.8, 0.8, 0.8, 0.2), "brightness, contrast, saturation, hue", source="SimCLR, A"
    )
    blur_p: tuple[Probability, Probability, Probability] = setting(
        (0.5, 0.5, 0.5), "of a blur", source="SimCLR, A"
    )
    solarize_p: tuple[Probability, Probability, Probability] = setting(
        (0.0, 0.0, 0.0), "none", source="SimCLR, A"
    )


class ContrastSettings(Group):
    """The head and the loss."""

    temperature: float = setting(
        0.1, "of the softmax over the other crops", source="SimCLR, Table 5", ge=1e-6
    )
    hidden_dim: int = setting(
        2048, "width of the head's hidden layer", source="SimCLR, 2.1: ResNet-50's", ge=1
    )
    out_dim: int = setting(128, "width of the embedding", source="SimCLR, 2.1", ge=1)


class SimCLR(Method):
    """Children: ``student`` with ``backbone`` and ``head``."""

    class Settings(TrainSettings):
        """The engine's, with the paper's crops and colors."""

        crops: Crops = Crops()
        color: Colors = Colors()
        contrast: ContrastSettings = ContrastSettings()

        def view_settings(self) -> ViewSettings:
            """Two global crops without masks; positions are a plain learned grid."""
            return ViewSettings(self.crops, self.color, None, None, self.backbone.patch_size)

        @model_validator(mode="after")
        def _check(self) -> Self:
            check_crops(self.crops, self.backbone.patch_size)
            return self

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        own = settings.contrast
        backbone = new_backbone(settings, settings.backbone.drop_path)
        head = mlp(backbone.embed_dim, own.hidden_dim, own.out_dim, 2)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of both crops of each image, [2, B, d]."""
        boxes_and_flips = batch.views.globals
        (tokens,) = self.backbone.forward_views([ViewGroup(batch.global_crops, *boxes_and_flips)])
        embeddings: Tensor = self.student["head"](tokens.cls)
        return embeddings.unflatten(0, (2, -1))

    @torch.no_grad()
    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Tensor]:
        """The embeddings of each micro-batch, among which the others look; none are needed of one alone."""
        found = []
        for i, batch in enumerate(micro_batches if len(micro_batches) > 1 else ()):
            progress.seed_micro_batch(i)
            found.append(self.embed(batch))
        return found

    def loss(self, micro_batch: Batch, prepared: list[Tensor], i: int) -> LossTerms:
        """InfoNCE of the whole batch, whose gradient goes through micro-batch ``i``. It counts once a
        micro-batch: the mean of their gradients is the batch's."""
        own = self.embed(micro_batch)
        everyone = [own if j == i else others for j, others in enumerate(prepared)] or [own]
        loss = info_nce(torch.cat(everyone, 1), self.settings.contrast.temperature)
        return LossTerms(len(everyone) * loss, {"info_nce": loss})

    @torch.no_grad()
    def diagnostics(self, micro_batches: Sequence[Batch], prepared: Any) -> dict[str, Tensor]:
        """``feature_std``: the spread of the embeddings' directions; near 0 all images are one point."""
        rows = F.normalize(at_least_float32(self.embed(micro_batches[0])).flatten(0, 1), dim=-1)
        return {"feature_std": rows.std(0).mean()}


def info_nce(embeddings: Tensor, temperature: float) -> Tensor:
    """NT-Xent (eq. 1): of all other crops of all ranks, a crop's partner should be the most alike.

    Args:
        embeddings: [2, B, d], both crops of this rank's images.
        temperature: of the softmax.

    Returns:
        the mean over this rank's 2 B crops, a scalar; its mean over ranks is that over all crops.
    """
    n = embeddings.shape[1]
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = F.normalize(at_least_float32(embeddings).flatten(0, 1), dim=-1)  # [2 B, d]
        logits = rows @ gather_rows(rows).T / temperature  # [2 B, W * 2 B]
        own = torch.arange(2 * n, device=rows.device)
        first = rank() * 2 * n
        itself = F.one_hot(first + own, logits.shape[1]).bool()
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), first + (own + n) % (2 * n))
