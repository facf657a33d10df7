"""Folders of one's own masks: labels are what the file says, for training and evaluation alike."""

import json

import numpy as np
import pytest
from label_set_fixture import VOID_ROWS, save_map, scene, write_folder
from PIL import Image
from tool_fixture import load_tool

from pretrain.data.datasets import kind_of, mask_rule, open_label_set, open_label_sets
from pretrain.errors import UserError

ROAD, CAR, SKY = (128, 64, 128), (0, 0, 142), (70, 130, 180)


def rule(map=None, **words):
    return mask_rule(map=",".join(f"{value}={label}" for value, label in (map or {}).items()), **words)


def classes_of(index, numbers):
    """What an item should hold: the fixture's class k as ``numbers[k]``, 0 in the strip of void."""
    _, classes = scene(index, len(numbers))
    return np.array([*numbers, 0])[classes]


def check(found, first, numbers):
    for index in range(len(found)):
        np.testing.assert_array_equal(found.read(index)[1], classes_of(first + index, numbers))


# --- labels, names, numbers -------------------------------------------------------------------------------


def test_labels_are_what_the_file_says(tmp_path):
    root = write_folder(tmp_path / "set", values=(0, 3, 7, 10))
    train, val = open_label_sets(root)
    assert val.classes == tuple(f"class {k}" for k in range(11)) and val.table[255] == 0
    assert val.description == "11 classes, named by their numbers, not counted: 255"
    assert val.values == tuple(range(11)) and train.classes == open_label_set(root, "val").classes
    check(train, 0, (1, 4, 8, 11))
    check(val, 1000, (1, 4, 8, 11))
    (root / "classes.txt").write_text("".join(f"name {k}\r\n" for k in range(11)))
    assert open_label_sets(root)[0].classes[10] == "name 10"
    assert open_label_set(root, "val").description == "11 classes, named by classes.txt, not counted: 255"


def test_void_and_map_of_the_options(tmp_path):
    root = write_folder(tmp_path / "set", values=(0, 1, 2, 255), void=9)
    train, val = open_label_sets(root, masks=rule(void="0,9", map={"255": "3"}))
    assert val.classes == ("class 1", "class 2", "class 3") and val.values == (1, 2, 255)
    check(val, 1000, (0, 1, 2, 3))
    assert "not counted: ['0', '9']" in val.source and "255: 3" in val.source  # another rule, another result
    assert (
        open_label_set(root, "train", n_classes=3, masks=rule(void="0,9", map={"255": "3"})).values
        == val.values
    )


def test_a_value_of_the_map_that_no_mask_holds(tmp_path):
    root = write_folder(tmp_path / "set", values=(0, 1))
    for found in (
        open_label_sets(root, masks=rule({"7": "3"}))[0],
        open_label_set(root, "train", masks=rule({"7": "3"})),
    ):
        assert found.classes == ("class 0", "class 1") and len(found) == 6
        check(found, 0, (1, 2))


def test_sixteen_bits_and_more_than_255_classes(tmp_path):
    root = write_folder(tmp_path / "set", values=(1, 255, 256, 1000), void=65535)
    with pytest.raises(UserError, match="is 255 a label, .* hold 65535, too.*--void 255 or --void 65535"):
        open_label_sets(root)
    _, val = open_label_sets(root, masks=rule(void="65535"))
    assert len(val.classes) == 1001
    check(val, 1000, (2, 256, 257, 1001))
    assert len(open_label_set(root, "val", n_classes=1001, masks=rule(void="65535")).classes) == 1001


# --- labels.yaml ------------------------------------------------------------------------------------------


def test_labels_yaml_merges_renames_and_ignores(tmp_path):
    root = write_folder(tmp_path / "set", values=(7, 8, 11, 19), void=255)
    (root / "labels.yaml").write_text("map: {11: car, 7: road, 8: road}\nvoid: [19, 255]\n")
    train, val = open_label_sets(root)
    assert val.classes == ("car", "road") and val.values == (11, 8)
    assert val.description == "2 classes, named by labels.yaml, not counted: 19, 255"
    check(val, 1000, (2, 2, 1, 0))
    (root / "labels.yaml").write_text(
        "classes: [road, car]\nmap: {11: 1, 7: road, 8: 0, 19: void, 255: void}\n"
    )
    check(open_label_sets(root)[0], 0, (1, 1, 2, 0))
    save_map(root / "masks" / "train" / "0.png", np.full((64, 80), 3))
    with pytest.raises(
        UserError, match=r"0\.png holds the value 3, .*--map VALUE=LABEL or --void VALUE, or .*labels.yaml"
    ):
        open_label_sets(root)[0].read(0)


def test_colors_are_classes(tmp_path):
    root = write_folder(tmp_path / "set", values=(0, 1, 2))
    for path in (root / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        colors = np.zeros((256, 3), np.uint8)
        colors[:3] = ROAD, CAR, SKY
        Image.fromarray(colors[labels]).save(path)
    with pytest.raises(UserError, match=r"has 3 channels; say in labels.yaml what its colors mean"):
        open_label_sets(root)
    (root / "labels.yaml").write_text(
        "classes: [road, sky]\nmap:\n  '128,64,128': road\n  '#00008e': road\n  70,130,180: sky\nvoid: ['#000000']\n"
    )
    train, val = open_label_sets(root)
    check(train, 0, (1, 1, 2))
    assert val.values == (ROAD, SKY) and val.void == "#000000"
    Image.fromarray(np.full((64, 80, 3), 7, np.uint8)).save(root / "masks" / "train" / "0.png")
    with pytest.raises(UserError, match=r"0\.png holds the color #070707, which labels.yaml does not name"):
        open_label_sets(root)


# --- where the files are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["images", "img", "JPEGImages"])
@pytest.mark.parametrize("masks", ["annotations", "masks", "labels", "SegmentationClass"])
@pytest.mark.parametrize(
    "parts", [("train", "val"), ("training", "validation"), ("train", "valid"), ("train", "test")]
)
def test_every_name_of_the_folders(tmp_path, images, masks, parts):
    root = write_folder(tmp_path / "set", 2, 1)
    (root / "images").rename(root / images)
    (root / "masks").rename(root / masks)
    for kind in (images, masks):
        for ours, theirs in zip(("train", "val"), parts):
            (root / kind / ours).rename(root / kind / theirs)
    assert kind_of(root) == "folder" and [len(part) for part in open_label_sets(root)] == [2, 1]


def test_parts_around_images_and_masks_and_folders_within(tmp_path):
    root = write_folder(tmp_path / "set", 3, 2)
    for part in ("train", "val"):
        (root / part).mkdir()
        for kind in ("images", "masks"):
            inner = root / part / kind / "city" / "day"
            inner.parent.mkdir(parents=True)
            (root / kind / part).rename(inner)
    (root / "images").rmdir()
    (root / "masks").rmdir()
    train, val = open_label_sets(root)
    assert [len(train), len(val)] == [3, 2] and train.files[0][0].endswith("train/images/city/day/0.jpg")
    check(train, 0, (1, 2, 3, 4))


def test_every_suffix_of_images_together(tmp_path):
    root = write_folder(tmp_path / "set", 7, 2)
    for index, suffix in enumerate((".jpg", ".JPG", ".jpeg", ".png", ".webp", ".bmp", ".tif")):
        file = root / "images" / "train" / f"{index}.jpg"
        picture = Image.open(file)
        picture.load()
        file.unlink()
        picture.save(file.with_suffix(suffix))
    train, _ = open_label_sets(root)
    check(train, 0, (1, 2, 3, 4))
    (root / "images" / "train" / "6.tif").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"6\.tif cannot be read"):
        train.read(6)


@pytest.mark.parametrize(
    "name, given", [("{}_mask", ""), ("{}_L", ""), ("{}_seg", "{stem}_seg.png"), ("m_{}", "m_{stem}.png")]
)
def test_every_name_of_a_mask(tmp_path, name, given):
    root = write_folder(tmp_path / "set", 2, 2)
    for path in (root / "masks").rglob("*.png"):
        path.rename(path.with_stem(name.format(path.stem)))
    (root / "masks" / "train" / f"{name.format('9')}.png").touch()
    with pytest.raises(UserError, match=r"1 label maps have no image in .*train; the first: 9"):
        open_label_sets(root, masks=rule(mask_name=given))
    (root / "masks" / "train" / f"{name.format('9')}.png").unlink()
    check(open_label_sets(root, masks=rule(mask_name=given))[0], 0, (1, 2, 3, 4))
    if given:
        (root / "masks" / "train" / "0_color.png").write_bytes(b"another kind of file")
        assert len(open_label_sets(root, masks=rule(mask_name=given))[0]) == 2
        (root / "labels.yaml").write_text(f"mask_name: '{given}'\n")
        assert len(open_label_sets(root)[0]) == 2


# --- what is refused --------------------------------------------------------------------------------------


def only(*values):
    def spoil(root):
        for path in (root / "masks").rglob("*.png"):
            save_map(path, np.resize(np.array(values), np.array(Image.open(path)).shape))

    return spoil


def wrote(name, text):
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "masks", "message"),
    [
        (only(0, 255), {}, r"hold 0 and 255 alone, .*if 255 is the foreground, it must be 1: give --map 255=1$"),
        (only(3, 255), {}, r"fewer than two classes are ever seen in its 5 masks, which hold \[3, 255\]"),
        (only(255), {}, r"fewer than two classes are ever seen"),
        (wrote("classes.txt", "a\nb\nc\n"), {}, r"names 3 labels, 0 to 2, but .*\.png holds 3: name it \(line k names label k"),
        (wrote("classes.txt", "a\nb\nc\nd\ne\n"), {}, r"names the labels 0 to 4, but the largest in 5 masks is 3; .* --classes 5 "),
        (wrote("classes.txt", "a\n\nb\nc\n"), {}, r"classes.txt: line 2 is empty; line k names label k, from 0$"),
        (wrote("classes.txt", "a\nb\nc\na\n"), {}, r"classes.txt: the lines 1 and 4 name one class; give each its own name$"),
        (None, dict(void="3", map={"3": "1"}), r"3 stands in --map and in --void"),
        (None, dict(void="x"), r"--void: 'x' is no value from 0 to 65535, and no color such as '#804080'"),
        (None, dict(map={"70000": "1"}), r"--map: '70000' is no value"),
        (None, dict(mask_name="{stem}_seg.png"), r"no mask is called {stem}_seg.png; one is .*masks"),
        (wrote("classes.txt", "a\nb\nc\nd\n"), dict(map={"3": "e"}), r"value 3 has the label 'e'; there are 0 to 3, a, b"),
        (wrote("labels.yaml", "class: [a, b]\n"), {}, r"labels.yaml: unknown key 'class'"),
        (wrote("labels.yaml", "classes: [a, b, c]\nmap: {0: a, 1: b}\n"), {}, r"no value of map is class 'c'; name one"),
        (wrote("labels.yaml", "map: {0: a, '#000001': b}\n"), {}, r"values and colors are both named"),
        (lambda r: (r / "labels").mkdir() or (r / "labels" / "train").mkdir(), {}, r"has masks/train and labels/train: take one"),
    ],
)  # fmt: skip
def test_what_is_refused_says_the_way_on(tmp_path, spoil, masks, message):
    root = write_folder(tmp_path / "set", 3, 2)
    if spoil:
        spoil(root)
    with pytest.raises(UserError, match=message) as error:
        open_label_sets(root, masks=rule(**masks))
    assert "\n" not in str(error.value)


def test_the_ways_on_work(tmp_path):
    root = write_folder(tmp_path / "set", 3, 2)
    only(0, 255)(root)
    assert open_label_sets(root, masks=rule(map={"255": "1"}))[0].values == (0, 255)
    root = write_folder(tmp_path / "more", 3, 2)
    (root / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert open_label_sets(root, n_classes=5)[0].classes == tuple("abcde")


def test_a_name_of_a_mask_is_a_pattern():
    with pytest.raises(UserError, match="mask_name=.*seg.png"):
        rule(mask_name="seg.png")


def test_a_rule_for_a_public_set_is_refused(tmp_path):
    from label_set_fixture import write_ade

    root = write_ade(tmp_path)
    with pytest.raises(UserError, match="a rule for masks has no effect on ade20k; .*the set is folder"):
        open_label_sets(root, masks=rule(void="0"))
    (root / "labels.yaml").write_text("void: [0]\n")
    with pytest.raises(UserError, match="labels.yaml has no effect on ade20k"):
        open_label_sets(root)


# --- the same folder, trained and evaluated ---------------------------------------------------------------


def test_training_evaluation_and_pictures_agree(tmp_path):
    """A set with the labels 0 .. 10 and names: the classes, of which each IoU is, what is said of them, and the
    pixels of each class in what both read."""
    pytest.importorskip("mmseg")
    pytest.importorskip("seg_plugin")
    from seg_fixture import FLAGS, TINY

    from pretrain.build import build_backbone
    from pretrain.results.schema import read_result
    from pretrain.weights import save_backbone
    from seg_plugin.predict import dataset_of_run, load_segmenter, segment_dataset

    root = write_folder(tmp_path / "set", 4, 2, values=(0, 4, 9, 10))
    names = tuple(f"name {k}" for k in range(11))
    (root / "classes.txt").write_text("\n".join(names))
    vit = build_backbone("vit_tiny_patch16", **FLAGS)
    weights = save_backbone(
        tmp_path / "w.safetensors", vit.state_dict(), name="vit_tiny_patch16", model_kwargs=vit.model_kwargs
    )
    common = ["--weights", str(weights), "--data", str(root), "--device", "cpu"]
    numbers = {k: v for k, v in TINY.items() if k not in ("num_classes", "reduce_zero_label")} | {
        "max_iters": 1
    }
    words = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in numbers.items()]
    load_tool("segment").main(
        [*common, "--output", str(tmp_path / "seg"), "--workers", "0", "val_every=1", *words]
    )
    load_tool("evaluate dense").main(
        [
            *common,
            "--output",
            str(tmp_path / "dense"),
            "--tasks",
            "linear",
            "linear.epochs=1",
            "linear.image_px=64",
        ]
    )
    trained, evaluated = read_result(tmp_path / "seg"), read_result(tmp_path / "dense")
    assert trained.labels == evaluated.labels == "11 classes, named by classes.txt, not counted: 255"
    assert json.loads((tmp_path / "seg" / "result.json").read_text())["labels"] == evaluated.labels
    ious = trained.metrics["iou"], evaluated.metrics["linear_class_iou"]
    assert all({"name 0", "name 4", "name 9", "name 10"} <= set(iou) <= set(names) for iou in ious)
    segmenter, val = load_segmenter(tmp_path / "seg", "cpu"), open_label_sets(root)[1]
    assert segmenter.classes == val.classes == names
    shown = segment_dataset(segmenter.model, dataset_of_run(segmenter.model, "validation"), [0, 1])
    for index, row in enumerate(shown):
        _, labels = val.read(index)
        np.testing.assert_array_equal(np.where(row.truth == 255, 0, row.truth + 1), labels)
        _, stored = scene(1000 + index, 4)
        np.testing.assert_array_equal(row.truth, np.array([0, 4, 9, 10, 255])[stored])
        assert (row.truth == 255).any() and VOID_ROWS
        seen = segmenter.predict(row.path)
        assert np.array_equal(seen.labels, row.predicted) and seen.classes == names
        assert np.array_equal(segmenter.predict(Image.open(row.path)).labels, row.predicted)
        assert np.array_equal(segmenter.predict(row.pixels).labels, row.predicted)
    with pytest.raises(UserError, match=r"image: float64 \[4, 4\] is not uint8 \[H, W, 3\]"):
        segmenter.predict(np.zeros((4, 4)))


def test_predictions_are_stored_as_the_masks_are(tmp_path):
    pytest.importorskip("mmseg")
    pytest.importorskip("seg_plugin")
    from seg_plugin.figures import save_labels

    labels, palette = np.array([[0, 1]]), np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    for values, mode in (((7, 255), "P"), ((7, 1000), "I;16"), ((ROAD, CAR), "RGB")):
        save_labels(tmp_path / "a.png", labels, palette, values)
        saved = Image.open(tmp_path / "a.png")
        assert saved.mode == mode and np.array_equal(np.array(saved)[0], np.array(values))
