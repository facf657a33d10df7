"""The toy data of posfield toy-data, a few iterations of a tiny ViT on the CPU: to see every part run,
not to learn.

python MMSEG/tools/train.py configs/seg/toy.py --work-dir DIR

The data lie in $TOY_ADE, or in toy/ade/ADEChallengeData2016.
"""

_base_ = []  # tells mmengine that this is a plain config, so that the imports below are plain imports

from pretrain.data.toy import CLASSES  # noqa: E402
from seg_plugin.config import segmenter_config  # noqa: E402
from seg_plugin.protocol import protocol, with_overrides  # noqa: E402

numbers = dict(
    max_iters=20, batch_size=4, val_every=20, resize_px=(640, 160), crop_px=128, slide_crop_px=128,
    slide_stride_px=112, num_classes=1 + len(CLASSES),
)  # fmt: skip
globals().update(
    segmenter_config(
        with_overrides(protocol("ade20k-160k"), numbers), "vit_tiny_patch16",
        model_kwargs=dict(depth=4, pos_grid=8), data_root="{{$TOY_ADE:toy/ade/ADEChallengeData2016}}", workers=0,
    )
)  # fmt: skip
del CLASSES, numbers
