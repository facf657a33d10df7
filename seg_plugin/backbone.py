"""The registry's ViT as a backbone of MMSegmentation, ``PosfieldViT`` (our own name: mmseg has a ``VisionTransformer`` too)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from pretrain.backbones.vit import ViewGroup
from pretrain.build import build_for_fine_tuning
from pretrain.errors import UserError

OF_THE_RUN = ("freeze", "checkpointing")  # arguments of PosfieldViT that are none of the ViT's


@MODELS.register_module()
class PosfieldViT(BaseModule):
    """A ViT that gives its last layer's normed patch tokens as one map.

    Args:
        name: registry name, ``vit_{tiny,small,base,large}_patch16``, ``..._reg4``.
        weights: any checkpoint that ``build_for_fine_tuning`` reads. It is read here, in the constructor, and stays as it was read:
            mmengine's ``init_weights`` touches nothing in this module.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``, mmengine's way to say ``weights=FILE``.
        freeze: nothing in the ViT learns, and no path is dropped; its features are computed without a graph.
        checkpointing: compute the blocks again in the backward pass: less memory, the same numbers.
        model_kwargs: further arguments of ``build_for_fine_tuning`` (``drop_path``, ``patch_size``, ``pos_encoding``, ...).

    Attributes:
        vit: the :class:`pretrain.backbones.vit.ViT`.
        weights: the file that was read, or none.

    Raises:
        UserError: ``weights`` and ``init_cfg`` both given; another ``init_cfg``; all that ``build_backbone`` raises.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        *,
        freeze: bool = False,
        checkpointing: bool = False,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(init_cfg=None)  # mmengine's own Pretrained reads no safetensors, and only warns on a mismatch
        self.weights = _one_source(weights, init_cfg)
        self.vit = build_for_fine_tuning(name, self.weights, **model_kwargs)
        self.vit.checkpointing = "full" if checkpointing else "none"
        self.freeze = freeze
        if freeze:
            self.vit.requires_grad_(False)

    def train(self, mode: bool = True) -> "PosfieldViT":
        """As any module's; a frozen ViT stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.vit.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """[B, 3, H, W] normalized pixels -> one map that covers exactly these H x W pixels.

        [B, D, H/p, W/p] where p divides H and W. Else the ViT pads at the bottom and on the right to whole patches, and its map
        covers the padding too; a head that stretches its logits to H x W, as mmseg's do, would squeeze the image. So the map
        is brought to the resolution of pixels, by the same bilinear rule as the heads', and the padding is cut off: [B, D, H, W].
        A linear head commutes with both, so its logits are exactly those of the padded image, cropped.
        """
        (height, width), patch = x.shape[2:], self.vit.patch_size
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            (tokens,) = self.vit.forward_views([ViewGroup(x)])  # equal to forward(x); knows checkpointing
        features = tokens.patches.transpose(1, 2).unflatten(2, (-(-height // patch), -(-width // patch)))
        if height % patch or width % patch:
            features = F.interpolate(features, scale_factor=patch, mode="bilinear", align_corners=False)[..., :height, :width]
        return (features,)


def _one_source(weights: str | Path | None, init_cfg: Mapping[str, Any] | None) -> str | None:
    """The checkpoint, from whichever of the two ways names it."""
    if init_cfg is not None:
        if init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}:
            raise UserError(f"backbone: init_cfg can only be dict(type='Pretrained', checkpoint=FILE), not {dict(init_cfg)}")
        if weights is not None:
            raise UserError(f"backbone: weights={str(weights)!r} and init_cfg's {init_cfg['checkpoint']!r} are both given")
        weights = init_cfg["checkpoint"]
    return None if weights is None else str(weights)
