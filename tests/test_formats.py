"""Labels in the formats of other tools: COCO's json in any layout, Pascal VOC, YOLO."""

import json
import shutil
from functools import partial
from pathlib import Path
from unicodedata import normalize
from urllib.parse import quote

import numpy as np
import pytest
from formats_fixture import (
    NAMES,
    coco,
    plain,
    scene,
    write_image,
    write_images,
    write_json,
    write_text,
    write_voc,
    write_yolo,
    xml_of,
)
from PIL import Image

from det_plugin.coco.annotations import lacks_masks, read_classes, read_split, read_truth
from det_plugin.coco.layout import has_one_split, locate, splits
from det_plugin.coco.metrics import coco_metrics
from pretrain.errors import UserError

TRAIN, VAL = scene(6), scene(3, first=20)
BOTH = {"train": TRAIN, "val": VAL}
YAML = "train: images/train\nval: images/val\nnames: [ant, bee, cat]\n"


def same(found, images):
    """Whether content is that of a scene, sorted by names or in the order given."""
    return plain(found) == {
        name: (size, [tuple(each) for each in own]) for name, (size, own) in images.items()
    }


# --- every layout -----------------------------------------------------------------------------------------


def roboflow_voc(root):
    for split, images in (("train", TRAIN), ("valid", VAL)):
        write_voc(root, {split: images}, split, split, "")


def voc_below(root):
    for split, images in BOTH.items():
        write_voc(root, {split: images}, f"annotations/{split}", f"images/{split}", "")


def nested(write, *inner):
    return lambda root: write(root.joinpath(*inner))


def roboflow_yolo(root):
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: ['ant', 'bee', 'cat']\n"
    write_yolo(root, {"train": TRAIN, "valid": VAL}, "{}/images", "{}/labels", text)


def yolo_lists(root):
    """Lists with paths of another machine, of this folder, and of the list's."""
    write_yolo(
        root,
        BOTH,
        yaml="path: /content/mine\ntrain: train.txt\nval: val.txt\nnames: {0: ant, 1: bee, 2: cat}\n",
    )
    for split, start in (("train", "/content/mine/images/train/"), ("val", "./images/val/")):
        write_text(root / f"{split}.txt", "".join(f"{start}{name}\n" for name in BOTH[split]))


def darknet(root):
    """As CVAT exports it: labels beside the images."""
    write_yolo(root, BOTH, "obj_{}_data", "obj_{}_data")
    for split, images in BOTH.items():
        write_text(root / f"{split}.txt", "".join(f"data/obj_{split}_data/{name}\n" for name in images))
    write_text(root / "obj.names", "ant\nbee\ncat\n")
    write_text(
        root / "obj.data",
        "classes = 3\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n",
    )


def absolute_yaml(root):
    write_yolo(root, BOTH, yaml=f"path: {root}\n{YAML}")


def far_yaml(root):
    write_yolo(root, BOTH, yaml=f"path: ../datasets/mine\n{YAML}")


def without_yaml(root):
    write_yolo(root, BOTH)
    write_text(root / "classes.txt", "ant\nbee\ncat\n")


def coco_between(root):
    for split, images in BOTH.items():
        write_images(root / "images" / f"{split}2017", images)
        write_json(root / f"annotations/instances_{split}2017.json", coco(images))


def coco_by_cvat(root):
    """Its subsets begin with a capital."""
    for split, name in (("train", "Train"), ("val", "Validation")):
        write_images(root / "images" / name, BOTH[split])
        write_json(root / f"annotations/instances_{name}.json", coco(BOTH[split]))


def coco_in_folders(root):
    for split, name in (("train", "train"), ("val", "valid")):
        write_images(root / name / "data", BOTH[split])
        write_json(root / name / "labels.json", coco(BOTH[split]))


def coco_flat(root):
    """All images in one folder, and the files say which is whose."""
    for split, images in BOTH.items():
        write_images(root / "images", images)
        write_json(root / f"{split}_set.json", coco(images))


def coco_with_splits_in_names(root):
    for split, images in BOTH.items():
        write_images(root / "images" / split, images)
        write_json(root / f"annotations/{split}.json", coco(images, f"{split}/{{}}"))


def voc_by_cvat(root):
    """Its subsets begin with a capital; a list may begin with a mark."""
    write_voc(root, {"Train": TRAIN, "Validation": VAL})
    for file in (root / "ImageSets/Main").glob("[TV]*.txt"):
        file.write_text("\ufeff" + file.read_text())


def yolo_by_cvat(root):
    """Ultralytics YOLO 1.0: keys and lists are called as the subsets."""
    splits = {"Train": TRAIN, "Validation": VAL}
    write_yolo(
        root,
        splits,
        yaml="Train: Train.txt\nValidation: Validation.txt\npath: .\nnames: {0: ant, 1: bee, 2: cat}\n",
    )
    for split, images in splits.items():
        write_text(root / f"{split}.txt", "".join(f"data/images/{split}/{name}\n" for name in images))


def yolo_names_in_each_folder(root):
    write_yolo(root, {"train": TRAIN, "valid": VAL}, "{}/images", "{}/labels")
    for split in ("train", "valid"):
        write_text(root / split / "labels/classes.txt", "ant\nbee\ncat\n")


def yolo_other_names(root):
    write_yolo(root, BOTH)
    write_text(root / "mine.names", "ant\r\nbee\r\ncat\r\n\r\n")


def roboflow_darknet(root):
    write_yolo(root, {"train": TRAIN, "valid": VAL}, "{}", "{}")
    for split in ("train", "valid"):
        write_text(root / split / "_darknet.labels", "ant\nbee\ncat\n")


def beside_another(write):
    """As macOS packs an archive, and with a folder of other things."""

    def written(root):
        write(root / "mine")
        write_text(root / "__MACOSX/mine/._data.yaml", "\0")
        write_text(root / "docs/notes.txt", "none")

    return written


def coco_key_points(root):
    for split, images in BOTH.items():
        write_images(root / "images" / split, images)
        write_json(root / f"annotations/person_keypoints_{split}.json", coco(images))


LAYOUTS = {
    "yolo darknet by roboflow": roboflow_darknet,
    "yolo in an archive": beside_another(roboflow_yolo),
    "yolo without a yaml, in an archive": beside_another(without_yaml),
    "coco in an archive": beside_another(coco_flat),
    "coco key points by cvat": coco_key_points,
    "voc": lambda root: write_voc(root, BOTH),
    "voc in VOCdevkit": nested(lambda root: write_voc(root, BOTH), "VOCdevkit", "VOC2012"),
    "voc trainval and test": lambda root: write_voc(root, {"trainval": TRAIN, "test": VAL}),
    "voc lower case": lambda root: write_voc(root, BOTH, "annotations", "images", "imagesets/main"),
    "voc by roboflow": roboflow_voc,
    "voc folders below": voc_below,
    "yolo": lambda root: write_yolo(root, BOTH, yaml=YAML),
    "yolo names as a mapping": lambda root: write_yolo(
        root, BOTH, yaml="path: .\n" + YAML.replace("[ant, bee, cat]", "\n  0: ant\n  1: bee\n  2: cat")
    ),
    "yolo by roboflow": roboflow_yolo,
    "yolo lists": yolo_lists,
    "yolo darknet": darknet,
    "yolo absolute path": absolute_yaml,
    "yolo path of another machine": far_yaml,
    "yolo without a yaml": without_yaml,
    "coco with images between": coco_between,
    "coco flat": coco_flat,
    "coco by cvat": coco_by_cvat,
    "coco in folders": coco_in_folders,
    "coco with the splits in the names": coco_with_splits_in_names,
    "voc by cvat, subsets": voc_by_cvat,
    "yolo by cvat, subsets": yolo_by_cvat,
    "yolo names in each folder": yolo_names_in_each_folder,
    "yolo names in a file of another name": yolo_other_names,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_data(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    assert not has_one_split(tmp_path)
    for split, images in BOTH.items():
        files = locate(tmp_path, split)
        assert files.format == {"voc": "Pascal VOC", "yolo": "YOLO", "coco": "COCO"}[layout.split()[0]]
        content = files.read()
        assert same(content, images)
        assert [each["id"] for each in content["images"]] == list(range(1, len(images) + 1))
        names = [each["file_name"] for each in content["images"]]
        assert names == sorted(names) and all((files.images / name).is_file() for name in names)
        found = read_split(tmp_path, split, num_classes=3, training=False, masks="off")
        assert found.class_names == NAMES and len(found.pictures) == len(images)
        assert [found.load(picture).shape for picture in found.pictures] == [
            (height, width, 3) for (width, height), _ in images.values()
        ]
        found.check_headers()
    assert list(read_classes(tmp_path, "val").values()) == list(NAMES)


def cvat(root):
    write_images(root / "images", TRAIN)
    write_json(root / "annotations/instances_default.json", coco(TRAIN))


def cvat_default(root):
    write_images(root / "images/default", TRAIN)
    write_json(root / "annotations/instances_default.json", coco(TRAIN))


def label_studio(root, name="images/{}"):
    write_images(root / "images", TRAIN)
    write_json(root / "result.json", coco(TRAIN, name))


def label_studio_quoted(root, start="images/"):
    write_images(root / "images", TRAIN)
    content = coco(TRAIN)
    for each in content["images"]:
        each["file_name"] = start + quote(each["file_name"])
    write_json(root / "result.json", content)


def yolo_with_an_empty_folder(root):
    """As Roboflow writes a set of training images alone."""
    roboflow_yolo(root)
    shutil.rmtree(root / "valid")
    (root / "valid/images").mkdir(parents=True)


def yolo_default(root):
    write_yolo(
        root, {"default": TRAIN}, yaml="default: default.txt\npath: .\nnames: {0: ant, 1: bee, 2: cat}\n"
    )
    write_text(root / "default.txt", "".join(f"data/images/default/{name}\n" for name in TRAIN))


def voc_in_a_namespace(root):
    write_voc(root, {"": TRAIN}, lists="")
    for file in root.glob("Annotations/*.xml"):
        edit(file, "<annotation>", '<annotation xmlns="http://example.org/voc">')


def roboflow_flat(root):
    write_images(root, TRAIN)
    write_json(root / "_annotations.coco.json", coco(TRAIN))


def coco_train(root):
    write_images(root / "train", TRAIN)
    write_json(root / "annotations/train.json", coco(TRAIN))


def fiftyone(root):
    write_images(root / "data", TRAIN)
    write_json(root / "labels.json", coco(TRAIN))


def label_studio_yolo(root):
    write_yolo(root, {"": TRAIN}, "images", "labels")
    write_text(root / "classes.txt", "ant\nbee\ncat\n")
    write_json(root / "notes.json", {"categories": [], "info": {}})


def label_img_yolo(root):
    write_yolo(root, {"": TRAIN}, "", "")
    write_text(root / "classes.txt", "ant\nbee\ncat\n")


ONE = {
    "coco by cvat": cvat,
    "coco by cvat, default": cvat_default,
    "coco by label studio": label_studio,
    "coco by label studio, windows": partial(label_studio, name="images\\{}"),
    "coco by label studio, its server": partial(label_studio, name="../../media/upload/1/{}"),
    "coco by label studio, quoted": label_studio_quoted,
    "coco by label studio, local files": partial(label_studio_quoted, start="/data/local-files/?d="),
    "coco by label studio, originals": partial(label_studio, name="images/0a1b2c3d-{}"),
    "coco with urls": partial(label_studio, name="https://example.org/a/{}"),
    "coco flat by roboflow": roboflow_flat,
    "coco by fiftyone": fiftyone,
    "coco train alone": coco_train,
    "voc beside images": lambda root: write_voc(root, {"": TRAIN}, "annotations", "images", ""),
    "voc among images": lambda root: write_voc(root, {"": TRAIN}, "", "", ""),
    "voc by cvat": lambda root: write_voc(root, {"default": TRAIN}),
    "yolo by label studio": label_studio_yolo,
    "yolo by labelimg": label_img_yolo,
    "yolo with an empty folder": yolo_with_an_empty_folder,
    "yolo by cvat, no split": yolo_default,
    "voc in a namespace": voc_in_a_namespace,
    "yolo val is train": lambda root: write_yolo(root, {"train": TRAIN}, yaml=YAML.replace("images/val", "images/train")),
}  # fmt: skip


@pytest.mark.parametrize("layout", ONE)
def test_one_split_is_divided_when_asked(tmp_path, layout):
    ONE[layout](tmp_path)
    assert has_one_split(tmp_path)
    (files,) = splits(tmp_path).values()
    assert same(files.read(), TRAIN)
    with pytest.raises(UserError, match=r"has one split alone, .*: give --val-share 0\.2"):
        locate(tmp_path, "val")
    sides = [locate(tmp_path, side, 0.3).read() for side in ("train", "val")]
    both = [plain(side) for side in sides]
    assert both[0] | both[1] == plain(files.read()) and all(both) and both[0].keys().isdisjoint(both[1])
    assert len(sides[0]["annotations"]) + len(sides[1]["annotations"]) == 10


def test_what_holds_nothing_or_too_much_says_so(tmp_path):
    write_images(tmp_path / "images", TRAIN)
    with pytest.raises(
        UserError, match=r"holds no labels that are known, COCO's .json, Pascal VOC's .xml or YOLO's"
    ):
        locate(tmp_path, "train")
    for name in ("one.json", "two.json"):
        write_json(tmp_path / name, coco(TRAIN))
    with pytest.raises(
        UserError, match=r"one\.json and .*two\.json: both are of no split; name one, or a \.yaml"
    ):
        locate(tmp_path, "train")
    assert same(locate(tmp_path / "two.json", "val", 0.99).read(), dict(list(TRAIN.items()))) is False
    assert locate(tmp_path / "two.json", "train", 0.2).images == tmp_path / "images"
    write_images(tmp_path / "elsewhere/val2017", VAL)
    file = write_json(tmp_path / "elsewhere/annotations/instances_val2017.json", coco(VAL))
    assert locate(file, "train", 0.5).images == tmp_path / "elsewhere/val2017"


def test_several_sets_are_named(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year, BOTH)
    with pytest.raises(UserError, match=r"VOCdevkit holds several sets; name one: .*VOC2007, .*VOC2012"):
        locate(tmp_path, "train")


def test_two_files_of_a_split_are_named_beside_a_known_one(tmp_path):
    coco_between(tmp_path)
    content = (tmp_path / "annotations/instances_train2017.json").read_text()
    (tmp_path / "annotations/instances_train2017.json").unlink()
    for name in ("train_1", "train_2"):
        write_text(tmp_path / f"annotations/{name}.json", content)
    with pytest.raises(UserError, match=r"train_1\.json and .*train_2\.json: both are the train split"):
        locate(tmp_path, "train")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_that_an_archive_of_macos_takes_apart(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    names = {f"\u00e9 {name}": own for name, own in TRAIN.items()}
    write_images(tmp_path / "images", {normalize(form, name): own for name, own in names.items()})
    write_json(tmp_path / "result.json", coco({normalize(other, name): own for name, own in names.items()}))
    read_split(tmp_path, "train", num_classes=3, training=True, masks="off", val_share=0.3).check_headers()


# --- formats that are not read ----------------------------------------------------------------------------

OTHERS = {
    "labelme": ("a.json", {"shapes": [], "imagePath": "a.png"}, "labelme's json, .*labelme2coco"),
    "via": ("a.json", {"a.png1": {"filename": "a.png", "regions": []}}, "VIA's json, .*COCO format"),
    "via project": ("a.json", {"_via_settings": {}, "_via_img_metadata": {}}, "project of VIA's"),
    "vott": ("vott-json-export/a.json", {"assets": {}, "tags": []}, "VoTT's json, .* Pascal VOC"),
    "createml": ("a.json", [{"image": "a.png", "annotations": []}], "CreateML's json"),
    "label studio": ("a.json", [{"id": 1, "data": {}, "annotations": []}], "Label Studio's own json"),
    "supervisely": ("ds/ann/a.png.json", {"size": {}, "objects": []}, "Supervisely's json"),
    "image info": ("a.json", {"images": [], "licenses": []}, "COCO's json without instances"),
    "cvat": ("annotations.xml", "<annotations><image/></annotations>", "CVAT's own xml, .* COCO 1.0"),
    "csv": ("train/_annotations.csv", "filename,xmin\n", "a table, perhaps of boxes, .* COCO"),
    "label studio, short": ("a.json", [{"image": "a", "id": 1, "label": []}], "Label Studio's own json"),
    "results": ("a.json", [{"image_id": 1, "bbox": [], "score": 1}], "a list of COCO's results"),
    "dota": ("labelTxt/a.txt", "gsd:0.1\n1.0 2.0 3.0 4.0 5.0 6.0 7.0 8.0 ant 0\n", "DOTA's oriented boxes"),
    "kitti": ("label_2/a.txt", f"Car{' 0.5' * 14}\n", "KITTI's labels"),
    "corners": ("train/_annotations.txt", "a b.jpg 1,2,3,4,0 5,6,7,8,1\n", "a list of images with corners"),
    "zip": ("a.zip", "PK", "an archive, .* unpack it"),
}


@pytest.mark.parametrize("tool", OTHERS)
def test_other_formats_are_told_with_the_way_on(tmp_path, tool):
    write_images(tmp_path / "images", TRAIN)
    name, content, message = OTHERS[tool]
    write_text(tmp_path / name, content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"{name} is .*{message}"):
        locate(tmp_path, "train")


def test_labels_without_images(tmp_path):
    write_yolo(tmp_path, {"": TRAIN}, "images", "labels")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(
        UserError, match=r"photo 000\.txt is YOLO's, but .* has no images: put them in images/"
    ):
        locate(tmp_path, "train")
    darknet(tmp_path / "cvat")
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"train\.txt:1: no image '.*photo 000\.png'; export with images"):
        read_split(tmp_path / "cvat", "train", num_classes=3, training=True, val_share=0.2)


# --- COCO as tools write it -------------------------------------------------------------------------------


def of(key, change):
    def changed(content):
        for each in content[key]:
            change(each)

    return changed


def ids(kind):
    def changed(content):
        for key in ("images", "categories", "annotations"):
            of(key, lambda each: each.update({k: kind(v) for k, v in each.items() if k.endswith("id")}))(
                content
            )

    return changed


PUT_RIGHT = {
    "ids as text": ids(str),
    "ids with a point": ids(float),
    "image_id as text, by VIA": of("annotations", lambda each: each.update(image_id=str(each["image_id"]))),
    "no ids": of("annotations", lambda each: each.pop("id")),
    "sizes as text": of("images", lambda each: each.update(width=str(each["width"]), height=str(each["height"]))),
    "sizes with a point": of("images", lambda each: each.update(width=float(each["width"]))),
    "no sizes": of("images", lambda each: [each.pop("width"), each.pop("height")]),
    "sizes of 0": of("images", lambda each: each.update(width=0, height=0)),
    "boxes as text": of("annotations", lambda each: each.update(bbox=[str(v) for v in each["bbox"]])),
    "no boxes": of("annotations", lambda each: each.pop("bbox")),
    "empty boxes": of("annotations", lambda each: each.update(bbox=[])),
    "a polygon in no list, by VIA": of("annotations", lambda each: each.update(segmentation=each["segmentation"][0])),
}  # fmt: skip


@pytest.mark.parametrize("what", PUT_RIGHT)
def test_what_can_be_said_in_one_way_alone_is_put_right(tmp_path, what):
    write_images(tmp_path / "images", TRAIN)
    content = coco(TRAIN, polygons=True)
    file = write_json(tmp_path / "result.json", content)
    before = splits(tmp_path)["all"].read()
    PUT_RIGHT[what](content)
    write_json(file, content)
    found = splits(tmp_path)["all"].read()
    assert found == before or what == "no ids"
    assert same(found, TRAIN)
    split = read_split(tmp_path, "train", num_classes=3, training=True, val_share=0.3)
    assert not any("have no mask" in note for note in split.notes)
    split.check_headers()


def test_a_list_of_an_empty_polygon_is_no_mask(tmp_path):
    write_images(tmp_path / "images", TRAIN)
    content = coco(TRAIN)
    of("annotations", lambda each: each.update(segmentation=[[]]))(content)
    write_json(tmp_path / "result.json", content)
    assert lacks_masks(tmp_path, val_share=0.3)


@pytest.mark.parametrize("change, message", [
    (of("images", lambda each: each.update(id=f"image {each['id']}")), "6 of 6 images need an id that is a whole"),
    (of("images", lambda each: each.pop("file_name")), "6 of 6 images need an id .* and a file_name"),
])  # fmt: skip
def test_images_that_cannot_be_told_apart_are_no_set_too_small(tmp_path, change, message):
    write_images(tmp_path / "images", TRAIN)
    content = coco(TRAIN)
    change(content)
    write_json(tmp_path / "result.json", content)
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, "train", num_classes=3, training=True, val_share=0.3)


def turned(box, degrees):
    """The upright box around the corners of a turned one, by complex numbers."""
    x, y, w, h = box
    center, turn = complex(x + w / 2, y + h / 2), np.exp(1j * np.radians(degrees))
    corners = [center + turn * complex(dx, dy) / 2 for dx in (-w, w) for dy in (-h, h)]
    xs, ys = [c.real for c in corners], [c.imag for c in corners]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


@pytest.mark.parametrize("degrees", [30.0, 90.0, 200.0, 330.0])
def test_boxes_that_cvat_has_turned(tmp_path, degrees):
    write_images(tmp_path / "coco/images", TRAIN)
    content = coco(TRAIN)
    plain_boxes = [each["bbox"] for each in content["annotations"]]
    rotations = of("annotations", lambda each: each.update(attributes={"occluded": False, "rotation": 0.0}))
    rotations(content)
    write_json(tmp_path / "coco/result.json", content)
    assert "faults" not in splits(tmp_path / "coco")["all"].read()
    content["annotations"][3]["attributes"]["rotation"] = degrees
    write_json(tmp_path / "coco/result.json", content)
    write_voc(tmp_path / "voc", {"": TRAIN}, lists="")
    value = f"<attributes><attribute><name>rotation</name><value>{degrees}</value></attribute></attributes>"
    file = tmp_path / "voc/Annotations/photo 001.xml"
    head, _, tail = file.read_text().rpartition("<bndbox>")
    file.write_text(f"{head}{value}<bndbox>{tail}")
    for name in ("coco", "voc"):
        found = splits(tmp_path / name)["all"].read()
        boxes = [each["bbox"] for each in found["annotations"]]
        np.testing.assert_allclose(boxes[3], turned(plain_boxes[3], degrees), atol=1e-9)
        assert boxes[:3] + boxes[4:] == plain_boxes[:3] + plain_boxes[4:]
        assert [len(own) for kind, own in found["faults"].items() if "rotated boxes" in kind] == [1]


def test_objects_without_extent_are_told(voc):
    file = voc / "Annotations/photo 001.xml"
    size, (first, _) = TRAIN["photo 001.png"]
    write_text(file, xml_of("a", size, [first, ("ant", 5, 5, 1, 9)]))
    notes = read_split(voc, "train", num_classes=3, training=True, masks="off").notes
    assert "1 objects have no extent: left out of training" in notes


# --- Pascal VOC -------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc", BOTH)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_voc_pixels_count_from_1_and_a_click_has_no_area(voc):
    size, objects = TRAIN["photo 000.png"]
    write_text(
        voc / "Annotations/photo 000.xml", xml_of("a", size, [("ant", 0, 0, *size), ("bee", 4, 5, 0, 9)])
    )
    content = locate(voc, "train").read()
    boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == 1]
    assert boxes[0] == [0, 0, *size]  # the whole image, as Detectron2 reads it
    write_text(
        voc / "Annotations/photo 000.xml", xml_of("a", size, [("ant", 3, 4, 1, 5), ("bee", 9, 9, 2, 1)])
    )
    boxes = [each["bbox"] for each in locate(voc, "train").read()["annotations"] if each["image_id"] == 1]
    assert [min(box[2:]) for box in boxes] == [0, 0]
    assert len(read_split(voc, "train", num_classes=3, training=True, masks="off").pictures[0].classes) == 2
    assert len(read_split(voc, "train", num_classes=3, training=False, masks="off").pictures[0].classes) == 2


def test_difficult_objects_are_ignored_regions(voc):
    size, objects = VAL["photo 020.png"]
    flags = "<difficult>1</difficult>"
    write_text(voc / "Annotations/photo 020.xml", xml_of("a", size, objects[:1], flags).replace("</annotation>", "")
               + xml_of("a", size, objects[1:]).split("</size>\n")[1])  # fmt: skip
    truth = read_truth(locate(voc, "val"), masks="off")
    assert [each["iscrowd"] for each in truth["annotations"] if each["image_id"] == 1] == [1, 0]
    found = [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.9}
        for each in truth["annotations"]
    ]
    hit, missed = (coco_metrics(locate(voc, "val"), own, masks="off") for own in (found, found[1:]))
    assert hit["box_ap"] == missed["box_ap"] == pytest.approx(100)  # neither right nor wrong
    as_objects = coco_metrics(locate(voc, "val"), found[1:], "objects", "off")
    assert as_objects["box_ap"] < 99
    split = read_split(voc, "val", num_classes=3, training=False, masks="off")
    assert len(split.pictures[0].classes) == 1 and "1 of 4 annotations are difficult" in split.notes[0]
    assert not any("RLE" in note for note in split.notes)


BAD_XML = [
    ("</annotation>", "", r"photo 001\.xml: no element found"),
    (
        "<annotation>",
        '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>',
        "no document type",
    ),
    ("<name>bee</name>", "", r"photo 001\.xml:4: object 1 has no <name>"),
    ("<xmin>", "<xmin>x", r"photo 001\.xml:4: object 1 has no <bndbox> of four numbers xmin"),
    ("<ymax>", "<ymax>1e9", "object 1 has no <bndbox>"),
    ("<bndbox>", "<difficult>2</difficult><bndbox>", "object 1 has the <difficult> '2', not 0 or 1"),
]


@pytest.mark.parametrize("old, new, message", BAD_XML)
def test_damaged_xml_is_named(voc, old, new, message):
    edit(voc / "Annotations/photo 001.xml", old, new)
    with pytest.raises(UserError, match=f"{message}.*mend or remove it") as error:
        read_split(voc, "train", num_classes=3, training=True, masks="off")
    assert "\n" not in str(error.value)
    read_split(voc, "val", num_classes=3, training=False, masks="off")


def test_entities_are_never_expanded_in_any_encoding(voc):
    nine = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 9 if k else "z"}">' for k in range(12))
    file = voc / "Annotations/photo 001.xml"
    for encoding in ("utf-8", "utf-16"):
        file.write_text(f"<!DOCTYPE a [{nine}]><annotation>&e11;</annotation>", encoding=encoding)
        with pytest.raises(UserError, match="document type"):
            locate(voc, "train").read()


def test_voc_lists_and_names(voc):
    file = voc / "ImageSets/Main/train.txt"
    write_text(file, "# a comment\n\nphoto 001\nJPEGImages/photo 002.png\nphoto 003  -1\n")
    names = [each["file_name"] for each in locate(voc, "train").read()["images"]]
    assert names == [f"photo {i:03d}.png" for i in (1, 2, 3)]
    write_text(file, "photo 001\nphoto 9\n")
    with pytest.raises(UserError, match=r"train\.txt:2: .*Annotations has no photo 9\.xml"):
        locate(voc, "train").read()


def test_an_xml_without_its_image_is_left_out_and_one_of_another_name_is_found(voc):
    shutil.rmtree(voc / "ImageSets")
    (voc / "JPEGImages/photo 001.png").rename(voc / "JPEGImages/renamed.PNG")
    edit(
        voc / "Annotations/photo 001.xml",
        "<filename>photo 001.png",
        "<filename>C:\\\\pictures\\\\renamed.png",
    )
    (voc / "JPEGImages/photo 002.png").unlink()
    write_image(voc / "JPEGImages/new.png", (8, 8))
    content = locate(voc, "train", 0.2).content()
    files = next(iter(splits(voc).values())).content()
    assert files["faults"] == {
        "label files without an image": ["photo 002.xml"],
        "images without a label file": ["new.png"],
    }
    assert "renamed.PNG" in plain(files) and len(files["images"]) == 8
    assert content["faults"] == files["faults"]
    notes = read_split(voc, "train", num_classes=3, training=False, masks="off", val_share=0.2).notes
    assert notes[-2:] == (
        "1 label files without an image, the first: photo 002.xml",
        "1 images without a label file, the first: new.png",
    )


def test_a_size_that_is_not_said_is_the_images(voc):
    edit(voc / "Annotations/photo 001.xml", "<size><width>64</width>", "<size><width>0</width>")
    assert same(locate(voc, "train").read(), TRAIN)


def test_images_of_one_name_are_told_apart(tmp_path):
    """By the .xml file's own name, or else by its <filename>."""
    first, second = list(TRAIN.items())[:2]
    twins = {"a.jpg": first[1], "a.png": second[1]}
    for name, (size, objects) in twins.items():
        write_image(tmp_path / "own" / name, size, objects)
        write_text(tmp_path / "own" / f"{name}.xml", xml_of(name, size, objects))
    assert same(splits(tmp_path / "own")["all"].read(), twins)
    for told in twins:
        folder = tmp_path / told
        shutil.copytree(tmp_path / "own", folder, ignore=shutil.ignore_patterns("*.xml"))
        size, objects = twins[told]
        write_text(folder / "a.xml", xml_of(told, size, objects))
        assert same(splits(folder)["all"].read(), {told: twins[told]})
    edit(folder / "a.xml", "<filename>a.png", "<filename>a.gif")
    with pytest.raises(UserError, match=r"a\.xml: it may be of a\.jpg, a\.png; name one in <filename>"):
        splits(folder)["all"].read()
    edit(folder / "a.xml", "<filename>a.gif", "<filename>a.jpg")
    shutil.copy(folder / "a.xml", folder / "a.jpg.xml")
    with pytest.raises(UserError, match=r"2 \.xml files are of a\.jpg; keep one"):
        splits(folder)["all"].read()


def test_a_file_name_without_its_suffix_may_have_a_dot(tmp_path):
    images = {f"a.{name}": own for name, own in TRAIN.items()}
    write_images(tmp_path, images)
    for number, (name, (size, objects)) in enumerate(images.items()):
        write_text(tmp_path / f"{number}.xml", xml_of(Path(name).stem, size, objects))
    assert same(splits(tmp_path)["all"].read(), images)


def test_corners_in_the_wrong_order_are_put_right_and_told(voc):
    for file in voc.glob("Annotations/*.xml"):
        text = file.read_text().replace("xmin", "x?").replace("xmax", "xmin").replace("x?", "xmax")
        file.write_text(text)
    found = locate(voc, "train").read()
    assert same(found, TRAIN)
    assert [len(own) for kind, own in found["faults"].items() if "wrong order" in kind] == [10]


def test_a_set_without_any_image_names_the_first_fault(tmp_path):
    write_voc(tmp_path, {"": TRAIN}, lists="")
    shutil.rmtree(tmp_path / "JPEGImages")
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(UserError, match=r"has no images: photo 000\.xml .label files without an image"):
        read_split(tmp_path, "train", num_classes=3, training=True, val_share=0.2)


# --- YOLO -------------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path):
    return write_yolo(tmp_path / "yolo", BOTH, yaml=YAML)


def test_the_same_objects_in_three_formats_are_the_same(tmp_path):
    write_voc(tmp_path / "voc", BOTH)
    write_yolo(tmp_path / "boxes", BOTH, yaml=YAML)
    write_yolo(tmp_path / "polygons", BOTH, yaml=YAML, polygons=True)
    coco_between(tmp_path / "coco")
    for split, images in BOTH.items():
        found = [locate(tmp_path / name, split).read() for name in ("voc", "boxes", "polygons", "coco")]
        assert all(plain(each) == plain(found[0]) and same(each, images) for each in found)
        has_mask = [{"segmentation" in each for each in content["annotations"]} for content in found]
        assert has_mask == [{False}, {False}, {True}, {False}]
        for each in found[2]["annotations"]:
            x, y, w, h = each["bbox"]
            expected = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            np.testing.assert_allclose(each["segmentation"], expected, atol=1e-6)
        truth = read_truth(locate(tmp_path / "polygons", split))
        areas = {
            each["id"]: each["area"]
            for each in read_truth(locate(tmp_path / "voc", split), masks="off")["annotations"]
        }
        assert {each["id"]: each["area"] for each in truth["annotations"]} == areas


def test_numbers_of_classes_are_those_of_names(tmp_path):
    numbers = {"ant": 0, "bee": 7, "cat": 90}
    text = YAML.replace("[ant, bee, cat]", "{90: cat, 0: ant, 7: bee, 8: 'no'}")
    write_yolo(tmp_path, BOTH, yaml=text, numbers=numbers)
    assert same(locate(tmp_path, "train").read(), TRAIN)
    assert read_classes(tmp_path, "val") == {0: "ant", 7: "bee", 8: "no", 90: "cat"}


def test_sizes_are_those_that_are_shown(yolo):
    file = yolo / "images/train/photo 001.png"
    with Image.open(file) as image:
        pixels = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(file, exif=exif)
    assert same(locate(yolo, "train").read(), TRAIN)
    read_split(yolo, "train", num_classes=3, training=True, masks="off").check_headers()


BAD_LINES = [
    ("0 0.5 0.5 0.2", r"photo 001\.txt:3: 4 numbers, not class, x, y, width, height, or"),
    ("0 0.5 0.5 0.2 0.2 0.9", "6 numbers, not class"),
    ("0 0.5 0.5 0.2 0.2 0.9", "6 numbers, .*; is the last a confidence. Remove it"),
    ("cat 0.5 0.5 0.2 0.2", r"photo 001\.txt:3: field 1, 'cat', is no number"),
    ("0.5 0.5 0.5 0.2 0.2", "'0.5' is no number of a class"),
    ("0 120 80 40 30", "'120' is not in shares of the image, from 0 to 1"),
    ("0 0.5 0.5 0.2 -0.2", "'-0.2' is no width or height"),
    ("0 nan 0.5 0.2 0.2", "is not in shares"),
    ("3 0.5 0.5 0.2 0.2", r"photo 001\.txt:3: class 3 .objects of unknown class."),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_damaged_lines_are_named(yolo, line, message):
    with open(yolo / "labels/train/photo 001.txt", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=message) as error:
        read_split(yolo, "train", num_classes=3, training=True, masks="off")
    assert "\n" not in str(error.value)


BAD_YAML = [
    ("names: [ant, bee, cat]", "names: 3", "names must be a list of names, or numbers and names"),
    ("names: [ant, bee, cat]", "names: {a: ant}", "names must be"),
    ("names: [ant, bee, cat]", "names: [[ant], bee]", "names must be"),
    (
        "val: images/val",
        "val: images/elsewhere",
        r"data\.yaml: val: 'images/elsewhere' is no folder and no list",
    ),
    ("names:", "names: " + "[" * 5000 + "\nnames:", "is no YAML"),
]


@pytest.mark.parametrize("old, new, message", BAD_YAML)
def test_damaged_descriptions_are_named(yolo, old, new, message):
    edit(yolo / "data.yaml", old, new)
    with pytest.raises(UserError, match=message):
        locate(yolo, "train")


def test_without_names_it_says_how_to_give_them(tmp_path):
    write_yolo(tmp_path, BOTH)
    with pytest.raises(
        UserError, match=r"not the names of its classes: give a classes\.txt with a name a line"
    ):
        locate(tmp_path, "train")


def test_a_list_that_names_no_image_and_labels_that_have_none(tmp_path):
    yolo_lists(tmp_path)
    with open(tmp_path / "val.txt", "a") as file:
        file.write("./images/val/gone.png\n")
    with pytest.raises(UserError, match=r"val\.txt:4: no image './images/val/gone\.png'"):
        locate(tmp_path, "val").read()
    write_text(tmp_path / "labels/train/alone.txt", "0 0.5 0.5 0.1 0.1\n")
    faults = locate(tmp_path, "train").read()["faults"]
    assert faults["label files without an image"] == [str(tmp_path / "labels/train/alone.txt")]
    assert faults["images without a label file"] == ["images/train/photo 005.png"]


def test_key_points_are_left_aside(tmp_path):
    write_yolo(tmp_path, BOTH, yaml=YAML + "kpt_shape: [2, 3]\n")
    for file in tmp_path.glob("labels/*/*.txt"):
        file.write_text(file.read_text().replace("\n", " 0.1 0.1 2 0.2 0.2 2\n"))
    assert same(locate(tmp_path, "train").read(), TRAIN)


def test_key_points_are_told_without_a_word_in_the_description(yolo):
    for file in yolo.glob("labels/*/*.txt"):
        file.write_text(file.read_text().replace("\n", " 0.1 0.1 2 0 0 0 0.3 0.2 1.000000\n"))
    (yolo / "labels/val/photo 021.txt").unlink()  # two lines are too few to show a rule
    for split, n in (("train", 10), ("val", 2)):
        found = locate(yolo, split).read()
        assert [len(own) for kind, own in found["faults"].items() if "key points" in kind] == [n]
        assert same(found, TRAIN) or split == "val"
        assert not any("segmentation" in each for each in found["annotations"])


def test_numbers_of_tracks_are_left_aside_and_told(yolo):
    for polygons in (False, True):
        write_yolo(yolo, BOTH, polygons=polygons)
        for file in yolo.glob("labels/*/*.txt"):
            file.write_text(file.read_text().replace("\n", " 12\n"))
        found = locate(yolo, "train").read()
        assert same(found, TRAIN)
        assert [len(own) for kind, own in found["faults"].items() if "track" in kind] == [10]


def test_oriented_boxes_are_told(yolo):
    write_yolo(yolo, BOTH, polygons=True)
    assert not any(
        "oriented" in kind for kind in locate(yolo, "train").read()["faults"]
    )  # upright rectangles
    write_text(yolo / "labels/train/photo 001.txt", "0 0.5 0.2 0.8 0.5 0.5 0.8 0.2 0.5\n")
    faults = locate(yolo, "train").read()["faults"]
    assert [own for kind, own in faults.items() if kind.startswith("oriented boxes")] == [["photo 001.png"]]
    write_text(yolo / "labels/train/photo 002.txt", "0 0.5 0.2 0.8 0.5 0.5 0.8\n")
    assert not any("oriented" in kind for kind in locate(yolo, "train").read()["faults"])


def test_two_images_of_one_label_file_are_refused(yolo):
    write_image(yolo / "images/train/photo 001.jpg", (64, 96))
    with pytest.raises(
        UserError, match=r"photo 001\.txt: 2 images of this name, but one label file; rename one"
    ):
        locate(yolo, "train").read()


@pytest.mark.parametrize("names, message", [
    ("bee\nant\ncat\n", r"train.labels.classes\.txt and .*valid.labels.classes\.txt name other classes"),
    ("ant\n\nbee\ncat\n", r"valid.labels.classes\.txt:2: an empty line"),
    ("caf\u00e9\nbee\ncat\n", r"valid.labels.classes\.txt: line 1 is no UTF-8; save it as UTF-8"),
])  # fmt: skip
def test_names_that_may_belong_to_other_numbers_are_refused(tmp_path, names, message):
    yolo_names_in_each_folder(tmp_path)
    (tmp_path / "valid/labels/classes.txt").write_text(names, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        locate(tmp_path, "train")


def test_labels_of_an_image_called_as_a_file_of_names_are_no_names(tmp_path):
    images = {name.replace("photo 000", "labels"): own for name, own in TRAIN.items()}
    write_yolo(tmp_path, {"": images}, "images", "labels")
    write_text(tmp_path / "classes.txt", "ant\nbee\ncat\n")
    assert same(splits(tmp_path)["all"].read(), images)


def test_a_described_set_without_label_files_says_where_they_would_be(yolo):
    (yolo / "labels").rename(yolo / "labelTxt")
    with pytest.raises(
        UserError, match=r"no image has a label file; that of the first would be .*photo 000\.txt or"
    ):
        locate(yolo, "train")


def test_an_error_quotes_one_field_of_a_label_and_not_all_of_it(yolo, voc):
    secret = "s3cret" * 20
    write_text(yolo / "labels/train/photo 001.txt", f"0 0.5 before{secret} 0.2 after\n")
    edit(voc / "Annotations/photo 001.xml", "<xmin>", f"<xmin>before{secret}")
    edit(voc / "Annotations/photo 001.xml", "<ymin>", "<ymin>after")
    for root in (yolo, voc):
        with pytest.raises(UserError, match=r"before(s3cret){5}s\.\.\.'") as error:
            read_split(root, "train", num_classes=3, training=True, masks="off")
        assert "after" not in str(error.value)


# --- read once, and small ---------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [partial(write_yolo, yaml=YAML), write_voc])
def test_labels_are_read_once_and_again_when_they_change(tmp_path, monkeypatch, write):
    root = write(tmp_path, BOTH)
    first = locate(root, "train").read()
    opened = []
    text, content = Path.read_text, Path.read_bytes
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: (opened.append(self), text(self, *a, **k))[1]
    )
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self), content(self))[1])
    again = locate(root, "train").read()
    labels = [file for file in opened if file.parent.name in ("train", "Annotations")]
    assert again == first and again["annotations"] is not first["annotations"] and len(labels) <= 4
    file = root / ("labels/train/photo 001.txt" if write is not write_voc else "Annotations/photo 001.xml")
    changed = file.read_text().replace("0 ", "1 ") if write is not write_voc else xml_of("a", (64, 96), [])
    file.write_text(changed + "\n")
    assert locate(root, "train").read() != first


# --- boxes that are none ----------------------------------------------------------------------------------


def as_corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def as_shares(box):
    return [value / 96 for value in box]


@pytest.mark.parametrize("change, message", [
    (as_corners, "boxes leave their images as x, y, width, height, and none as corners x0, y0, x1, y1; write x, y, x1"),
    (as_shares, "all 10 boxes are within 0 and 1: shares of the image; write pixels"),
])  # fmt: skip
def test_boxes_in_another_form_are_refused(tmp_path, change, message):
    coco_between(tmp_path)
    file = tmp_path / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for each in content["annotations"]:
        each["bbox"] = change(each["bbox"])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, "train", num_classes=3, training=True, masks="off")
    read_split(tmp_path, "val", num_classes=3, training=True, masks="off")
