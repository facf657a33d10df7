"""Pascal VOC 2012, 40,000 iterations, linear decoder (Segmenter) on ViT-S/16: our protocol (seg_plugin/protocol.py)
with its first grid point. The data lie in $VOC2012, or in data/VOCdevkit/VOC2012; with the masks of SBD
(trainaug.txt) the name is "voc2012aug-40k".

python MMSEG/tools/train.py THIS --work-dir DIR --cfg-options model.backbone.weights=run/backbone.safetensors
"""

_base_ = []  # tells mmengine that this is a plain config, so that the import below is a plain import

from seg_plugin.config import segmenter_config  # noqa: E402

globals().update(
    segmenter_config("voc2012-40k", "vit_small_patch16", data_root="{{$VOC2012:data/VOCdevkit/VOC2012}}")
)
