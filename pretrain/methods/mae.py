"""Masked autoencoder (MAE, He et al. 2022, arXiv:2111.06377): pixels of masked patches from the visible ones.

The encoder sees the visible patches alone. A small decoder sees their tokens, a mask token for each other
patch and the positions of all, and predicts the pixels of the masked ones. No teacher; positions are fixed.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.backbones.attention import choose_attention
from pretrain.backbones.block import Block, run_block
from pretrain.backbones.position import sincos_table
from pretrain.backbones.vit import ViewGroup, ViT
from pretrain.errors import UserError
from pretrain.losses import masked_pixel_loss
from pretrain.methods.backbones import check_crops, new_backbone
from pretrain.methods.method import LossTerms, Method, TrainSettings, recipe_setting
from pretrain.settings import Settings as Group
from pretrain.settings import setting
from pretrain.views import ColorSettings, CropSettings, MaskSettings, PositionSettings, ViewSettings
from pretrain.views.batch import Batch
from pretrain.views.color import NO_COLOR


class MAESettings(Group):
    """What is masked, what is predicted there, and the decoder, which only pre-training needs."""

    mask_ratio: float = setting(0.75, "share of masked patches, at most", source="MAE, Fig. 5", gt=0, lt=1)
    normalize_pixels: bool = setting(True, "targets: mean 0, variance 1 in a patch", source="MAE, Table 1d")
    decoder_width: int = setting(512, "width of the decoder", source="MAE, Table 1b", ge=4, multiple_of=4)
    decoder_depth: int = setting(8, "blocks of the decoder", source="MAE, Table 1a", ge=1)
    decoder_heads: int = setting(16, "attention heads of the decoder", source="MAE's code", ge=1)


class Decoder(nn.Module):
    """From the tokens of the visible patches to the pixels of the masked ones (MAE, section 3 and A.1).

    Attention knows no order: visible patches come first, and positions say where each one is.
    """

    positions: Tensor  # [N, W], fixed

    def __init__(self, settings: MAESettings, encoder: ViT, side: int, attention: str) -> None:
        """For crops of ``side`` x ``side`` patches; ``attention`` is the backbone's setting."""
        super().__init__()
        width, heads, depth = settings.decoder_width, settings.decoder_heads, settings.decoder_depth
        sizes, backend = (width, heads, 4.0), choose_attention(attention)
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(*sizes, None, 0.0, 1e-6, "erf", backend) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, 3 * encoder.patch_size**2)
        self.register_buffer("positions", sincos_table(side, width).float(), persistent=False)
        self.checkpointing = encoder.checkpointing
        initialize(self)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels of the masked patches, [B, N - n, 3 p^2].

        Args:
            tokens: [B, 1 + n, D], [CLS] and the visible patches.
            order: [B, N] int64, all patches: the n visible ones as in ``tokens``, then the masked ones.
        """
        n_masked = order.shape[1] - tokens.shape[1] + 1
        x = torch.cat([self.embed(tokens), self.mask_token.expand(len(tokens), n_masked, -1)], 1)
        x = x + F.pad(self.positions[order], (0, 0, 1, 0))  # [B, 1 + N, W]; the position of [CLS] is zero
        shape = (x.shape[0], x.shape[1])
        x = x.flatten(0, 1)  # packed, as checkpointed blocks take it
        for block in self.blocks:
            x = run_block(block, x, [shape], None, self.checkpointing)
        return self.pixels(self.norm(x.unflatten(0, shape)[:, -n_masked:]))  # type: ignore[no-any-return]


def initialize(network: nn.Module) -> None:
    """As MAE's code: Xavier's uniform weights, the patch projection's too; tokens of std 0.02."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for name, token in network.named_parameters():
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(token, std=0.02)


class MAE(Method):
    """Children: ``student`` with ``backbone`` and ``decoder``."""

    class Settings(TrainSettings):
        """One crop an image and its masks; the recipe says the rest."""

        recipe: str = recipe_setting("mae-800ep")
        crops: CropSettings = CropSettings()
        mae: MAESettings = MAESettings()

        def view_settings(self) -> ViewSettings:
            """Global crops in their own colors; each loses as many patches, at random."""
            color, ratio = ColorSettings.model_validate(NO_COLOR), (self.mae.mask_ratio, self.mae.mask_ratio)
            masks = MaskSettings(content_share=1.0, position_share=0.0, ratio=ratio, content_shape="random")
            return ViewSettings(self.crops, color, None, masks, self.backbone.patch_size)

        @model_validator(mode="after")
        def _check(self) -> Self:
            mae, n_local, (side, _) = self.mae, self.crops.n_local, self.view_settings().grid
            check_crops(self.crops, self.backbone.patch_size)
            if n_local:
                warnings.warn(f"config: crops.n_local={n_local} has no effect with method=mae", stacklevel=2)
            if mae.decoder_width % mae.decoder_heads:
                raise UserError(f"mae.decoder_heads={mae.decoder_heads} should divide mae.decoder_width")
            if int(mae.mask_ratio * side**2) < 1:
                raise UserError(f"mae.mask_ratio={mae.mask_ratio} masks none of {side**2} patches; raise it")
            return self

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        own, (side, _) = settings.backbone, settings.view_settings().grid
        positions = PositionSettings(encoding="standard", grid=side, interpolation="bicubic", augment=False)
        encoder = new_backbone(settings, own.drop_path, positions)
        if not own.weights:
            initialize(encoder)
            table = sincos_table(side, encoder.embed_dim).to(encoder.pos_embed)
            encoder.pos_embed.data = F.pad(table, (0, 0, 1, 0)).unsqueeze(0)  # zero for [CLS]
        encoder.pos_embed.requires_grad_(False)  # a learned grid that does not learn: every reader knows it
        decoder = Decoder(settings.mae, encoder, side, own.attention)
        self.student = nn.ModuleDict({"backbone": encoder, "decoder": decoder})

    def loss(self, micro_batch: Batch, prepared: Any, i: int) -> LossTerms:
        """The error of the masked patches' pixels."""
        masks, crops, mae = micro_batch.masks, micro_batch.global_crops, self.settings.mae
        assert masks is not None
        n_masked = len(masks.content_index) // len(crops)  # of every crop
        order = masks.content.byte().argsort(dim=1, stable=True)  # [B, N], visible patches first
        (tokens,) = self.backbone.forward_views([ViewGroup(crops, visible=order[:, :-n_masked])])
        predictions = self.student["decoder"](torch.cat([tokens.cls.unsqueeze(1), tokens.patches], 1), order)
        masked, patch_size = order[:, -n_masked:], self.backbone.patch_size
        loss = masked_pixel_loss(predictions, crops, masked, patch_size, mae.normalize_pixels)
        return LossTerms(loss, {"pixels": loss})
