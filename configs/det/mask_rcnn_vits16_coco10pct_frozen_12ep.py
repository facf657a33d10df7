"""Mask R-CNN on ViT-S/16, frozen, 12 epochs of a tenth of COCO (protocol coco10pct-frozen-12ep), for Detectron2's stock launcher.

python $DETECTRON2_SRC/tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/det/mask_rcnn_vits16_coco10pct_frozen_12ep.py \
    model.backbone.net.weights=RUN/backbone.safetensors dataloader.root=COCO train.output_dir=OUTPUT
"""

from det_plugin.detectron2_engine.lazy import parts

model, train, dataloader, optimizer, lr_multiplier = parts("coco10pct-frozen-12ep", "vit_small_patch16")
