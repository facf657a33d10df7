"""The smallest detector that still has every part: ViT-Ti with two blocks, 128 px, 20 iterations, on the CPU.

It is for the toy data of posfield toy-data (five classes), or any COCO-format root with five categories.
"""

from det_plugin.detectron2_engine.lazy import config
from det_plugin.protocol import protocol, with_overrides

_backbone = "vit_tiny_patch16"
_scaled_down = with_overrides(
    protocol("coco-12ep", _backbone),
    dict(
        max_iters=20,
        milestones=(16, 18),
        warmup_iters=4,
        batch_size=2,
        eval_every=10,
        amp=False,
        image_size_px=128,
        jitter_scale=(0.5, 1.5),
        channels=32,
        box_convs=1,
        box_fc=64,
        mask_convs=1,
        anchor_sizes_px=(8, 16, 32, 64, 128),
        rpn_pre_nms=(200, 100),
        rpn_post_nms=(100, 50),
        roi_batch_per_image=32,
        num_classes=5,
        detections_per_image=20,
    ),
)
model, train, dataloader, optimizer, lr_multiplier = config(
    _scaled_down, _backbone, model_kwargs=dict(depth=2), device="cpu", workers=0
).values()
