"""The registry's ViT as a backbone of MMSegmentation (which has a ``VisionTransformer`` too): ``PosfieldViT``."""

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

OF_THE_RUN = ("freeze", "checkpointing")  # arguments of PosfieldViT but not of the ViT


@MODELS.register_module()
class PosfieldViT(BaseModule):
    """A ViT. Its output is one map, the last layer's normed patch tokens.

    Args:
        name: registry name, ``vit_SIZE_patch16``, ``..._reg4``.
        weights: any checkpoint that ``build_for_fine_tuning`` reads, here; ``init_weights`` changes nothing.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``, mmengine's way to say ``weights=FILE``.
        freeze: the ViT does not learn, drops no path, and makes no graph.
        checkpointing: recompute the blocks in the backward pass: less memory, the same numbers.
        model_kwargs: further arguments of ``build_for_fine_tuning`` (``drop_path``, ``pos_encoding``, ...).

    Attributes:
        vit: the :class:`pretrain.backbones.vit.ViT`.
        weights: the file that was read, or None.

    Raises:
        UserError: ``weights`` and ``init_cfg`` are both given; another ``init_cfg``; as ``build_backbone``.
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
        # mmengine's Pretrained reads no safetensors, and only warns on a mismatch
        super().__init__(init_cfg=None)
        if init_cfg is not None:
            if init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}:
                told = "init_cfg can only be dict(type='Pretrained', checkpoint=FILE)"
                raise UserError(f"backbone: {told}, not {dict(init_cfg)}")
            if weights is not None:
                told = f"weights={str(weights)!r} and init_cfg's {init_cfg['checkpoint']!r}"
                raise UserError(f"backbone: {told} are both given")
            weights = init_cfg["checkpoint"]
        self.weights = None if weights is None else str(weights)
        self.vit = build_for_fine_tuning(name, self.weights, **model_kwargs)
        self.vit.checkpointing = "full" if checkpointing else "none"
        self.freeze = freeze
        if freeze:
            self.vit.requires_grad_(False)

    def train(self, mode: bool = True) -> "PosfieldViT":
        """As in any module, but a frozen ViT stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.vit.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """[B, 3, H, W] normalized pixels -> one map that covers exactly these H x W pixels.

        If p divides H and W, it is [B, D, H/p, W/p]. Otherwise the ViT pads to whole patches, and a head that
        stretches its logits to H x W, like mmseg's, would squeeze the image. So the map is resized to pixels
        by the heads' own bilinear rule, and the padding is cut off: [B, D, H, W]. A linear head commutes with
        both: its logits are exactly those of the padded image, cropped.
        """
        (height, width), patch = x.shape[2:], self.vit.patch_size
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            (tokens,) = self.vit.forward_views([ViewGroup(x)])  # equals forward(x), with checkpointing
        features = tokens.patches.transpose(1, 2).unflatten(2, (-(-height // patch), -(-width // patch)))
        if height % patch or width % patch:
            features = F.interpolate(features, scale_factor=patch, mode="bilinear", align_corners=False)
        return (features[..., :height, :width],)
