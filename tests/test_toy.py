"""The toy data: exact masks in COCO and ADE20K form, disjoint photographs, and a folder that is whole or
refused."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pretrain.data import toy, toy_sets
from pretrain.errors import UserError

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

COUNTS = {"n_images": 2, "n_train": 6, "n_val": 4, "size_px": 96}
TOOL = Path(__file__).resolve().parents[1] / "tools" / "make_toy_data.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    assert toy_sets.write_toy_data(path, **COUNTS, seed=0)["written"]
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decode(segmentation, height, width):
    mask = pytest.importorskip("pycocotools.mask")
    return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width))).astype(bool)


def read_rgb(path):
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


# Images


def test_a_picture_depends_on_its_arguments_alone():
    first = toy.compose(3, "train", 0, 96)
    toy.compose(4, "train", 0, 96)
    again = toy.compose(3, "train", 0, 96)
    assert np.array_equal(first.image, again.image) and first.classes == again.classes
    assert all(np.array_equal(a, b) for a, b in zip(first.masks, again.masks))
    for other in ((2, "train", 0, 96), (3, "pretrain", 0, 96), (3, "train", 1, 96)):
        picture = toy.compose(*other)
        assert picture.image.shape != first.image.shape or not np.array_equal(picture.image, first.image)


@pytest.mark.parametrize("split", toy.SPLITS)
def test_pictures_hold_what_they_promise(split):
    seen_classes, counts = set(), set()
    for index in range(40):
        picture = toy.compose(index, split, 7, 80)
        height, width = picture.image.shape[:2]
        assert picture.image.dtype == np.uint8 and picture.image.shape == (height, width, 3)
        assert min(height, width) == 80 and 80 <= max(height, width) <= 107
        assert len(picture.masks) == len(picture.classes)
        assert all(mask.shape == (height, width) and mask.dtype == bool for mask in picture.masks)
        assert all(mask.sum() >= toy.MIN_AREA_PX for mask in picture.masks)
        assert np.sum(picture.masks, axis=0).max() == 1  # the visible parts are disjoint
        assert picture.photographs <= set(toy.photographs_of(split))
        seen_classes |= set(picture.classes)
        counts.add(len(picture.masks))
    assert seen_classes == set(range(len(toy.CLASSES)))
    assert 1 <= min(counts) and 3 < max(counts) <= toy.MAX_OBJECTS


def test_validation_uses_photographs_that_training_never_uses():
    train, val = toy.photographs_of("train"), toy.photographs_of("val")
    assert not set(train) & set(val)
    assert toy.photographs_of("pretrain") == train
    assert sorted(train + val) == sorted(toy.photographs())
    assert {"motorcycle_left", "motorcycle_right"} <= set(train)  # one scene, seen twice
    assert all(path.is_file() for path in toy.photographs().values())


def _disc(x, radius):
    alpha = np.zeros((100, 100), np.float32)
    cv2.circle(alpha, (x, 50), radius, 1.0, -1)
    return toy._Object(0, np.array([x, 50.0]), float(radius), alpha)


def test_a_hidden_object_is_left_out_and_covers_nothing():
    back, hidden, front = _disc(40, 20), _disc(48, 8), _disc(50, 12)
    kept = toy._visible([back, hidden, front])
    assert [item for item, _ in kept] == [back, front]
    assert np.array_equal(kept[0][1], (back.alpha > 0) & ~(front.alpha > 0))
    assert np.array_equal(kept[1][1], front.alpha > 0)
    assert toy._visible([_disc(50, 3)]) == []  # 29 pixels


# Annotations


def _hard_masks():
    random = np.random.default_rng(0)
    yield np.ones((5, 7), bool)
    yield np.eye(6, dtype=bool)  # parts that touch at corners only
    single = np.zeros((4, 4), bool)
    single[3, 3] = True
    yield single
    yield np.pad(~single, 1)  # a hole at the corner of a block
    ring = np.ones((9, 9), bool)
    ring[2:7, 2:7] = False
    ring[4, 4] = True  # an island in the hole
    yield ring
    touching = np.array(
        [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]], bool
    )  # the outline meets itself
    yield touching
    for density in (0.3, 0.5, 0.7, 0.9):
        yield random.random((13, 17)) < density


@pytest.mark.parametrize("mask", _hard_masks())
def test_polygons_of_hard_masks_decode_exactly(mask):
    polygons = toy_sets.mask_to_polygons(mask)
    assert np.array_equal(decode(polygons, *mask.shape), mask)
    geometry = pytest.importorskip("shapely.geometry")
    shapes = [geometry.Polygon(np.reshape(polygon, (-1, 2))) for polygon in polygons]
    assert all(shape.is_valid for shape in shapes)  # simple: cropping keeps them as they are
    assert sum(shape.area for shape in shapes) == mask.sum()  # no pixel twice


def test_polygon_of_a_rectangle_is_its_corners():
    mask = np.zeros((6, 8), bool)
    mask[2:5, 1:7] = True
    (polygon,) = toy_sets.mask_to_polygons(mask)
    assert len(polygon) == 8
    assert {tuple(corner) for corner in np.reshape(polygon, (-1, 2))} == {(1, 2), (7, 2), (7, 5), (1, 5)}


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_annotations_equal_the_composed_masks(folder, split):
    coco_tools = pytest.importorskip("pycocotools.coco")
    coco = coco_tools.COCO(str(folder / "coco" / "annotations" / f"instances_{split}2017.json"))
    assert len(coco.imgs) == COUNTS[f"n_{split}"]
    for index, image_id in enumerate(sorted(coco.imgs)):
        picture, image = toy.compose(index, split, 0, 96), coco.imgs[image_id]
        assert (image["height"], image["width"]) == picture.image.shape[:2]
        pixels = read_rgb(folder / "coco" / f"{split}2017" / image["file_name"]).astype(int)
        assert np.abs(pixels - picture.image).mean() < 12  # JPEG
        annotations = sorted(coco.imgToAnns[image_id], key=lambda a: a["id"])
        assert [a["category_id"] for a in annotations] == [toy_sets.CATEGORY_IDS[k] for k in picture.classes]
        for annotation, mask in zip(annotations, picture.masks):
            assert annotation["iscrowd"] == 0
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["area"] == mask.sum()
            y, x = np.nonzero(mask)
            assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]


def test_coco_ids(folder):
    files = [json.loads((folder / "coco" / "annotations" / f"instances_{s}2017.json").read_text())
             for s in ("train", "val")]  # fmt: skip
    for content in files:
        assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
        assert [c["name"] for c in content["categories"]] == list(toy.CLASSES)
        category_ids = [c["id"] for c in content["categories"]]
        assert category_ids != list(range(min(category_ids), max(category_ids) + 1))  # a gap, as in COCO
        ids = [a["id"] for a in content["annotations"]]
        assert len(set(ids)) == len(ids) and min(ids) == 1  # pycocotools' evaluation takes 0 for "no match"
    assert not {i["id"] for i in files[0]["images"]} & {i["id"] for i in files[1]["images"]}


@pytest.mark.parametrize("split, ade_split", [("train", "training"), ("val", "validation")])
def test_ade_labels_agree_with_the_masks(folder, split, ade_split):
    root = folder / "ade" / "ADEChallengeData2016"
    files = sorted((root / "annotations" / ade_split).iterdir())
    assert len(files) == COUNTS[f"n_{split}"]
    jpegs = sorted((folder / "coco" / f"{split}2017").iterdir())
    for index, (path, jpeg) in enumerate(zip(files, jpegs)):
        assert (root / "images" / ade_split / f"{path.stem}.jpg").read_bytes() == jpeg.read_bytes()
        labels, picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED), toy.compose(index, split, 0, 96)
        assert labels.dtype == np.uint8 and labels.shape == picture.image.shape[:2]
        objects = np.any(picture.masks, axis=0)
        assert np.array_equal(labels == 1, ~objects)
        for mask, kind in zip(picture.masks, picture.classes):
            assert set(np.unique(labels[mask])) <= {0, kind + 2}
            inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
            assert np.all(labels[inside] == kind + 2)  # the rim is one pixel thin
        # no pixel of an object touches the background without the rim between
        edge = objects & (
            cv2.dilate((~objects).astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > 0
        )
        assert np.all(labels[edge] == 0)


# Folders


def test_same_arguments_same_bytes_other_seed_other_pictures(folder, tmp_path):
    toy_sets.write_toy_data(tmp_path / "same", **COUNTS, seed=0)
    assert contents(tmp_path / "same") == contents(folder)
    toy_sets.write_toy_data(tmp_path / "other", **COUNTS, seed=1)
    ours, others = contents(folder), contents(tmp_path / "other")
    assert set(ours) == set(others)
    assert all(
        ours[name] != others[name]
        for name in ours
        if not name.endswith(("png", "classes.txt", "labels.yaml"))
    )
    assert len([name for name in ours if name.startswith("images")]) == COUNTS["n_images"]


def test_a_picture_does_not_depend_on_how_many_there_are(folder, tmp_path):
    toy_sets.write_toy_data(tmp_path, n_images=1, n_train=2, n_val=0, size_px=96, seed=0)
    few, many = contents(tmp_path), contents(folder)
    assert all(few[name] == many[name] for name in few if Path(name).suffix in (".jpg", ".png"))
    val = json.loads(few["coco/annotations/instances_val2017.json"])
    assert val["images"] == [] and len(val["categories"]) == len(toy.CLASSES)


def test_rerun_does_nothing_and_other_arguments_are_refused(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    record = toy_sets.write_toy_data(folder, **COUNTS, seed=0)
    assert not record.pop("written") and record == json.loads((folder / "toy.json").read_text())
    with pytest.raises(UserError, match=str(folder)):
        toy_sets.write_toy_data(folder, **COUNTS, seed=1)
    with pytest.raises(UserError, match="n_train 6"):
        toy_sets.write_toy_data(folder, **{**COUNTS, "n_train": 7}, seed=0)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_overwrite_leaves_nothing_of_the_old_data(folder, tmp_path):
    toy_sets.write_toy_data(tmp_path / "a", n_images=5, n_train=1, n_val=9, size_px=64, seed=3)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    toy_sets.write_toy_data(tmp_path / "a", **COUNTS, seed=0, overwrite=True)
    assert contents(tmp_path / "a") == contents(folder) | {"notes.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_is_begun_anew(folder, tmp_path, monkeypatch, overwrite):
    if overwrite:
        toy_sets.write_toy_data(tmp_path, n_images=1, n_train=1, n_val=1, size_px=64, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(toy_sets, "ade_labels", lambda picture: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy_sets.write_toy_data(
                tmp_path, n_images=4, n_train=1, n_val=1, size_px=64, seed=3, overwrite=overwrite
            )
    assert (tmp_path / "images" / "00000003.jpg").is_file() and toy_sets.read_record(tmp_path) is None
    toy_sets.write_toy_data(tmp_path, **COUNTS, seed=0)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_others_are_left_alone(tmp_path, overwrite):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="images exists"):
        toy_sets.write_toy_data(tmp_path, **COUNTS, overwrite=overwrite)
    (tmp_path / "toy.json").write_text("[1, 2")
    with pytest.raises(UserError, match="toy.json is damaged"):
        toy_sets.write_toy_data(tmp_path, **COUNTS, overwrite=overwrite)
    assert contents(tmp_path) == {"images/holiday.jpg": b"mine", "toy.json": b"[1, 2"}
    with pytest.raises(UserError, match="holiday.jpg"):
        toy_sets.write_toy_data(tmp_path / "images" / "holiday.jpg", **COUNTS, overwrite=overwrite)


@pytest.mark.parametrize("key, value", [("n_train", -1), ("seed", -1), ("size_px", 63)])
def test_numbers_out_of_range_are_named(tmp_path, key, value):
    with pytest.raises(UserError, match=f"{key} = {value}"):
        toy_sets.write_toy_data(tmp_path / "x", **{**COUNTS, key: value})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("module, package", [("skimage", "scikit-image"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(UserError, match=rf"in {package}.*pip install 'posfield\[demo\]'"):
        toy_sets.write_toy_data(tmp_path / "x", **COUNTS)
    assert not (tmp_path / "x").exists()


def test_the_tool(folder, tmp_path):
    def call(*options):
        arguments = ["--images", "2", "--train", "6", "--val", "4", "--size", "96", *options]
        return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)

    made = call("--output", str(tmp_path / "a"))
    assert made.returncode == 0 and "2 pictures" in made.stdout
    assert contents(tmp_path / "a") == contents(folder)
    assert "nothing to do" in call("--output", str(tmp_path / "a")).stdout
    unsupported = call("--output", str(tmp_path / "a"), "--seed", "1")
    assert unsupported.returncode == 2 and unsupported.stdout == ""
    assert unsupported.stderr.startswith("error: ") and str(tmp_path / "a") in unsupported.stderr
    assert call("--output", str(tmp_path / "a"), "--seed", "1", "--overwrite").returncode == 0
