"""Masks as tools and people lay them out: each layout gives the labels of the plain one, or is refused with the way on."""

import json

import numpy as np
import pytest
from label_set_fixture import save_scene, scene, write_folder
from PIL import Image
from tool_fixture import ended, load_tool

from posfield.cli.check import task_of
from pretrain.data import share
from pretrain.data.datasets import kind_of, mask_rule, open_label_set, open_label_sets
from pretrain.errors import UserError

COLORS = np.array([(0, 0, 0), (61, 245, 61), (250, 50, 83), (140, 120, 240)], np.uint8)
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nant:61,245,61::\nbee: a:250,50,83:leg:\ncat:140,120,240::\n"
NAMES = ("background", "ant", "bee", "cat")
CSV = "Pixel Value, Class\n0, background\n1, ant\n2, bee\n3, cat\n"
YAML = """
train: {images: ../images/train, masks: masks/train}
val: {images: ../images/val, masks: masks/val}
classes: {0: background, 10: ant, 20: bee, 30: cat, 40: dog}
"""


PLAIN = ("images/train", "masks/train", "images/val", "masks/val")


def moved(root, *places):
    """The plain set (6 and 3 images), with images and masks of the parts elsewhere."""
    write_folder(root)
    for plain, place in zip(PLAIN, places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / plain).rename(root / place)
    for kind in ("images", "masks"):
        if not any((root / kind).iterdir()):
            (root / kind).rmdir()
    return root


def write_beside(root, parts=("train", "valid")):
    """Roboflow's."""
    for part, indices in zip(parts, (range(6), range(1000, 1003))):
        for i in indices:
            save_scene(
                i, root / part / f"{i}_png.rf.{i}.jpg", root / part / f"{i}_png.rf.{i}_mask.png", range(4), 0
            )
        (root / part / "_classes.csv").write_text(CSV)
    return root


def write_cvat(root, lists=("train", "val"), gray=False):
    for name, indices in zip(lists, (range(6), range(1000, 1003))):
        stems = [f"day 1/{i}" for i in indices]
        for i, stem in zip(indices, stems):
            image, mask = root / f"JPEGImages/{stem}.jpg", root / f"SegmentationClass/{stem}.png"
            save_scene(i, image, mask, range(4), 0)
            if not gray:
                Image.fromarray(COLORS[np.array(Image.open(mask))]).save(mask)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        quoted = "".join(f'"{stem}"\n' for stem in stems)
        with (root / f"ImageSets/Segmentation/{name}.txt").open("a") as file:
            file.write(quoted)
    (root / "labelmap.txt").write_text(LABELMAP)
    return root


def check(found, void=0):
    """Each item is its scene: the class k of the fixture is label k + 1, its strip of void ``void``."""
    for index, (image, _) in enumerate(found.files):
        stem = image.rpartition("/")[2].split(".")[0].split("_")[0]
        _, classes = scene(int(stem), 4)
        np.testing.assert_array_equal(found.read(index)[1], np.array([1, 2, 3, 4, void])[classes])


# --- folders ----------------------------------------------------------------------------------------------

# Of training images and masks, and of those of the validation
PLACES = {
    "COCO's": ("images/train2017", "masks/train2017", "images/val2017", "masks/val2017"),
    "prepped": (
        "images_prepped_train",
        "annotations_prepped_train",
        "images_prepped_test",
        "annotations_prepped_test",
    ),
    "split first": ("train_images", "train_masks", "val_images", "val_labels"),
    "around": ("train/images", "train/masks", "valid/images", "valid/masks"),
    "CVAT's words": ("Images/Train", "Masks/Train", "Images/Validation", "Masks/Validation"),
    "images alone": ("train", "train_labels", "val", "val_labels"),
    "joined": ("train", "trainannot", "val", "valannot"),
    "twice": ("train2017/train_images", "train2017/mask-train", "val_1/img", "val_1/masks"),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_words_of_the_folders(tmp_path, places):
    root = moved(tmp_path / "set", *places)
    assert kind_of(root) == "folder" and task_of(root) == "segment"
    train, val = open_label_sets(root)
    assert [len(train), len(val)] == [6, 3] and val.folder == str(root / places[2])
    check(train)
    check(val)


def test_a_plain_folder_goes_before_other_names(tmp_path):
    root = write_folder(tmp_path / "set")
    for name in ("images/train_old", "masks/train_old", "masks_train", "train2017"):
        (root / name).mkdir()
    assert [len(part) for part in open_label_sets(root)] == [6, 3]
    flat = write_folder(tmp_path / "flat", flat=True)
    for name in ("images/train2017", "masks_train"):
        (flat / name).mkdir()
    assert [len(part) for part in open_label_sets(flat)] == [6, 3]


def test_test_is_the_validation_where_no_other_is(tmp_path):
    root = moved(tmp_path / "set", *PLAIN[:2], "images_test", "masks_test")
    assert open_label_set(root, "val").folder.endswith("images_test")
    write_folder(tmp_path / "more")
    for kind in ("images", "masks"):
        (tmp_path / "more" / kind / "val").rename(root / f"{kind}_val")
    assert open_label_set(root, "val").folder.endswith("images_val")


@pytest.mark.parametrize(
    ("places", "more", "message"),
    [
        (PLACES["prepped"], ["masks_train"], r"set has annotations_prepped_train and masks_train: take one away"),
        (PLACES["COCO's"], ["images/train_2014"], r"set has images/train2017 and images/train_2014: take one away"),
        (("images_train", "gt"), [], r"masks has no folder train or training, which .*set has"),
        ((*PLAIN[:2], "photos", "truth"), [], r"set has neither images/val or .* nor val\.txt, .*train/NAME_mask\.png"),
    ],
)  # fmt: skip
def test_what_is_refused_says_the_way_on(tmp_path, places, more, message):
    root = moved(tmp_path / "set", *places)
    for name in more:
        (root / name).mkdir()
    with pytest.raises(UserError, match=message) as error:
        open_label_sets(root, "folder")
    assert "\n" not in str(error.value)


# --- Roboflow ---------------------------------------------------------------------------------------------


def test_image_and_mask_side_by_side(tmp_path):
    root = write_beside(tmp_path / "set")
    assert kind_of(root) == "folder" and task_of(root) == "segment"
    train, val = open_label_sets(root)
    assert train.classes == val.classes == NAMES and [len(train), len(val)] == [6, 3]
    assert val.description == "4 classes, named by train/_classes.csv, not counted: 255"
    check(train, void=1)
    check(val, void=1)


def test_the_suffix_may_be_another(tmp_path):
    root = write_beside(tmp_path / "set")
    for path in root.rglob("*_mask.png"):
        path.rename(path.with_name(path.name.replace("_mask", "_seg")))
    with pytest.raises(UserError, match="no labeled set that is known"):
        open_label_sets(root)
    check(open_label_sets(root, "folder", masks=mask_rule(mask_name="{stem}_seg.png"))[0], void=1)


def wrote(root, text):
    for file in root.rglob("*.csv"):
        file.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "train_masks").mkdir(), r"has masks beside images in train, and train_masks: take one away"),
        (lambda r: (r / "train/3_png.rf.3_mask.png").unlink(), r"1 images have no label map in .*train;"),
        (lambda r: (r / "valid/_classes.csv").write_text(CSV + "4, dog\n"), r"csv and .*valid/_classes.csv name other classes"),
        (lambda r: wrote(r, CSV[:-7]), r"holds the value 3, which train/_classes.csv does not name"),
        (lambda r: wrote(r, CSV + "1, dog\n"), r"train/_classes.csv: row 6 is no value of its own"),
        (lambda r: wrote(r, CSV + "x, dog\n"), r"train/_classes.csv: 'x' is no value from 0"),
        (lambda r: wrote(r, CSV + "4, ant\n"), r"train/_classes.csv: two of its classes are called 'ant'"),
    ],
)  # fmt: skip
def test_sides_that_are_refused(tmp_path, spoil, message):
    root = write_beside(tmp_path / "set")
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        open_label_sets(root)
    assert "\n" not in str(error.value)


# --- CVAT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", [("train", "val"), ("Train", "Validation"), ("train", "Test")])
@pytest.mark.parametrize("gray", [False, True])
def test_cvats_export(tmp_path, lists, gray):
    root = write_cvat(tmp_path / "set", lists, gray)
    assert kind_of(root) == "folder" and task_of(root) == "segment"
    train, val = open_label_sets(root)
    assert train.classes == ("background", "ant", "bee: a", "cat") and train.named_by == "labelmap.txt"
    assert [len(train), len(val)] == [6, 3] and val.values[1] == (1 if gray else (61, 245, 61))
    check(train, void=1)
    check(val, void=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LABELMAP + "dog\n", r"labelmap.txt: line 6 is no name:r,g,b::; write labels.yaml, which goes before it"),
        (LABELMAP + "dog:0,0,0::\n", r"labelmap.txt: line 6 gives a second class the color 0,0,0"),
        (LABELMAP.replace("61,245,61", "61,245"), r"labelmap.txt: '61,245' is no value from 0 .*, and no color"),
        (LABELMAP.replace("cat:140", "cat:141"), r"holds the color #8c78f0, which labels.yaml does not name, nor a tool's"),
    ],
)  # fmt: skip
def test_label_maps_that_are_refused(tmp_path, text, message):
    root = write_cvat(tmp_path / "set")
    (root / "labelmap.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_label_sets(root)


# --- names ------------------------------------------------------------------------------------------------


def test_names_by_value_and_what_goes_before_them(tmp_path):
    root = write_folder(tmp_path / "set", values=(0, 10, 20, 30))
    (root / "config.yaml").write_text("train: images/train\nclasses: {0: a, 1: b}\n")  # any other tool's
    assert open_label_sets(root)[0].named_by == "their numbers"
    (root / "config.yaml").write_text(YAML)
    train, val = open_label_sets(root)
    assert train.classes == (*NAMES, "dog") and val.named_by == "config.yaml"
    check(train)
    (root / "config.yaml").write_text(YAML + "ignore_classes: [0, 40]\n")
    train, val = open_label_sets(root)
    assert train.classes == NAMES[1:] and val.void == "0, 40, 255"
    assert train.values == (10, 20, 30)
    (root / "config.yaml").write_text(YAML.replace("ant", "{name: ant, values: [10, 11]}"))
    with pytest.raises(UserError, match="config.yaml: its classes are no list .*; write labels.yaml"):
        open_label_sets(root)
    (root / "config.yaml").write_text(YAML)
    (root / "_classes.csv").write_text(CSV)
    with pytest.raises(UserError, match="has _classes.csv and config.yaml, which both say what masks mean"):
        open_label_sets(root)
    (root / "labels.yaml").write_text("map: {0: a, 10: b, 20: b, 30: b}\n")
    assert open_label_sets(root)[0].classes == ("a", "b")
    (root / "labels.yaml").unlink()
    (root / "classes.txt").write_text("".join(f"name {k}\n" for k in range(31)))
    assert open_label_sets(root)[0].classes[30] == "name 30"


@pytest.mark.parametrize("names", ["[background, ant, bee, cat]", "{0: background, 1: ant, 2: bee, 3: cat}"])
def test_ultralytics_names(tmp_path, names):
    root = write_folder(tmp_path / "set")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")  # of boxes
    assert open_label_sets(root)[0].named_by == "their numbers"
    with (root / "data.yaml").open("a") as file:
        file.write("masks_dir: masks\n")
    train, _ = open_label_sets(root)
    assert train.classes == NAMES and train.named_by == "data.yaml"
    check(train)


def test_colors_by_name_and_a_void_among_them(tmp_path):
    root = moved(tmp_path / "set", *PLACES["images alone"])
    for path in root.glob("*_labels/*.png"):
        labels = np.minimum(np.array(Image.open(path)), 4)
        Image.fromarray(np.vstack([COLORS, COLORS[:1] + 7])[labels]).save(path.with_stem(f"{path.stem}_L"))
        path.unlink()
    (root / "train.txt").write_text("/where/it/was/train/0.jpg\n")
    text = "name, r, g, b\nbackground, 0, 0, 0\nant, 61, 245, 61\nbee, 250, 50, 83\ncat, 140, 120, 240\n"
    (root / "class_dict.csv").write_text(text + "Void,7,7,7\n")
    train, val = open_label_sets(root)
    assert train.classes == NAMES and val.void == "#070707" and val.named_by == "class_dict.csv"
    check(train)
    check(val)
    (root / "class_dict.csv").write_text(text + "dog,0,0,0\n")
    with pytest.raises(UserError, match="class_dict.csv: two classes have one color; write labels.yaml"):
        open_label_sets(root)


# --- one part ---------------------------------------------------------------------------------------------


def write_whole(root):
    return moved(root, *PLAIN[:2], "images/train/a", "masks/train/a")


def flat(root):
    write_folder(root, flat=True)
    for name in ("train.txt", "val.txt"):
        (root / name).unlink()
    return root


ONE_PART = {
    "train alone": lambda root: write_beside(root, ("train", "train")),
    "no list": flat,
    "CVAT's default": lambda root: write_cvat(root, ("default", "default")),
    "folders within": write_whole,
}


@pytest.mark.parametrize("write", ONE_PART.values(), ids=ONE_PART)
def test_a_set_of_one_part_is_divided(tmp_path, write):
    root = write(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"set has neither .*; of a set that has one part, give --val-share 0\.2"
    ):
        open_label_sets(root)
    whole = [name for part in open_label_sets(root, masks=mask_rule(val_share=0.5)) for name in part.named]
    train, val = open_label_sets(root, masks=mask_rule(val_share=0.3))
    assert sorted([*train.named, *val.named]) == sorted(whole) and not train.named.keys() & val.named.keys()
    places = {name: share.place(name.lstrip("/")) for name in whole}
    assert {places[name] for name in val.named} == share.of_validation(places.values(), 0.3)
    assert "divided by --val-share 0.3" in val.source and train.val_share == 0.3
    (root / "labels.yaml").write_text("val_share: 0.3\n")
    if not (root / "labelmap.txt").exists():  # whose colors labels.yaml would have to name
        assert open_label_set(root, "val").files == val.files


def test_a_share_moves_nothing_of_two_parts(tmp_path):
    root = write_folder(tmp_path / "set")
    train, val = open_label_sets(root, masks=mask_rule(val_share=0.5))
    assert [len(train), len(val)] == [6, 3] and val.val_share == 0 and "divided" not in val.source


def test_one_list_too_many(tmp_path):
    root = write_cvat(tmp_path / "set", ("first", "second"))
    with pytest.raises(UserError, match="has first.txt and second.txt: call them train.txt and val.txt"):
        open_label_sets(root, masks=mask_rule(val_share=0.5))


def test_a_training_writes_down_how_it_divided(tmp_path, capsys):
    pytest.importorskip("mmseg")
    pytest.importorskip("seg_plugin")
    from seg_fixture import FLAGS, TINY

    root, out = flat(tmp_path / "set"), tmp_path / "out"
    assert ended("data check", root) == 2
    told = capsys.readouterr()
    assert "give --val-share 0.2" in told.err and "pairs), val " in told.out
    assert ended("data check", root, "--val-share", 0.3) == 0
    numbers = {k: v for k, v in TINY.items() if k not in ("num_classes", "reduce_zero_label")}
    numbers |= {"max_iters": 1, "val_every": 1}
    words = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in numbers.items()]
    words += [f"backbone.{key}={value}" for key, value in FLAGS.items()]
    how = ["--backbone", "vit_tiny_patch16", "--data", str(root), "--output", str(out), "--device", "cpu"]
    load_tool("segment").main([*how, "--workers", "0", "--val-share", "0.3", *words])
    told = capsys.readouterr().out
    assert "images (4 pairs), divided by --val-share 0.3; 4 classes, named by their numbers" in told
    split, parts = (
        json.loads((out / "split.json").read_text()),
        open_label_sets(root, masks=mask_rule(val_share=0.3)),
    )
    assert split["val_share"] == share.share_of(out) == 0.3
    assert [split["train"], split["val"]] == [sorted(n.lstrip("/") for n in part.named) for part in parts]
    load_tool("segment").main(["--resume", "--output", str(out), "--device", "cpu", "--workers", "0"])
    assert "holds this run already, finished" in capsys.readouterr().out
