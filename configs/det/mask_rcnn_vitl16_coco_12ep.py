"""Mask R-CNN on ViT-L/16, 12 epochs of COCO (protocol coco-12ep), for Detectron2's stock launcher.

python $DETECTRON2_SRC/tools/lazyconfig_train_net.py --num-gpus 8 --config-file configs/det/mask_rcnn_vitl16_coco_12ep.py \
    model.backbone.net.weights=RUN/backbone.safetensors dataloader.root=COCO train.output_dir=OUTPUT
"""

from det_plugin.detectron2_engine.lazy import parts

model, train, dataloader, optimizer, lr_multiplier = parts("coco-12ep", "vit_large_patch16")
