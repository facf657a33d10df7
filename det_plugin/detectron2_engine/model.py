"""The registry's ViT as a Detectron2 backbone, the pyramid around it, and the detector under bfloat16.

Parameters keep timm's names: ``backbone.net.vit.<name>`` inside a detector.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import Backbone, GeneralizedRCNN, SimpleFeaturePyramid
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor

from det_plugin.features import FeatureOptions, detection_features, prepare
from pretrain.build import PROTOCOL_PATCH_PX, build_for_fine_tuning
from pretrain.errors import UserError
from pretrain.weights import check_fit, origin_of

FEATURE = "last_feat"


# {file that a RegistryBackbone of this process was built from: "model_kwargs", all arguments of its ViT, and
# what `pretrain.weights.origin_of` says}. Stock launchers hand an evaluator no model, and at the end of a
# long run the file may be gone.
ORIGINS: dict[str, dict[str, Any]] = {}


class RegistryBackbone(Backbone):
    """A ViT by its registry name; one feature map, ``last_feat`` [B, D, H / 16, W / 16].

    The constructor reads the weights, so ``train.init_checkpoint`` stays "". A detector's checkpoint that is
    loaded later must hold every tensor of the backbone; Detectron2 alone only warns.

    Args:
        name, weights: those of :func:`pretrain.build.build_for_fine_tuning`.
        options: fields of :class:`det_plugin.features.FeatureOptions`, and ``model_kwargs``.

    Raises:
        UserError: as ``build_backbone``; a ``patch_size`` other than 16; a detector's checkpoint that does
            not fit, by tensor.
    """

    def __init__(self, name: str, weights: str | Path | None = None, **options: Any) -> None:
        super().__init__()
        known = {field.name for field in fields(FeatureOptions)}
        model_kwargs = {key: value for key, value in options.items() if key not in known}
        self.vit = build_for_fine_tuning(name, weights, **model_kwargs)
        if self.vit.patch_size != PROTOCOL_PATCH_PX:
            told = f"the pyramid's levels are made of {PROTOCOL_PATCH_PX} px patches"
            raise UserError(f"backbone: patch_size={self.vit.patch_size}, but {told}")
        if weights is not None:
            origin = origin_of(weights, model_kwargs.get("source"))
            ORIGINS[str(weights)] = {"model_kwargs": dict(self.vit.model_kwargs), **origin}
        self.options = FeatureOptions(**{key: options[key] for key in known & options.keys()})
        prepare(self.vit, self.options)
        self._out_features = [FEATURE]
        self._out_feature_channels = {FEATURE: self.vit.embed_dim}
        self._out_feature_strides = {FEATURE: self.vit.patch_size}
        self.register_load_state_dict_pre_hook(_require_every_tensor)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] normalized pixels -> ``{"last_feat": [B, D, H / 16, W / 16]}``."""
        return {FEATURE: detection_features(self.vit, x, self.options)}


class PaddedPyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid with its padding enforced.

    Detectron2 misspells a key of ``padding_constraints`` (``size_divisiblity``, issue 4676), so nothing makes
    an input divisible by the coarsest stride. Here every batch becomes a square of at least ``square_pad``,
    padded at the bottom and on the right.
    """

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What ``GeneralizedRCNN.preprocess_image`` pads to."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}


def _require_every_tensor(
    module: RegistryBackbone, state: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Called before fvcore's checkpointer loads with ``strict=False`` what fits."""
    wanted = {prefix + key: value for key, value in module.state_dict().items()}
    given = {key: value for key, value in state.items() if key.startswith(prefix)}
    check_fit(f"checkpoint: it does not fit the backbone {prefix.rstrip('.')}", wanted, given)


class BFloat16RCNN(GeneralizedRCNN):
    """Detectron2's detector, trained under bfloat16 autocast on CUDA by any launcher: AMPTrainer only knows
    float16. It needs no loss scaling. Evaluation stays in float32, as Detectron2's does."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As in ``GeneralizedRCNN``."""
        enabled = self.training and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            return super().forward(batched_inputs)


class MixedROIHeads(StandardROIHeads):
    """Detectron2's heads, for data where some objects have a mask and some only a box.

    The mask head learns from proposals of objects whose ``gt_has_mask`` is true; without that field from all.
    """

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        if self.training:
            instances = [own[own.gt_has_mask] if own.has("gt_has_mask") else own for own in instances]
        return super()._forward_mask(features, instances)
