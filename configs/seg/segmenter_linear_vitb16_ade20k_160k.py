"""ADE20K, 160,000 iterations, linear decoder (Segmenter) on ViT-B/16: the protocol (seg_plugin/protocol.py) with its
first grid point (lr, weight decay). The data lie in $ADE20K, or in data/ade/ADEChallengeData2016.

python MMSEG/tools/train.py THIS --work-dir DIR --cfg-options model.backbone.weights=run/backbone.safetensors
"""

_base_ = []  # tells mmengine that this is a plain config, so that the import below is a plain import

from seg_plugin.config import segmenter_config  # noqa: E402

globals().update(
    segmenter_config("ade20k-160k", "vit_base_patch16", data_root="{{$ADE20K:data/ade/ADEChallengeData2016}}")
)
