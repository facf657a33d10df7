"""Cityscapes, 80,000 iterations, linear decoder (Segmenter) on ViT-S/16: our protocol (seg_plugin/protocol.py) with
its first grid point. The data lie in $CITYSCAPES, or in data/cityscapes; the masks are the labelTrainIds that
cityscapesScripts makes.

python MMSEG/tools/train.py THIS --work-dir DIR --cfg-options model.backbone.weights=run/backbone.safetensors
"""

_base_ = []  # tells mmengine that this is a plain config, so that the import below is a plain import

from seg_plugin.config import segmenter_config  # noqa: E402

globals().update(
    segmenter_config("cityscapes-80k", "vit_small_patch16", data_root="{{$CITYSCAPES:data/cityscapes}}")
)
