"""Cityscapes, 80,000 iterations, linear decoder (Segmenter) on ViT-S/16: our protocol, with its first grid
point.

python MMSEG/tools/train.py THIS --work-dir DIR --cfg-options model.backbone.weights=run/backbone.safetensors

The data lie in $CITYSCAPES, or in data/cityscapes; the masks are the labelTrainIds that cityscapesScripts
makes. Every number is in seg_plugin/protocol.py, the folders are in
pretrain/data/datasets/public.py.
"""

_base_ = []  # tells mmengine that this is a plain config, so that the import below is a plain import

from seg_plugin.config import segmenter_config  # noqa: E402

globals().update(
    segmenter_config(
        "cityscapes-80k", backbone="vit_small_patch16", data_root="{{$CITYSCAPES:data/cityscapes}}"
    )
)
