"""posfield data check: every planted fault is found, counted and named; nothing is found in a clean set."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from coco_fixture import rle_of_box
from formats_fixture import (
    coco,
    scene,
    write_image,
    write_images,
    write_json,
    write_text,
    write_voc,
    write_yolo,
)
from PIL import Image
from tool_fixture import ended

from det_plugin.check import check, picture
from pretrain.data.check import Odd
from pretrain.errors import UserError

TRAIN = dict(list(scene(7).items())[:6])  # all have objects
VAL = dict(list(scene(4, first=20).items())[:3])
BOTH = {"train": TRAIN, "val": VAL}
FIRST = "photo 000.png"


def write(root):
    for split, images in BOTH.items():
        write_images(root / split, images)
        write_json(root / f"annotations/{split}.json", coco(images, polygons=True))
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")


def edit(root, change, split="train"):
    file = root / f"annotations/{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def found(root):
    return {(odd.split, odd.what): list(odd.names) for odd in check(root).odd}


def test_a_clean_set(root, capsys):
    report = check(root)
    assert report.odd == [] and not report.refused
    heads, rows = report.heads, report.rows
    assert heads == ["", "train", "val"] and rows[:2] == [["images", 6, 3], ["objects", 12, 6]]
    assert rows[4:] == [["class ant", 4, 2], ["class bee", 4, 2], ["class cat", 4, 2]]
    assert ended("data check", root) == 0
    told = capsys.readouterr().out
    assert told.startswith("COCO: train ") and "usable: posfield detect would train on it" in told
    assert "images 96 x 64 (3), 64 x 96 (3), 80 x 80 (3) pixels" in told


def of_all(change):
    return lambda root: edit(root, lambda c: [change(a) for a in c["annotations"]])


def of_first(**values):
    return lambda root: edit(root, lambda c: c["annotations"][0].update(values))


def shares(annotation):
    annotation["bbox"] = [value / 96 for value in annotation["bbox"]]


def corners(annotation):
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x, y, x + w, y + h]


def add(key, **values):
    """The first entry of a list once more, changed."""
    return lambda root: edit(root, lambda c: c[key].append({**c[key][0], **values}))


def rename(root, name, new):
    (root / name).rename(root / new)


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_crowds(root):
    for split in BOTH:
        edit(root, lambda c: [make_crowd(c, a) for a in c["annotations"]], split)


def make_crowd(content, annotation):
    size = next(each for each in content["images"] if each["id"] == annotation["image_id"])
    annotation |= {
        "iscrowd": 1,
        "segmentation": rle_of_box(size["width"], size["height"], *annotation["bbox"]),
    }


def rotated(root):
    file = root / "train" / FIRST
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(file) as image:
        image.load()
    image.save(file, exif=exif)


def in_both(root, name=FIRST):
    shutil.copy(root / "train" / FIRST, root / "val" / name)
    size, objects = TRAIN[FIRST]
    edit(
        root,
        lambda c: c["images"].append({"id": 99, "file_name": name, "width": size[0], "height": size[1]}),
        "val",
    )


def as_roboflow(content):
    content["categories"][0]["supercategory"] = "pets"
    content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})


def no_objects(root):
    edit(root, lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] != 1]))


ALL = "(annotation 1)"
ONE = f"{FIRST} {ALL}"
SAID = "a training would refuse it"
PLANTED = {
    # what: (planted by, kind, names or how many, exit code)
    "corners": (of_all(corners), "boxes that are no x, y, width, height in pixels", 12, 2),
    "shares": (of_all(shares), "boxes that are no x, y, width, height in pixels", 12, 2),
    "box and mask": (of_first(bbox=[1, 1, 6, 6]), "boxes that disagree with their masks", [ONE], 0),
    "two categories of a name": (
        lambda root: [add("categories", id=9)(root), edit(root, lambda c: c["categories"].append({"id": 9, "name": "ant"}), "val")],
        "category names that stand twice", ["ant"], 0,
    ),
    "an unused category": (
        lambda root: [edit(root, lambda c: c["categories"].append({"id": 9, "name": "dog"}), split) for split in BOTH],
        "categories without objects", ["dog"], 0,
    ),
    "roboflow's group": (
        lambda root: [edit(root, as_roboflow, split) for split in BOTH],
        "categories without objects", ["pets (the name of a group, as Roboflow adds it)"], 0,
    ),
    "a missing image": (lambda root: (root / "train" / FIRST).unlink(), "images missing", [FIRST], 2),
    "images without objects": (no_objects, "images without objects", [FIRST], 0),
    "another size": (
        lambda root: edit(root, lambda c: c["images"][0].update(width=90)),
        "images of another size than stated", [f"{FIRST} (96 x 64, not 90 x 64)"], 2,
    ),
    "cut off": (lambda root: cut_off(root / "val/photo 020.png"), "unreadable images", ["photo 020.png"], 2),
    "no image": (lambda root: (root / "val/photo 020.png").write_text("x"), "unreadable images", ["photo 020.png"], 2),
    "outside": (of_first(bbox=[200, 5, 20, 20], segmentation=[]), "boxes outside their image", [ONE], 2),
    "leaving": (
        of_first(bbox=[90, 5, 20, 20], segmentation=[[90, 5, 110, 5, 110, 25, 90, 25]]),
        "boxes that leave their image", [ONE], 0,
    ),
    "no area": (of_first(bbox=[5, 5, 0, 9], segmentation=[]), "boxes without area", [ONE], 0),
    "unknown class": (of_first(category_id=7), "objects of unknown class", ["annotation 1: category 7"], 2),
    "unknown image": (of_first(image_id=77), "objects of an unknown image", ["annotation 1: image 77"], 2),
    "annotation id": (add("annotations", image_id=2), "annotation ids that stand twice", ["1"], 2),
    "image id": (add("images", file_name="photo 001.png"), "image ids that stand twice", ["1"], 2),
    "category id": (add("categories", name="x"), "category ids that stand twice", ["1"], 2),
    "a name twice": (add("images", id=50), "file names that stand twice", [FIRST], 0),
    "an object twice": (add("annotations", id=50), "objects that stand twice, with the same box", [FIRST], 0),
    "orientation": (rotated, "images whose EXIF orientation swaps width and height", [FIRST], 2),
    "crowds": (as_crowds, "categories all of whose RLEs are crowds", ["ant", "bee", "cat"], 2),
    "an image more": (lambda root: write_image(root / "train/new.png", (8, 8)), "images that no label names", ["new.png"], 0),
    "NaN": (of_first(bbox=[float("nan"), 5, 9, 9]), "boxes with numbers that are none", [ONE], 2),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_planted_faults_are_found(root, what, capsys):
    plant, kind, names, code = PLANTED[what]
    plant(root)
    own = next(
        (own for (split, each), own in found(root).items() if each.startswith(kind) and split == "train"),
        None,
    )
    if what in ("cut off", "no image"):
        own = found(root)["val", kind]
    assert own is not None and (own == names if isinstance(names, list) else len(own) == names)
    assert ended("data check", root) == code
    told = capsys.readouterr()
    assert (
        (SAID in told.err) == (code == 2)
        and f"train: {len(own)} {kind}" in told.out.replace("val: ", "train: ")
        and own[0] in told.out
    )


def test_images_in_two_splits_by_name_and_by_content(root):
    in_both(root)
    told = found(root)
    assert told["train and val", "images in two splits, by name"] == [FIRST]
    assert told["train and val", "images in two splits, by content"] == [f"{FIRST} = {FIRST}"]
    (root / "val" / FIRST).unlink()
    edit(root, lambda c: c["images"].pop(), "val")
    in_both(root, "other.png")
    told = found(root)
    assert told["train and val", "images in two splits, by content"] == [f"{FIRST} = other.png"]
    assert ("train and val", "images in two splits, by name") not in told


def test_faults_of_voc(tmp_path):
    root = write_voc(tmp_path, BOTH)
    write_text(root / "Annotations/photo 001.xml", "<annotation><object></object></annotation>")
    (root / "JPEGImages/photo 002.png").unlink()
    (root / "Annotations/photo 020.xml").unlink()
    report = check(root)
    told = {(odd.split, odd.what): list(odd.names) for odd in report.odd}
    assert told["train", "labels that cannot be read"] == [
        f"{root}/Annotations/photo 001.xml:1: object 1 has no <name>"
    ]
    assert told["train", "label files without an image"] == ["photo 002.xml"]
    assert told["val", "labels that cannot be read"] == [
        f"{root}/ImageSets/Main/val.txt:1: {root}/Annotations has no photo 020.xml"
    ]
    assert "object 1 has no <name>" in report.refused or "has no photo 020.xml" in report.refused
    assert check(write_voc(tmp_path / "clean", BOTH)).odd == []


def test_faults_of_yolo(tmp_path):
    text = "train: images/train\nval: images/val\nnames: [ant, bee, cat]\n"
    root = write_yolo(tmp_path / "set", BOTH, yaml=text)
    assert check(root).odd == []
    with open(root / "labels/train/photo 001.txt", "a") as file:
        file.write("7 0.5 0.5 0.1 0.1\n0 1 2\n")
    (root / "images/train/photo 002.png").unlink()
    (root / "labels/val/photo 020.txt").unlink()
    (root / "images/val/photo 021.png").write_text("no image")
    report = check(root)
    told = {(odd.split, odd.what): list(odd.names) for odd in report.odd}
    label = root / "labels/train/photo 001.txt"
    assert told["train", "objects of unknown class"] == [f"{label}:3: class 7"]
    assert told["train", "labels that cannot be read"][0].startswith(f"{label}:4: 3 numbers, not class")
    assert told["train", "label files without an image"] == [str(root / "labels/train/photo 002.txt")]
    assert told["val", "images without a label file"] == ["photo 020.png"]
    assert told["val", "unreadable images"] == ["photo 021.png"]
    assert "photo 001.txt:4" in report.refused


def test_a_name_from_the_folder_on_is_the_images(root):
    edit(root, lambda c: [each.update(file_name=f"./{each['file_name']}") for each in c["images"]])
    assert not any(kind.startswith("images that no label names") for _, kind in found(root))


def test_crowds_may_be_objects(root):
    as_crowds(root)
    assert [ended("data check", root, "--crowds", how) for how in ("ignored", "objects")] == [2, 0]


def test_boxes_that_are_mostly_wrong_are_warned_of(root):
    of_first(bbox=[1, 1, 6, 6])(root)
    assert not any("box AP" in note for note in check(root).notes)
    of_all(lambda annotation: annotation.update(bbox=[1, 1, 6, 6]))(root)
    (note,) = (note for note in check(root).notes if "box AP" in note)
    assert note.startswith("warning: 12 of 18 boxes are not their masks'")


def test_one_split_is_tried_divided(tmp_path, capsys):
    write_images(tmp_path / "images", TRAIN)
    write_json(tmp_path / "result.json", coco(TRAIN))
    assert ended("data check", tmp_path) == 0
    told = capsys.readouterr().out
    assert "one split alone: give --val-share 0.2" in told and "boxes are learned alone" in told
    taken, kept = map(int, re.search(r"a training takes (\d) images, its evaluation (\d)", told).groups())
    assert taken + kept == 6 and kept >= 1


def test_the_page(root, tmp_path):
    edit(root, lambda c: c["annotations"][2].update(bbox=[60, 5, 20, 20]))  # of the second image
    (root / "train" / FIRST).rename(root / "train/<b>&.png")
    edit(root, lambda c: c["images"][0].update(file_name="<b>&.png"))
    assert ended("data check", root, "--output", tmp_path / "page", "--samples", 2) == 0
    text = (tmp_path / "page/index.html").read_text()
    assert "<b>&.png" not in text and "&lt;b&gt;&amp;.png" in text
    assert text.count("<figure>") == 3 and "boxes that leave their image" in text  # 2, and the odd one
    assert "http" not in re.sub(r"http-equiv", "", text) and "<script" not in text
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 3


def test_samples_show_the_boxes(root, tmp_path):
    """The first sample has its objects' outlines where the labels say."""
    report = check(root)
    (train, _), size = report.splits, TRAIN[FIRST][0]
    pixels = cv2.imdecode(np.frombuffer(picture(train, 1), np.uint8), cv2.IMREAD_COLOR)
    scale = pixels.shape[1] / size[0]
    assert pixels.shape[0] == round(size[1] * scale) and scale > 1
    raw = cv2.imread(str(root / "train" / FIRST))
    changed = np.abs(pixels.astype(int) - cv2.resize(raw, pixels.shape[1::-1]).astype(int)).max(axis=2) > 40
    _, x, y, w, h = TRAIN[FIRST][1][1]
    edge = changed[round((y + h / 2) * scale), round(x * scale) - 3 : round(x * scale) + 4]
    assert edge.any() and not changed[-3:, :3].any()


def test_names_are_counted_and_cut():
    odd = Odd("images missing", "train", [f"{i}.jpg" for i in range(9)])
    assert str(odd) == "train: 9 images missing: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, and 4 more"


def test_what_is_no_set_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="no file .*nowhere and no folder"):
        check(tmp_path / "nowhere")
    assert ended("data check", tmp_path) == 2 and "holds no labels that are known" in capsys.readouterr().err
