"""MAE (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"): the pixels of masked patches from the others.

The encoder sees the visible patches alone. A small decoder sees their tokens, a mask token for each other patch and
the positions of all, and predicts the pixels of the masked ones. There is no teacher. Positions are fixed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbones.block import Block
from pretrain.backbones.checkpointing import run_block
from pretrain.backbones.position import sincos_table
from pretrain.backbones.vit import ViT


class Decoder(nn.Module):
    """From the tokens of the visible patches to the pixels of the masked ones (MAE, section 3 and A.1).

    Attention knows no order: visible patches come first, and positions say where each one is.

    Args:
        in_dim: width of the encoder.
        side: patches along a side of a crop.
        n_values: of a patch, 3 p^2.
        width, depth, num_heads: of the decoder.
    """

    positions: Tensor  # [N, W]

    def __init__(self, in_dim: int, side: int, n_values: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.checkpointing = "none"  # as the ViT's
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_table(side, width).float(), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads, 4.0, None, 0.0, 1e-6, "erf", "sdpa") for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, n_values)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels of the masked patches.

        Args:
            tokens: [B, 1 + n, D], [CLS] and the visible patches.
            order: [B, N] int64, all patches: the n visible ones as in ``tokens``, then the masked ones.

        Returns:
            [B, N - n, 3 p^2], in the order of the masked ones.
        """
        x = self.embed(tokens)  # [B, 1 + n, W]
        n_masked = order.shape[1] - x.shape[1] + 1
        x = torch.cat([x, self.mask_token.expand(len(x), n_masked, -1)], 1)
        x = x + F.pad(self.positions[order], (0, 0, 1, 0))  # [CLS] has the position zero
        shapes = [(x.shape[0], x.shape[1])]
        rows = x.flatten(0, 1)  # packed, as checkpointed blocks take them
        for block in self.blocks:
            rows = run_block(block, rows, shapes, None, self.checkpointing)
        masked = rows.unflatten(0, shapes[0])[:, -n_masked:]
        return self.pixels(self.norm(masked))  # type: ignore[no-any-return]


def initialize(backbone: ViT, decoder: Decoder) -> None:
    """MAE's code: Xavier's uniform weights in linear layers and the patch projection; fixed positions of the encoder."""
    for module in (*backbone.modules(), *decoder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))
    for token in (backbone.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=0.02)
    fix_positions(backbone)


def fix_positions(backbone: ViT) -> None:
    """Sines and cosines, zero for [CLS], in the learned grid, which does not learn: all that reads the file knows it."""
    table = sincos_table(backbone.pos_grid, backbone.embed_dim)
    backbone.pos_embed.data = F.pad(table, (0, 0, 1, 0)).unsqueeze(0).to(backbone.pos_embed)
    backbone.pos_embed.requires_grad_(False)
