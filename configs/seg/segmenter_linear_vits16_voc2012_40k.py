"""Pascal VOC 2012, 40,000 iterations, linear decoder (Segmenter) on ViT-S/16: our protocol, with its first
grid point.

python MMSEG/tools/train.py THIS --work-dir DIR --cfg-options model.backbone.weights=run/backbone.safetensors

The data lie in $VOC2012, or in data/VOCdevkit/VOC2012. Every number is in seg_plugin/protocol.py, the folders
are in pretrain/data/datasets/public.py. The masks of SBD too (trainaug.txt): the name "voc2012aug-40k" in place of this
one.
"""

_base_ = []  # tells mmengine that this is a plain config, so that the import below is a plain import

from seg_plugin.config import segmenter_config  # noqa: E402

globals().update(
    segmenter_config(
        "voc2012-40k", backbone="vit_small_patch16", data_root="{{$VOC2012:data/VOCdevkit/VOC2012}}"
    )
)
