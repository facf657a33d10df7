"""Mask R-CNN on ViT-S/16, 12 epochs of COCO (protocol coco-12ep), for Detectron2's stock launcher.

python $DETECTRON2_SRC/tools/lazyconfig_train_net.py --num-gpus 8 --config-file configs/det/mask_rcnn_vits16_coco_12ep.py \
    model.backbone.net.weights=RUN/backbone.safetensors dataloader.root=COCO train.output_dir=OUTPUT
"""

from det_plugin.lazy import config
from det_plugin.protocol import protocol

_backbone = "vit_small_patch16"
_config = config(protocol("coco-12ep", _backbone), _backbone)
model, train, dataloader = _config.model, _config.train, _config.dataloader
optimizer, lr_multiplier = _config.optimizer, _config.lr_multiplier
