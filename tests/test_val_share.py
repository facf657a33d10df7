"""A validation split from a set that has none: stable, by class, and written down."""

import json
import random
from collections import Counter
from importlib.util import find_spec

import pytest
from formats_fixture import coco, plain, scene, write_images, write_json, write_voc, write_yolo
from tool_fixture import ended

from det_plugin.coco.annotations import Data, read_split
from det_plugin.coco.layout import locate
from det_plugin.coco.metrics import coco_metrics
from det_plugin.coco.share import divided, of_validation
from det_plugin.protocol import protocol, with_overrides
from det_plugin.train import evaluate, finetune
from pretrain.data.share import place, share_of
from pretrain.errors import UserError
from pretrain.results import read_result

SHARE = 0.2
PLACES = 0.42837165674, 0.0395578978791, 0.777584526037
needs_detectron2 = pytest.mark.skipif(find_spec("detectron2") is None, reason="needs Detectron2")
FIELDS = dict(
    max_iters=2, milestones=(1,), warmup_iters=1, batch_size=2, eval_every=2, image_size_px=64, channels=16,
    box_fc=32, box_convs=1, mask_convs=1, roi_batch_per_image=16, rpn_pre_nms=(100, 50), rpn_post_nms=(50, 20),
    anchor_sizes_px=(8, 16, 32, 64, 128), detections_per_image=10,
)  # fmt: skip
TINY = dict(backbone="vit_tiny_patch16", model_kwargs=dict(depth=2), device="cpu", workers=0)


def content_of(classes, names=None):
    """COCO content of images that have one object each, of these classes."""
    images = [{"id": i, "file_name": (names or {}).get(i, f"{i}.jpg")} for i in range(len(classes))]
    annotations = [{"id": i, "image_id": i, "category_id": c, "iscrowd": 0} for i, c in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": []}


def test_other_files_and_their_order_move_nothing():
    images = content_of([0] * 300 + [1] * 100)
    chosen = of_validation(images, SHARE)
    shuffled = {key: random.Random(0).sample(own, len(own)) for key, own in images.items()}
    assert of_validation(shuffled, SHARE) == chosen
    for n in range(401, 500):  # one more at a time
        more = of_validation(content_of([0] * 300 + [1] * 100 + [n % 2] * (n - 400)), SHARE)
        assert more & {image["file_name"] for image in images["images"]} == chosen
    assert chosen == {f"{i}.jpg" for i in range(400) if place(f"{i}.jpg") < SHARE}


def test_the_places_are_fixed_numbers():
    """They must never change: runs of different versions are compared."""
    assert place("000000000009.jpg") == pytest.approx(PLACES[0]) and place("a/b.png") == pytest.approx(
        PLACES[1]
    )
    assert place("a/b.png", seed=1) == pytest.approx(PLACES[2])


def test_a_larger_share_contains_a_smaller_one():
    images = content_of([i % 5 for i in range(500)])
    shares = [of_validation(images, share) for share in (0.05, 0.1, 0.3, 0.6)]
    assert all(small < large for small, large in zip(shares, shares[1:]))


def test_every_class_has_its_part():
    """Many: about the share. A few: one at least, and never all."""
    classes = [0] * 1000 + [1] * 200 + [2] * 5 + [3] * 3 + [4] * 2 + [5]
    for seed in range(20):
        names = {i: f"{seed}_{i}.jpg" for i in range(len(classes))}
        chosen = of_validation(content_of(classes, names), SHARE)
        found = Counter(c for i, c in enumerate(classes) if names[i] in chosen)
        assert abs(found[0] / 1000 - SHARE) < 0.06 and abs(found[1] / 200 - SHARE) < 0.12
        assert 1 <= found[2] <= 4 and 1 <= found[3] <= 2 and found[4] <= 1 and found[5] == 0


def test_versions_of_a_photograph_stay_together():
    names = {i: f"photo{i // 3}_jpg.rf.{i:032x}.jpg" for i in range(300)}
    chosen = of_validation(content_of([0] * 300, names), SHARE)
    assert {sum(names[3 * k + j] in chosen for j in range(3)) for k in range(100)} == {0, 3}


def test_damaged_entries_stay_to_be_named():
    content = content_of([0] * 9)
    content["images"] += [{"id": "x"}, 3, {"id": 99, "file_name": ["a"]}]
    content["annotations"] += [{"id": 99, "image_id": [1]}, {"image_id": 12345}, None]
    for side in ("train", "val"):
        found = divided(content, side, SHARE)
        assert found["images"][-3:] == content["images"][-3:]
        assert found["annotations"][-3:] == content["annotations"][-3:]
    with pytest.raises(UserError, match="--val-share: 1 images cannot be divided"):
        divided(content_of([0]), "val", SHARE)


# --- a training -------------------------------------------------------------------------------------------


IMAGES = scene(14)


def write_coco(root):
    write_images(root / "images", IMAGES)
    write_json(root / "annotations/instances_default.json", coco(IMAGES, polygons=True))


WRITE = {
    "voc": lambda root: write_voc(root, {"": IMAGES}, "annotations", "images", ""),
    "yolo": lambda root: write_yolo(
        root, {"train": IMAGES}, yaml="train: images/train\nnames: [ant, bee, cat]\n"
    ),
    "coco": write_coco,
}


@pytest.mark.parametrize("layout", WRITE)
def test_a_training_from_one_split(tmp_path, layout, capfd):
    WRITE[layout](tmp_path / "data")
    how = dict(TINY, engine="torchvision", val_share=SHARE, **FIELDS)
    path = finetune(tmp_path / "data", tmp_path / "run", **how)
    result, told = read_result(tmp_path / "run"), capfd.readouterr().err
    assert path == tmp_path / "run/result.json" and 0 <= result.metrics["box_ap"] <= 100
    assert result.protocol.deviations["val_share"] == [0.0, SHARE]
    assert ("mask_ap" in result.metrics) == (layout == "coco")
    split = json.loads((tmp_path / "run/split.json").read_text())
    sides = [plain(locate(tmp_path / "data", side, SHARE).read()) for side in ("train", "val")]
    assert [split["train"], split["val"]] == [sorted(side) for side in sides] and share_of(
        tmp_path / "run"
    ) == SHARE
    assert result.protocol.deviations["val_images"] == [5000, len(split["val"])]
    name = {"voc": "Pascal VOC", "yolo": "YOLO", "coco": "COCO"}[layout]
    assert (
        f"data: {name}: train " in told
        and f"({len(split['val'])} images), divided by --val-share 0.2" in told
    )
    again = evaluate(tmp_path / "data", tmp_path / "run", device="cpu", workers=0)
    assert (
        again == {key: value for key, value in result.metrics.items() if key in again} and "box_ap" in again
    )
    assert (
        finetune(tmp_path / "data", tmp_path / "run", **how, resume=True) == path
    )  # it is over: the same settings
    words = "--run", tmp_path / "run", "--data", tmp_path / "data", "--count", 2, "--device", "cpu"
    assert ended("analyze detections", *words) == 0 and (tmp_path / "run/figures/val_1.png").is_file()


@pytest.mark.parametrize("layout", WRITE)
def test_pycocotools_by_hand_agrees(tmp_path, layout):
    """Boxes a little beside the truth, evaluated from a plain COCO file of the side's content."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    WRITE[layout](tmp_path)
    files = locate(tmp_path, "val", 0.5)
    content = files.read()
    found = []
    for k, each in enumerate(content["annotations"]):
        x, y, w, h = each["bbox"]
        box = [x + k % 4, y, w - k % 3, h]
        found.append(
            {
                "image_id": each["image_id"],
                "category_id": each["category_id"],
                "bbox": box,
                "score": 1 - k / 99,
            }
        )
    ours = coco_metrics(files, found, masks="off")
    lists = {key: content[key] for key in ("images", "annotations", "categories")}
    truth = COCO(str(write_json(tmp_path / "by_hand/val.json", lists)))
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 10 < ours["box_ap"] < 99 and ours["box_ap"] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)


def test_a_set_with_a_split_of_its_own_is_not_divided(tmp_path, capfd):
    write_voc(tmp_path, {"train": IMAGES, "val": scene(3, first=30)})
    finetune(tmp_path, tmp_path / "run", **TINY, engine="torchvision", val_share=SHARE, **FIELDS)
    result = read_result(tmp_path / "run")
    assert "val_share" not in result.protocol.deviations and not (tmp_path / "run/split.json").exists()
    assert "has images for validation: --val-share is not used" in capfd.readouterr().out


@needs_detectron2
@pytest.mark.parametrize("layout", WRITE)
def test_detectron2_reads_the_same(tmp_path, layout):
    from detectron2.config import instantiate

    from det_plugin.detectron2_engine.catalog import coco_dicts
    from det_plugin.detectron2_engine.lazy import config

    WRITE[layout](tmp_path)
    masks = "auto" if layout == "coco" else "off"
    recipe = with_overrides(
        protocol("coco-12ep", "vit_tiny_patch16"),
        dict(FIELDS, num_classes=3, val_share=SHARE, masks=masks, amp=False),
    )
    data = Data.read(tmp_path, recipe)
    cfg = config(recipe, "vit_tiny_patch16", data=tmp_path, device="cpu", output=tmp_path / "run")
    for split, own, dataset in (
        ("train", data.train, cfg.dataloader.train),
        ("val", data.val, cfg.dataloader.test),
    ):
        dicts = instantiate(dataset.dataset)
        assert [each["image_id"] for each in dicts] == [picture.id for picture in own.pictures]
        assert [len(each["annotations"]) for each in dicts] == [
            len(picture.classes) for picture in own.pictures
        ]
        assert all(
            each["file_name"].endswith(picture.file_name) for each, picture in zip(dicts, own.pictures)
        )
        assert dicts == coco_dicts(tmp_path, split, 3, split == "train", **recipe.reading)
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert evaluator.files.read() == data.val.source.read()
    whole = read_split(tmp_path, "val", num_classes=3, training=False, **recipe.reading)
    assert list(whole.pictures) == list(data.val.pictures)
