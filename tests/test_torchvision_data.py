"""The torchvision engine's data path and its evaluation: exact on a data set whose every pixel is known."""

import importlib.util
import json
import pickle

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_fixture import CATEGORIES, annotation_file, polygon_of, rle_of_box, shapes, write_coco
from PIL import Image

from det_plugin.augment import Geometry, evaluation_geometry, jitter, objects_of
from det_plugin.coco.annotations import PackedList, Picture, read_split
from det_plugin.coco.masks import Polygons, boxes_of, clip, coco_api, crop_masks, decode_rle, encode_mask
from det_plugin.coco.metrics import coco_metrics, in_words
from det_plugin.loader import batches, positions, stream_index
from det_plugin.protocol import DetectionProtocol, with_overrides
from det_plugin.torchvision_engine.loader import TrainSamples
from det_plugin.torchvision_engine.predict import as_coco, paste_mask
from pretrain.errors import UserError

RECIPE = DetectionProtocol(image_size_px=64, num_classes=3)
needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2, the oracle, is not installed"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def own(tmp_path):
    """A copy that a test may break."""
    return write_coco(tmp_path / "coco")


def edit(root, split, change):
    """Change an annotation file's content in place."""
    file = annotation_file(root, split)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def read(root, split="train", training=True):
    return read_split(root, split, num_classes=3, training=training)


# --- reading ----------------------------------------------------------------------------------------------


def test_read_split(root):
    train, val = read(root), read(root, "val", training=False)
    assert train.category_ids == (3, 7, 90) and train.class_names == ("rectangle", "disc", "bar")
    assert [p.id for p in train.pictures] == [1, 2, 3, 4, 5]  # the sixth has no object
    assert [p.id for p in val.pictures] == [1001, 1002, 1003, 1004] and not val.pictures[3].classes
    first = train.pictures[0]
    assert len(first.classes) == 2  # without the crowd
    assert first.classes == tuple(list(CATEGORIES).index(kind) for kind, *_ in shapes(1, 96, 64))
    assert train.load(first).shape == (64, 96, 3)


def test_packed_list_gives_back_its_records():
    records = [Picture(i, f"{i}.jpg", i, 2 * i, (i,) * i, ([[0.5] * 6],) * i) for i in range(5)]
    packed = PackedList(records)
    assert list(packed) == records and len(packed) == 5 and packed[3] == records[3]
    assert list(pickle.loads(pickle.dumps(packed))) == records and len(PackedList([])) == 0


def test_objects_of_zero_extent_are_dropped_in_training_alone(own):
    edit(own, "train", lambda content: content["annotations"][0]["bbox"].__setitem__(2, 0))
    assert len(read(own).pictures[0].classes) == 1
    assert len(read(own, training=False).pictures[0].classes) == 2


BROKEN = [
    (lambda root: annotation_file(root, "train").unlink(), "no file .*instances_train2017.json"),
    (
        lambda root: annotation_file(root, "train").write_text("{"),
        "instances_train2017.json cannot be read as JSON",
    ),
    (lambda root: annotation_file(root, "train").write_text("[]"), "holds no mapping"),
    (lambda root: edit(root, "train", lambda c: c.pop("categories")), "no list 'categories'"),
    (lambda root: edit(root, "train", lambda c: c["images"][0].update(width="wide")), "image 1 is 'wide' x"),
    (
        lambda root: edit(root, "train", lambda c: c["annotations"][0].pop("segmentation")),
        "1 of 10 objects have no mask",
    ),
    (
        lambda root: edit(root, "train", lambda c: c["annotations"][0].update(category_id=4)),
        "unknown category_id 4",
    ),
    (
        lambda root: edit(root, "train", lambda c: c["annotations"][0].update(image_id=99)),
        "unknown image_id 99",
    ),
    (
        lambda root: edit(root, "train", lambda c: c["categories"].append({"id": 3, "name": "again"})),
        "a category id twice",
    ),
    (lambda root: edit(root, "train", lambda c: c["annotations"].clear()), "no images with objects"),
    (
        lambda root: edit(root, "train", lambda c: c["categories"].pop()),
        "2 categories, but num_classes=3|unknown category_id",
    ),
    (
        lambda root: (root / "train2017" / "000000000002.png").unlink(),
        "000000000002.png, which .*train2017 does not hold",
    ),
    (lambda root: (root / "train2017").rename(root.parent / "elsewhere"), "no folder .*train2017"),
]


@pytest.mark.parametrize("damage, message", BROKEN)
def test_broken_data_is_named(own, damage, message):
    damage(own)
    with pytest.raises(UserError, match=message):
        read(own)


def test_number_of_classes_is_compared(root):
    with pytest.raises(UserError, match=r"instances_train2017.json has 3 categories, but num_classes=80"):
        read_split(root, "train", num_classes=80, training=True)


def test_unreadable_and_misdescribed_images_are_named(own):
    path = own / "train2017" / "000000000001.png"
    split = read(own)
    Image.new("RGB", (10, 12)).save(path)
    with pytest.raises(
        UserError, match="000000000001.png is 10 x 12 pixels, but instances_train2017.json says 96 x 64"
    ):
        split.load(split.pictures[0])
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="000000000001.png cannot be read"):
        split.load(split.pictures[0])
    samples = TrainSamples(split, RECIPE, seed=0)
    bad = [i for i in range(10) if split.pictures[stream_index(i, 5, 0)].id == 1][:1]
    ((sample,),) = batches(samples, [bad], 1, torch.device("cpu"))  # another one in its place
    assert sample


def test_coco_api_is_needed(monkeypatch):
    assert "pycocotools" in coco_api().mask.__name__
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    if importlib.util.find_spec("faster_coco_eval"):
        assert "faster_coco_eval" in coco_api().mask.__name__
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install posfield\[det\]"):
        coco_api()


# --- geometry ---------------------------------------------------------------------------------------------


def geometries(source, n=40):
    """Random training geometries of an image, some smaller than the target and some cropped."""
    recipe = with_overrides(RECIPE, dict(jitter_scale=(0.4, 2.5)))
    return [jitter(source, recipe, np.random.default_rng(i)) for i in range(n)]


def test_jitter_numbers():
    found = geometries((96, 64), 200)
    assert 0.35 < np.mean([g.flip for g in found]) < 0.65
    for g in found:
        scale = g.resized[0] / 96
        assert (
            0.4 * 64 / 96 - 0.01 <= scale <= 2.5 * 64 / 96 + 0.01
        )  # the long edge is scaled to 64 times a number
        assert abs(g.resized[1] - 64 * scale) <= 1
        x, y, w, h = g.crop
        assert (w, h) == (min(g.resized[0], 64), min(g.resized[1], 64))
        assert 0 <= x <= g.resized[0] - w and 0 <= y <= g.resized[1] - h
    assert any(g.crop[0] > 0 for g in found) and any(g.resized[0] < 64 for g in found)
    assert not any(
        g.flip
        for g in [
            jitter((9, 9), with_overrides(RECIPE, dict(flip=0.0)), np.random.default_rng(i)) for i in range(9)
        ]
    )


def test_pixels_and_points_go_the_same_way():
    """An image that stores its own coordinates, beside the map of the coordinates."""
    width, height = 120, 90
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    for g in geometries((width, height)):
        seen = g.pixels(image).astype(float)
        assert seen.shape[:2] == (g.crop[3], g.crop[2])
        centers = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1)
        mapped = g.points(centers)
        inside = ((mapped > 4) & (mapped < np.array(g.crop[2:]) - 4)).all(
            axis=1
        )  # away from what is mirrored at the border
        assert inside.sum() > 20
        column, row = np.floor(mapped[inside]).astype(int).T
        tolerance = (
            0.5 + 0.5 / min(g.scale) + 1
        )  # rounding of gray values; a center lies within half a pixel of either
        assert np.abs(seen[row, column, 0] - (centers[inside, 0] - 0.5)).max() <= tolerance
        assert np.abs(seen[row, column, 1] - (centers[inside, 1] - 0.5)).max() <= tolerance


OBJECTS = (
    (0, [polygon_of(7, 10, 8, 30, 40)]),
    (2, [polygon_of(3, 50, 20, 41, 17), polygon_of(3, 2, 50, 9, 9)]),
)


def test_boxes_are_those_of_the_masks():
    """Polygons give the corners themselves, bitmaps (where an object is an RLE) those of whole pixels."""
    for g in geometries((96, 64)):
        found, kinds, polygons = objects_of(g, *zip(*OBJECTS))
        assert len(found) == len(kinds) == len(polygons) and np.array_equal(found, polygons.boxes())
        for box, kind in zip(found, kinds):
            points = g.points(np.concatenate(dict(OBJECTS)[kind]).reshape(-1, 2))
            inside = points.clip(0, g.crop[2:])
            assert (box[:2] >= inside.min(axis=0) - 1e-4).all() and (
                box[2:] <= inside.max(axis=0) + 1e-4
            ).all()
            if (points == inside).all():
                np.testing.assert_allclose(box, [*points.min(axis=0), *points.max(axis=0)], rtol=1e-6)
        with_rle = *OBJECTS, (1, encode_mask(np.ones((64, 96), bool)))
        found, kinds, bitmaps = objects_of(g, *zip(*with_rle))
        assert bitmaps.dtype == torch.uint8 and bitmaps.shape == (len(found), g.crop[3], g.crop[2])
        assert np.array_equal(found, boxes_of(bitmaps.numpy())) and kinds[-1] == 1 and bitmaps[-1].all()


def test_objects_outside_the_crop_are_dropped():
    g = Geometry((100, 100), False, (100, 100), (50, 50, 50, 50))
    inside, outside = [polygon_of(3, 40, 40, 20, 30)], [polygon_of(3, 10, 10, 30, 20)]
    found, classes, masks = objects_of(g, (1, 2), (inside, outside))
    assert found.tolist() == [[0, 0, 10, 20]] and classes.tolist() == [1]
    assert torch.equal(
        masks.crop(torch.tensor([0]), torch.tensor([[0.0, 0, 20, 20]]), 10)[0].sum(0),
        torch.tensor([10.0] * 5 + [0] * 5),
    )
    nothing, _, masks = objects_of(g, (2,), (outside,))
    assert nothing.shape == (0, 4) and len(masks) == 0
    assert masks.crop(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), 28).shape == (0, 28, 28)


def test_a_polygon_may_fall_apart_at_the_edge():
    """A U whose bottom lies outside leaves two parts; one that only touches the edge leaves none; a
    bow-tie is made valid."""
    u = np.array(
        [(10, 10), (20, 10), (20, 60), (40, 60), (40, 10), (50, 10), (50, 70), (10, 70)], float
    ).ravel()
    parts = clip(u, 60, 50)
    assert sorted(part.reshape(-1, 2)[:, 0].min() for part in parts) == [10, 40]
    assert clip(u - np.tile([50, 0], 8), 60, 50) == [] and clip(u[:6], 60, 50)
    assert len(clip(np.array([0.0, 0, 10, 10, 10, 0, 0, 10]), 60, 50)) >= 1
    both = Polygons([parts]).crop(torch.tensor([0]), torch.tensor([[0.0, 0, 60, 50]]), 60)[0]
    assert both[20].nonzero().ravel().tolist() == [*range(10, 20), *range(40, 50)]


def test_masks_are_exact_at_scale_one():
    """Polygon, RLE and a list of counts of the same rectangle; with a flip, the mirrored one."""
    mask = np.zeros((64, 96), np.uint8)
    mask[10:30, 20:50] = 1
    rle = encode_mask(mask.astype(bool))
    counts = rle_of_box(96, 64, 20, 10, 30, 20)
    assert np.array_equal(decode_rle(counts), mask)
    for flip, expected in ((False, mask), (True, mask[:, ::-1])):
        g = Geometry((96, 64), flip, (96, 64), (15, 5, 60, 50))
        for segmentation in ([polygon_of(3, 20, 10, 30, 20)], rle, counts):
            assert np.array_equal(g.mask(segmentation), expected[5:55, 15:75])


@needs_detectron2
def test_geometry_equals_detectron2():
    import detectron2.data.transforms as T
    from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8), (5, 5), 0)
    points = np.random.default_rng(1).uniform(0, 90, (20, 2))
    for g in geometries((120, 90)):
        steps = [HFlipTransform(120)] if g.flip else []
        steps += [
            T.ResizeTransform(90, 120, g.resized[1], g.resized[0], Image.BILINEAR),
            CropTransform(*g.crop),
        ]
        theirs = TransformList(steps)
        np.testing.assert_allclose(g.points(points), theirs.apply_coords(points.copy()), atol=1e-9)
        difference = np.abs(g.pixels(image).astype(int) - theirs.apply_image(image).astype(int))
        assert (
            difference.max() <= 2 and difference.mean() < 0.1
        )  # fixed-point weights of a window and of the whole
    for width, height in [
        (96, 64),
        (64, 96),
        (80, 80),
        (500, 333),
        (333, 500),
        (7, 640),
        (641, 479),
        (198, 4096),
    ]:
        size = T.ResizeShortestEdge.get_output_shape(height, width, 1024, 1024)
        assert evaluation_geometry((width, height), 1024).resized == (size[1], size[0])


@needs_detectron2
def test_jitter_equals_detectron2(monkeypatch):
    """Its augmentations make the same of the same random numbers: sizes, crops and flips, where polygons
    are cut."""
    import detectron2.data.transforms as T

    size = RECIPE.image_size_px
    steps = [
        T.RandomFlip(horizontal=True),
        T.ResizeScale(*RECIPE.jitter_scale, size, size),
        T.FixedSizeCrop((size, size), pad=False),
    ]
    kinds = set()
    for i, source in enumerate([(96, 64), (31, 200), (64, 64), (501, 333)] * 10):
        rng = np.random.default_rng(i)
        monkeypatch.setattr(
            np.random, "uniform", lambda low, high, size=None, rng=rng: rng.uniform(low, high)
        )
        theirs = T.AugmentationList(steps)(T.AugInput(np.zeros((*source[::-1], 3), np.uint8)))
        flip, resize, crop = theirs.transforms
        g = jitter(source, RECIPE, np.random.default_rng(i))
        assert g.flip == isinstance(flip, T.HFlipTransform) and g.resized == (resize.new_w, resize.new_h)
        assert g.crop == (crop.x0, crop.y0, min(crop.w, resize.new_w), min(crop.h, resize.new_h))
        kinds.add((g.flip, g.crop[0] > 0, g.crop[1] > 0))
    assert len(kinds) > 4


@needs_detectron2
def test_polygons_equal_detectron2():
    """Cut at the crop, their boxes, and what the mask head should predict under any box: bit for bit."""
    import detectron2.data.transforms as T
    from detectron2.structures import PolygonMasks
    from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

    rng = np.random.default_rng(2)
    star = np.stack(
        [60 + rng.uniform(10, 50, 40) * f(np.linspace(0, 6.28, 40)) for f in (np.cos, np.sin)], axis=1
    ) - (0, 12)
    objects = [*(polygons for _, polygons in OBJECTS), [star.clip(0, (120, 90)).ravel().tolist()]]
    for g in geometries((120, 90)):
        steps = [HFlipTransform(120)] if g.flip else []
        steps += [
            T.ResizeTransform(90, 120, g.resized[1], g.resized[0], Image.BILINEAR),
            CropTransform(*g.crop[:2], 64, 64),
        ]
        own = [[np.array(polygon).reshape(-1, 2) for polygon in polygons] for polygons in objects]
        cut = [[p.ravel() for p in TransformList(steps).apply_polygons(polygons)] for polygons in own]
        theirs = PolygonMasks([polygons for polygons in cut if polygons])
        found, _, masks = objects_of(g, range(3), objects)
        np.testing.assert_allclose(found, theirs.get_bounding_boxes().tensor, atol=1e-4)
        index = torch.arange(len(found)).repeat(10)
        boxes = torch.from_numpy(found[index]) + torch.from_numpy(
            rng.normal(0, 3, (len(index), 4)).astype(np.float32)
        )
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 0.05)
        expected = theirs[index].crop_and_resize(boxes, 28)
        assert torch.equal(crop_masks(masks, index, boxes, 28).bool(), expected) and expected.any()


# --- the stream -------------------------------------------------------------------------------------------


def test_stream_is_one_permutation_after_the_other():
    indices = [stream_index(position, 7, seed=3) for position in range(21)]
    epochs = [indices[:7], indices[7:14], indices[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [stream_index(position, 7, seed=4) for position in range(21)] != indices


def test_ranks_share_an_iteration():
    assert (
        [*positions(5, 8, 0, 2), *positions(5, 8, 1, 2)] == list(positions(5, 8, 0, 1)) == list(range(40, 48))
    )


def test_samples_depend_on_seed_and_position_alone(root):
    samples = TrainSamples(read(root), RECIPE, seed=1)
    direct = [samples[i] for i in (4, 9, 2, 11)]
    for workers in (0, 2):
        steps = list(batches(samples, iter([[4, 9, 2], [11]]), workers, torch.device("cpu")))
        assert [len(step) for step in steps] == [3, 1]
        loaded = [sample for step in steps for sample in step]
        for one, other in zip(direct, loaded):
            assert (
                all(torch.equal(one[key], other[key]) for key in ("image", "boxes", "labels"))
                and one.keys() == other.keys()
            )
            cropped = [
                crop_masks(s["masks"], torch.arange(len(s["boxes"])), s["boxes"], 28) for s in (one, other)
            ]
            assert torch.equal(*cropped) and len(cropped[0])
    assert direct[0]["image"].dtype == torch.uint8 and direct[0]["labels"].min() >= 1
    others = [TrainSamples(read(root), RECIPE, seed=2)[i]["image"] for i in (4, 9, 2, 11)]
    assert not any(torch.equal(one["image"], other) for one, other in zip(direct, others))


# --- evaluation -------------------------------------------------------------------------------------------


def perfect(root, shift=0.0):
    """The ground truth as predictions, boxes moved to the right by ``shift`` widths."""
    split, predictions = read(root, "val", training=False), []
    for annotation in json.loads(annotation_file(root, "val").read_text())["annotations"]:
        if not annotation["iscrowd"]:
            picture = next(p for p in split.pictures if p.id == annotation["image_id"])
            whole = evaluation_geometry((picture.width, picture.height), max(picture.width, picture.height))
            x, y, w, h = annotation["bbox"]
            mask = encode_mask(whole.mask(annotation["segmentation"]).astype(bool))
            kept = {key: annotation[key] for key in ("image_id", "category_id")}
            predictions.append({**kept, "bbox": [x + shift * w, y, w, h], "score": 0.9, "segmentation": mask})
    return predictions


def test_perfect_predictions_have_ap_100(root):
    metrics = coco_metrics(annotation_file(root, "val"), perfect(root))
    for kind in ("box", "mask"):
        assert (
            metrics[f"{kind}_ap"] == metrics[f"{kind}_ap50"] == metrics[f"{kind}_ap75"] == pytest.approx(100)
        )
        assert set(metrics[f"{kind}_ap_classes"]) <= set(CATEGORIES.values())
        assert all(value == pytest.approx(100) for value in metrics[f"{kind}_ap_classes"].values())
        assert f"{kind}_ap_large" not in metrics  # no object has 96 x 96 pixels: undefined, and left out


def test_shifted_boxes_count_up_to_their_iou(root):
    """Moved by a quarter of the width, the IoU is .75 / 1.25 = .6: right at .5 and .55, and at .6 to
    within rounding."""
    metrics = coco_metrics(annotation_file(root, "val"), perfect(root, shift=0.26))
    assert metrics["box_ap50"] == pytest.approx(100) and metrics["box_ap75"] == 0
    assert metrics["box_ap"] == pytest.approx(20)  # 2 of the 10 thresholds: IoU .587
    assert metrics["mask_ap"] == pytest.approx(100)


def test_no_predictions_have_ap_0(root):
    metrics = coco_metrics(annotation_file(root, "val"), [])
    assert metrics["box_ap"] == metrics["mask_ap"] == 0
    box, mask = (
        f"{kind} AP 0.00 (AP50 0.00, AP75 0.00, small 0.00, medium 0.00, large nan)"
        for kind in ("box", "mask")
    )
    assert in_words(metrics) == f"{box}, {mask}"


def test_both_evaluators_agree(root, monkeypatch):
    pytest.importorskip("faster_coco_eval", reason="the second evaluator is not installed")
    predictions = perfect(root, shift=0.2)[1:]
    first = coco_metrics(annotation_file(root, "val"), predictions)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    second = coco_metrics(annotation_file(root, "val"), predictions)
    assert first.keys() == second.keys()
    assert all(second[key] == pytest.approx(value) for key, value in first.items())


def test_detections_return_to_the_pictures_own_pixels():
    detection = {
        "boxes": torch.tensor([[10.0, 5.0, 30.0, 25.0], [60.0, 20.0, 80.0, 40.0], [70.0, 0.0, 70.0, 9.0]]),
        "labels": torch.tensor([1, 3, 2]),
        "scores": torch.tensor([0.75, 0.5, 0.25]),
        "masks": torch.ones(3, 1, 28, 28),
    }
    found = as_coco(detection, (32, 64), (100, 200), (3, 7, 90))
    assert [p["category_id"] for p in found] == [3, 90]  # the third is empty
    assert found[0]["score"] == 0.75
    scale_x, scale_y = 200 / 64, 100 / 32
    assert found[0]["bbox"] == pytest.approx([10 * scale_x, 5 * scale_y, 20 * scale_x, 20 * scale_y])
    assert found[1]["bbox"] == pytest.approx(
        [60 * scale_x, 20 * scale_y, 200 - 60 * scale_x, 100 - 20 * scale_y]
    )  # clipped
    mask = decode_rle(found[0]["segmentation"])
    assert (
        mask.shape == (100, 200) and np.abs(boxes_of(mask[None])[0] - [31.25, 15.6, 93.75, 78.1]).max() <= 2
    )
    json.dumps(found)


@needs_detectron2
def test_pasted_masks_equal_detectron2():
    """Probabilities to 1e-5, and every bit of the masks; boxes at the edges, of any size, as thin as they
    come."""
    from detectron2.layers import paste_masks_in_image
    from detectron2.layers.mask_ops import _do_paste_mask

    rng, (height, width) = torch.Generator().manual_seed(0), (60, 90)
    corner, side = (
        torch.rand(40, 2, generator=rng) * torch.tensor([90, 60]),
        torch.rand(40, 2, generator=rng) * 60 + 0.01,
    )
    boxes = torch.cat([corner, (corner + side).minimum(torch.tensor([90.0, 60]))], dim=1)
    boxes[0], boxes[1], boxes[2, 2:] = (
        torch.tensor([0.0, 0, 90, 60]),
        torch.tensor([3.0, 4, 31, 32]),
        boxes[2, :2] + 1e-4,
    )
    masks = F.avg_pool2d(torch.rand(40, 1, 84, 84, generator=rng), 3)[:, 0] + torch.linspace(-0.4, 0.4, 28)
    expected = paste_masks_in_image(masks, boxes, (height, width))
    for mask, box, bits in zip(masks, boxes, expected):
        rows, columns, chances = paste_mask(mask, box, (height, width))
        part, where = _do_paste_mask(mask[None, None], box[None], height, width)
        found, whole = torch.zeros(2, height, width)
        found[rows, columns], whole[where] = chances, part[0]
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
        assert torch.equal(found >= 0.5, bits)
    assert expected.any(dim=(1, 2)).sum() > 30
