"""`make test-slow`: both plug-ins learn eight toy images by heart, in minutes on two cores.

Training and validation are the same eight images of :mod:`pretrain.data.toy`, whose objects are at least 48
px high and wide; a tiny ViT from random weights, and every augmentation off. What a wrong box code, target,
crop or learning rate costs shows here.
"""

import json
from itertools import count, islice

import cv2
import numpy as np
import pytest

from det_plugin.coco.masks import boxes_of
from det_plugin.protocol import protocol, with_overrides
from det_plugin.run import DetectionRun
from pretrain.data.toy import CLASSES, compose
from pretrain.data.toy_sets import ade_labels, mask_to_polygons
from pretrain.results import read_result

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

N_IMAGES, SHORT_PX, LONG_PX, OBJECT_PX = 8, 128, 160, 48
BACKBONE, FLAGS = "vit_tiny_patch16", dict(depth=4, pos_encoding="field")
DETECTION = dict(
    # Nothing random but the sampling of boxes.
    jitter_scale=(1.0, 1.0), flip=0.0, drop_path=0.0, amp=False,
    # Objects of 48 to 110 px in images of 160.
    image_size_px=LONG_PX, anchor_sizes_px=(16, 32, 64, 96, 128), num_classes=len(CLASSES), detections_per_image=20,
    channels=64, box_convs=1, box_fc=256, mask_convs=2,
    rpn_batch_per_image=64, roi_batch_per_image=64, rpn_pre_nms=(200, 100), rpn_post_nms=(100, 50),
    batch_size=4, max_iters=600, milestones=(450, 560), warmup_iters=20, eval_every=600,
    lr=5e-4, layer_decay=0.9, weight_decay=0.0,
)  # fmt: skip

SEGMENTATION = dict(
    ratio_range=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, drop_path=0.0,
    brightness=0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0,
    # Crops and windows of one size that fits into each image: what was learned by heart is lost where
    # positions are others.
    resize_px=(2 * LONG_PX, 2 * SHORT_PX), crop_px=2 * SHORT_PX, slide_crop_px=2 * SHORT_PX, slide_stride_px=LONG_PX,
    num_classes=1 + len(CLASSES), batch_size=4, max_iters=500, val_every=500, warmup_iters=20,
    lr=5e-4, weight_decay=0.0,
)  # fmt: skip


def is_easy(picture):
    """Two or three objects, each whole, of 48 px or more a side, and hardly covered."""
    height, width = picture.image.shape[:2]
    boxes = boxes_of(np.stack(picture.masks))
    sides = boxes[:, 2:] - boxes[:, :2]
    inside = (boxes > 0).all() and (boxes < [width, height, width, height]).all()
    return 2 <= len(boxes) <= 3 and max(height, width) <= LONG_PX and inside and (sides >= OBJECT_PX).all()


@pytest.fixture(scope="module")
def pictures():
    """The first eight such images of the endless series, by their number in it."""
    series = (compose(index, "train", 0, SHORT_PX) for index in count())
    return list(islice(filter(is_easy, series), N_IMAGES))


@pytest.fixture(scope="module")
def coco(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    images, objects = [], []
    for image_id, picture in enumerate(pictures, 1):
        height, width = picture.image.shape[:2]
        images.append(dict(id=image_id, file_name=f"{image_id}.png", height=height, width=width))
        for mask, kind, (x0, y0, x1, y1) in zip(
            picture.masks, picture.classes, boxes_of(np.stack(picture.masks)).tolist()
        ):
            objects.append(dict(id=len(objects) + 1, image_id=image_id, category_id=kind + 1, iscrowd=0, area=int(mask.sum()),
                                bbox=[x0, y0, x1 - x0, y1 - y0], segmentation=mask_to_polygons(mask)))  # fmt: skip
    categories = [dict(id=k, name=name) for k, name in enumerate(CLASSES, 1)]
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        content = dict(images=images, annotations=objects, categories=categories)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for image_id, picture in enumerate(pictures, 1):
            cv2.imwrite(str(root / f"{split}2017" / f"{image_id}.png"), picture.image[:, :, ::-1])
    return root


@pytest.fixture(scope="module")
def ade(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            cv2.imwrite(str(root / "images" / split / f"{number}.jpg"), picture.image[:, :, ::-1])
            cv2.imwrite(str(root / "annotations" / split / f"{number}.png"), ade_labels(picture))
    return root


def learn_by_heart(train, coco, folder, masks):
    """Box AP, and with masks mask AP, in percent on the images that an engine was trained on."""
    recipe = with_overrides(protocol("coco-12ep", BACKBONE), {**DETECTION, "masks": masks})
    run = DetectionRun(BACKBONE, None, coco, folder, recipe, device="cpu", workers=0, model_kwargs=FLAGS)
    metrics = read_result(train(run)).metrics
    reached = [metrics[key] for key in ("box_ap", "mask_ap") if key in metrics]
    print(f"masks={masks}: {reached}")
    return reached


@pytest.mark.parametrize("masks", ["auto", "off"])
def test_the_torchvision_engine_learns_eight_pictures(tmp_path, coco, masks):
    from det_plugin.torchvision_engine.train import train

    box_ap, *mask_ap = learn_by_heart(train, coco, tmp_path / "run", masks)
    assert box_ap > 90 and len(mask_ap) == (masks == "auto") and all(ap > 85 for ap in mask_ap)


@pytest.mark.parametrize("masks", ["auto", "off"])
def test_detectron2_learns_eight_pictures(tmp_path, coco, masks):
    pytest.importorskip(
        "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
    )
    from det_plugin.detectron2_engine.train import train

    box_ap, *mask_ap = learn_by_heart(train, coco, tmp_path / "run", masks)
    assert box_ap > 90 and len(mask_ap) == (masks == "auto") and all(ap > 85 for ap in mask_ap)


def test_segmentation_learns_eight_pictures(tmp_path, ade):
    """Images at twice their size: patches of 16 px must draw the edges of objects of 48 px."""
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed (pip install 'posfield[seg]')")
    from seg_plugin.protocol import protocol, with_overrides
    from seg_plugin.run import SegmentationRun, train

    recipe = with_overrides(protocol(), SEGMENTATION)
    run = SegmentationRun(
        BACKBONE, None, ade, tmp_path / "run", recipe, device="cpu", workers=0, model_kwargs=FLAGS
    )
    metrics = read_result(train(run)).metrics
    reached = f"mIoU {metrics['miou']:.1f}"
    print(reached, metrics["iou"])
    assert metrics["miou"] > 90, reached
