"""The readers of labeled sets: each in its own layout, its table against the ids that its files are known
to hold."""

import ast
import importlib.util
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ade_fixture import write_cityscapes
from label_set_fixture import SIZE, gray_png, save_map, scene, write_ade, write_coco, write_folder, write_voc
from PIL import Image

from pretrain.data import images
from pretrain.data.datasets import coco, kinds, open_label_set
from pretrain.data.datasets.maps import nearest, read_map
from pretrain.data.images import square

# COCO's list of stuff, 92 banner .. 182 wood: the supercategory of each.
STUFF = (
    "textile textile plant building building plant furniture structural raw floor ceiling ceiling textile textile sky furniture "
    "furniture textile furniture ground furniture structural floor floor floor floor floor plant water food food furniture plant "
    "ground ground solid building plant furniture textile raw furniture plant solid ground textile structural raw ground textile "
    "plant raw ground ground structural ground water ground solid building textile food ground water furniture sky building ground "
    "solid furniture solid plant structural furniture building textile textile plant food wall wall wall wall wall wall wall water "
    "water window window solid"
).split()
# COCO's 80 things: first and last id, and the ids between them that no object has.
THINGS = {
    "person": (1, 1, ()),
    "vehicle": (2, 9, ()),
    "outdoor": (10, 15, (12,)),
    "animal": (16, 25, ()),
    "accessory": (27, 33, (29, 30)),
    "sports": (34, 43, ()),
    "kitchen": (44, 51, (45,)),
    "food": (52, 61, ()),
    "furniture": (62, 70, (66, 68, 69)),
    "electronic": (72, 77, ()),
    "appliance": (78, 82, ()),
    "indoor": (84, 90, ()),
}
NO_CATEGORY = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]


def classes_of(label_set, index, scene_index, labels):
    """What an item should hold: the fixture's class k as ``labels[k]``."""
    _, classes = scene(scene_index, len(labels))
    return np.array([*labels, 0])[classes]


# --- tables -----------------------------------------------------------------------------------------------


def test_stuff_is_the_fifteen_supercategories_of_cocos_list():
    classes = tuple(coco.SUPERCATEGORIES["coco_stuff"])
    short = {
        name.removesuffix("-stuff").removesuffix("-material"): label for label, name in enumerate(classes, 1)
    }
    assert len(classes) == 15 and list(classes) == sorted(classes)
    maps, pixels = coco.label_table("coco_stuff", 1), coco.label_table("coco_stuff", 0)
    assert maps[91:182].tolist() == pixels[92:183].tolist() == [short[name] for name in STUFF]
    things = [id for id in range(1, 91) if id not in NO_CATEGORY]
    assert not maps[np.array(things) - 1].any() and maps[255] == 0
    assert pixels[0] == pixels[183] == pixels[255] == 0  # no label, things


def test_things_are_the_twelve_supercategories_of_cocos_list():
    classes = tuple(coco.SUPERCATEGORIES["coco_things"])
    assert classes == tuple(sorted(THINGS))
    maps, panoptic = coco.label_table("coco_things", 1), coco.label_table("coco_things", 0)
    for name, (first, last, absent) in THINGS.items():
        for id in range(first, last + 1):
            assert maps[id - 1] == panoptic[id] == (-1 if id in absent else classes.index(name) + 1), id
    assert not maps[91:182].any() and not panoptic[92:201].any() and panoptic[0] == 0


def test_ids_of_no_category_are_unknown_to_cocos_maps():
    for kind in ("coco_stuff", "coco_things"):
        unknown = np.flatnonzero(coco.label_table(kind, 1) == -1) + 1
        assert unknown.tolist() == [*NO_CATEGORY, *range(183, 256)]  # 256 - 1 = 255: void


def test_the_classes_of_voc_and_ade20k(tmp_path):
    voc, ade = (
        open_label_set(write_voc(tmp_path / "v"), "val"),
        open_label_set(write_ade(tmp_path / "a"), "val"),
    )
    assert len(voc.classes) == 21 and (voc.classes[0], voc.classes[15], voc.classes[20]) == (
        "background",
        "person",
        "tvmonitor",
    )
    assert (
        voc.table[:21].tolist() == list(range(1, 22))
        and voc.table[255] == 0
        and (voc.table[21:255] == -1).all()
    )
    assert len(set(ade.classes)) == 150 and (ade.classes[0], ade.classes[12], ade.classes[149]) == (
        "wall",
        "person",
        "flag",
    )
    assert ade.table.tolist() == list(range(151))


def test_ade20ks_names_are_mmsegmentations(tmp_path):
    """Read from its source: to import it takes seconds."""
    if (mmseg := importlib.util.find_spec("mmseg")) is None:
        pytest.skip("MMSegmentation is not installed")
    tree = ast.parse((Path(mmseg.submodule_search_locations[0]) / "datasets" / "ade.py").read_text())
    (names,) = (
        word.value for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg == "classes"
    )
    expected = tuple(name.strip() for name in ast.literal_eval(names))  # one ends in a blank there
    assert open_label_set(write_ade(tmp_path), "val").classes == expected


# --- layouts ----------------------------------------------------------------------------------------------

STUFF_LABELS = (9, 7, 7, 0, 0, 0)  # of the fixture's sky, tree, grass, person, dog, car
THING_LABELS = (0, 0, 0, 10, 2, 12)


@pytest.mark.parametrize(
    ("write", "kind", "name", "n_classes", "labels"),
    [
        (write_voc, "auto", "voc2012", 21, (1, 2, 3, 4)),
        (write_ade, "auto", "ade20k", 150, (1, 2, 3, 4)),
        (write_coco, "coco_stuff", "coco_stuff", 15, STUFF_LABELS),
        (write_coco, "coco_things", "coco_things", 12, THING_LABELS),
        (write_folder, "auto", "set", 4, (1, 2, 3, 4)),
        (lambda root: write_folder(root, flat=True), "auto", "set", 4, (1, 2, 3, 4)),
    ],
)
def test_a_set_in_its_own_layout(tmp_path, write, kind, name, n_classes, labels):
    root = write(tmp_path / "set")
    for part, first, count in (("train", 0, 6), ("val", 1000, 3)):
        found = open_label_set(root, part, kind)
        assert (found.name, found.part, len(found), len(found.classes)) == (name, part, count, n_classes)
        for index in range(count):
            pixels, read = found.read(index)
            expected, _ = scene(first + index, len(labels))
            np.testing.assert_array_equal(read, classes_of(found, index, first + index, labels))
            assert pixels.dtype == np.uint8 and pixels.shape == expected.shape and read.dtype == np.int32
            assert np.abs(pixels.astype(int) - expected).mean() < 12  # the right image; JPEG loses some


def test_vocs_training_part_says_whether_it_is_trainaug(tmp_path):
    augmented, own = (
        open_label_set(write_voc(tmp_path / str(aug), augmented=aug), "train") for aug in (True, False)
    )
    assert (augmented.source, augmented.departure) == ("trainaug", "")
    assert own.source == "train" and "trainaug" in own.departure
    assert {Path(file).parent.name for _, file in augmented.files} == {"SegmentationClassAug"}
    assert {Path(file).parent.name for _, file in open_label_set(tmp_path / "True", "val").files} == {
        "SegmentationClass"
    }


def names_with_paths(lists):
    lines = (lists / "trainaug.txt").read_text().split()
    aug = lists.parent / "SegmentationAug"
    aug.mkdir()
    (aug / "train_aug.txt").write_text(
        "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in lines)
    )
    (lists / "trainaug.txt").unlink()


def names_in_two_lists(lists):
    own, both = ((lists / f"{name}.txt").read_text().split() for name in ("train", "trainaug"))
    (lists / "aug.txt").write_text("\n".join(name for name in both if name not in own))
    (lists / "trainaug.txt").unlink()
    shutil.rmtree(lists.parents[1] / "SegmentationClassAug")
    (lists.parents[1] / "SegmentationClassAug").mkdir()
    for name in both[len(own) :]:  # SBD's masks alone; VOC's own lie in SegmentationClass
        save_map(lists.parents[1] / "SegmentationClassAug" / f"{name}.png", np.ones(SIZE))


def names_of_neco(lists):
    home = lists.parents[1]
    lists.rename(home / "sets")
    (home / "JPEGImages").rename(home / "images")
    home.rename(home.with_name("VOCSegmentation"))


@pytest.mark.parametrize("relayout", [names_with_paths, names_in_two_lists, names_of_neco])
def test_trainaug_in_the_places_of_other_packages(tmp_path, relayout):
    expected = [Path(image).stem for image, _ in open_label_set(write_voc(tmp_path), "train").files]
    relayout(tmp_path / "VOC2012" / "ImageSets" / "Segmentation")
    found = open_label_set(tmp_path, "train")
    assert found.source == "trainaug" and [Path(image).stem for image, _ in found.files] == expected
    assert len(open_label_set(tmp_path, "val")) == 3


def test_the_roots_that_voc_may_have(tmp_path):
    write_voc(tmp_path / "VOCdevkit")
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert len(open_label_set(root, "train", "auto")) == 6


def test_cocos_own_maps_go_before_stuffthingmaps(tmp_path):
    stuff = [value + 1 for value in (156, 168, 123)]
    # As COCO's archives and as NeCo have them: category ids, 183 "other"; 199 a merged class of the panoptic
    # ones
    folders = {
        "coco_stuff": (
            "annotations/stuff_annotations/stuff_{}2017_pixelmaps",
            [*stuff, 183, 183, 183],
            STUFF_LABELS,
        ),
        "coco_things": (
            "annotations/panoptic_annotations/semantic_segmentation_{}2017",
            [187, 184, 199, 1, 18, 3],
            THING_LABELS,
        ),
    }
    for kind, (folder, values, labels) in folders.items():
        root = write_coco(tmp_path / kind)
        assert bool(open_label_set(root, "val", kind).departure) == (kind == "coco_things")
        for part, first, count in (("train", 0, 6), ("val", 1000, 3)):
            (root / folder.format(part)).mkdir(parents=True)
            for index in range(first, first + count):
                _, classes = scene(index, 6)
                save_map(root / folder.format(part) / f"{index:012d}.png", np.array([*values, 0])[classes])
        found = open_label_set(root, "val", kind)
        assert (found.source, found.departure) == (folder.format("val").split("/")[-1], "")
        np.testing.assert_array_equal(found.read(1)[1], classes_of(found, 1, 1001, labels))


def test_coco_as_mmsegmentation_has_it(tmp_path):
    root = write_coco(tmp_path)
    (root / "stuffthingmaps").rename(root / "annotations")
    for file in list((root / "annotations").rglob("*.png")):
        shutil.copy(file, file.with_name(f"{file.stem}_labelTrainIds.png"))
    assert len(open_label_set(root, "train", "coco_stuff")) == 6


# --- one's own folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["voc2012", "coco_stuff", "knn"])
def test_a_folder_with_the_name_of_a_public_set_is_told_from_it(tmp_path, name):
    found = open_label_set(write_folder(tmp_path / name), "train", n_classes=4)
    assert found.name == f"folder-{name}" and len(found) == 6 and found.read(0)[1].max() <= 4


# --- maps, squares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("color_type", ["gray", "palette"])
def test_a_map_of_few_bits_holds_its_values(tmp_path, bits, color_type):
    values = (np.arange(64) % (1 << bits)).astype(np.uint8).reshape(8, 8)
    file = tmp_path / "map.png"
    if color_type == "palette":
        image = Image.fromarray(values)
        image.putpalette([7 * k % 256 for k in range(3 * (1 << bits))])
        image.save(file, bits=bits)
    else:
        file.write_bytes(gray_png(values, bits))
    with Image.open(file) as image:
        assert image.mode == {"palette": "P", "gray": "1" if bits == 1 else "L"}[color_type]
    np.testing.assert_array_equal(read_map(file), values)


def test_squares_are_whole_pictures_in_the_order_that_is_asked_for(tmp_path):
    found = open_label_set(write_ade(tmp_path), "train")
    for order in (None, [4, 0, 4, 2, 1]):
        batches = list(found.squares(32, 20, 2, order))
        images, labels = (torch.cat(parts) for parts in zip(*batches))
        items = [found.read(index) for index in order or range(6)]
        assert torch.equal(images, torch.stack([square(pixels, 32, crop=False) for pixels, _ in items]))
        assert torch.equal(labels, torch.stack([nearest(read, 20) for _, read in items]))
        assert [len(images) for images, _ in batches] == ([2, 2, 2] if order is None else [2, 2, 1])
        assert images.dtype == torch.uint8 and labels.dtype == torch.int32


def test_squares_hold_no_more_than_a_batch_and_what_is_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "READ_AHEAD", 5)
    found, begun = open_label_set(write_ade(tmp_path), "train"), []
    read = type(found).read
    monkeypatch.setattr(type(found), "read", lambda self, index: begun.append(index) or read(self, index))
    batches = found.squares(32, 20, 4, [0, 1, 2, 3, 4, 5] * 20)
    for taken in range(1, 11):
        next(batches)
        assert len(begun) <= 4 * taken + 5
    batches.close()
    assert len(begun) <= 45 and sorted(begun[:40]) == sorted([0, 1, 2, 3, 4, 5] * 6 + [0, 1, 2, 3])


def test_a_caller_that_stops_early_waits_for_nothing_more():
    begun = []
    made = images.in_threads(lambda item: begun.append(item) or time.sleep(0.01) or item, range(1000))
    assert next(made) == 0
    made.close()
    assert len(begun) < 40  # of the 64 that waited


def test_the_first_of_a_set_are_at_equal_steps(tmp_path):
    found = open_label_set(write_ade(tmp_path), "train")
    assert list(found.first(3).files) == [found.files[0], found.files[2], found.files[4]]
    assert len(found.first(99)) == 6 and found.first(2).classes == found.classes


def test_a_set_is_opened_without_a_look_at_its_files(tmp_path, monkeypatch):
    for folder in (
        "images/train2017",
        "images/val2017",
        "stuffthingmaps/train2017",
        "stuffthingmaps/val2017",
    ):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(300):
            (tmp_path / folder / f"{index:012d}{'.jpg' if folder[0] == 'i' else '.png'}").touch()
    stat, looks = os.stat, []
    monkeypatch.setattr(os, "stat", lambda *words, **options: looks.append(words) or stat(*words, **options))
    assert len(open_label_set(tmp_path, "train", "coco_stuff")) == 300
    assert len(looks) < 30


def test_every_kind_can_be_named(tmp_path):
    roots = {
        "voc2012": write_voc,
        "voc2012_train": write_voc,
        "ade20k": write_ade,
        "cityscapes": write_cityscapes,
        "coco_things": write_coco,
        "coco_stuff": write_coco,
        "folder": write_folder,
    }
    assert tuple(roots) == kinds()
    for kind, write in roots.items():
        assert len(open_label_set(write(tmp_path / kind), "val", kind)) == 3
