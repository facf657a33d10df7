"""What is wrong with a labeled set is said in one line that names the file and the value."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from label_set_fixture import gray_png, save_map, write_ade, write_coco, write_folder, write_voc
from PIL import Image
from test_hostile import png

from pretrain.data.datasets import open_label_set, open_label_sets
from pretrain.errors import UserError


def drop(root, *names):
    for name in names:
        (root / name).unlink()


def put(file, content):
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "spoil", "part", "message"),
    [
        (
            write_folder,
            lambda r: drop(r, "masks/train/2.png", "masks/train/4.png"),
            "train",
            r"2 images have no .*masks/train.*: 2$",
        ),
        (
            write_folder,
            lambda r: drop(r, "images/val/1001.jpg"),
            "val",
            r"1 label maps have no image in .*images/val.*: 1001$",
        ),
        (
            write_folder,
            lambda r: put(r / "images/val/1001.png", b""),
            "val",
            r"two files 1001: 1001\.jpg and 1001\.png",
        ),
        (
            write_folder,
            lambda r: (r / "masks").rename(r / "truth"),
            "val",
            "looked for .*VOC2012/.*masks,annotations,labels",
        ),
        (
            write_folder,
            lambda r: put(r / "classes.txt", b"cat\ncat\n"),
            "val",
            r"classes\.txt: the lines 1 and 2 name one class; give each its own",
        ),
        (
            write_folder,
            lambda r: [f.unlink() for f in r.glob("images/val/*")],
            "val",
            r"no \*\.jpg .* in .*images/val",
        ),
        (
            lambda r: write_folder(r, flat=True),
            lambda r: drop(r, "val.txt"),
            "val",
            r"neither images/val .* nor val\.txt",
        ),
        (
            lambda r: write_folder(r, flat=True),
            lambda r: put(r / "val.txt", b"1000\n7000\n"),
            "val",
            r"of .*val\.txt have no .*: 7000$",
        ),
        (
            lambda r: write_folder(r, flat=True),
            lambda r: put(r / "val.txt", b"3\n4\n3\n"),
            "val",
            r"val\.txt names one image twice, in the lines 1 and 3",
        ),
        (
            lambda r: write_folder(r, flat=True),
            lambda r: put(r / "val.txt", b"\n"),
            "val",
            r"val\.txt names no image",
        ),
        (
            lambda r: write_folder(r, flat=True),
            lambda r: put(r / "val.txt", b"\xff"),
            "val",
            r"val\.txt is no readable list",
        ),
        (
            write_voc,
            lambda r: drop(r / "VOC2012", "ImageSets/Segmentation/val.txt"),
            "train",
            r"no list .*Segmentation/val\.txt",
        ),
        (
            write_voc,
            lambda r: drop(r / "VOC2012", "JPEGImages/2007_000002.jpg"),
            "train",
            "the list trainaug .*: 2007_000002",
        ),
        (
            write_voc,
            lambda r: put(r / "VOC2012/ImageSets/Segmentation/trainaug.txt", b"2007_000001\n2007_001001\n"),
            "train",
            "1 images of trainaug are of val, too; the first: 2007_001001",
        ),
        (
            write_coco,
            lambda r: None,
            "val",
            "several labeled sets: say which kind, coco_things or coco_stuff",
        ),
    ],
)
def test_a_set_that_is_not_whole(tmp_path, write, spoil, part, message):
    root = write(tmp_path / "set")
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        open_label_set(root, part)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("voc2012", "is no Pascal VOC 2012: it has no VOC2012/"),
        ("ade20k", "is no ADE20K: no folder .*images/training"),
        ("coco_things", "holds no COCO images: none of train2017, images/train2017"),
        ("folder", "has no folder masks, annotations, labels, SegmentationClass"),
        ("coco", "kind 'coco' of .*: it is auto or one of voc2012, "),
    ],
)
def test_a_kind_that_is_not_there(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        open_label_set(tmp_path, "train", kind)


def test_words_that_mean_nothing(tmp_path):
    root = write_ade(tmp_path)
    with pytest.raises(UserError, match="part 'test' of .*: it is train or val"):
        open_label_set(root, "test")
    with pytest.raises(UserError, match="no folder /nowhere"):
        open_label_set("/nowhere", "val")
    with pytest.raises(UserError, match="n_classes=20: ade20k in .* has 150"):
        open_label_set(root, "val", n_classes=20)


def test_cocos_maps_of_train_ids_alone(tmp_path):
    root = write_coco(tmp_path)
    for file in list((root / "stuffthingmaps").rglob("*.png")):
        file.rename(file.with_name(f"{file.stem}_labelTrainIds.png"))
    with pytest.raises(UserError, match="holds only maps of train ids .*_labelTrainIds.png"):
        open_label_set(root, "val", "coco_stuff")


@pytest.mark.parametrize(
    ("write", "kind", "value", "message"),
    [
        (
            write_voc,
            "voc2012",
            21,
            r"2007_001000\.png holds the value 21, which is none of voc2012 \(21 classes\)",
        ),
        (write_ade, "ade20k", 151, r"ADE_val_00001000\.png holds the value 151, .* \(150 classes\)"),
        (
            write_coco,
            "coco_stuff",
            11,
            "000000001000.png holds the value 11,",
        ),  # a street sign: no object has it
        (
            write_coco,
            "coco_things",
            190,
            "holds the value 190,",
        ),  # of panoptic maps that lie where COCO-Stuff's are looked for
        (write_folder, "folder", 5, "1000.png holds the value 5, .* of set"),
        (write_folder, "folder", 40_000, "1000.png holds the value 40000, .* of set"),
    ],
)
def test_an_unknown_label_is_named(tmp_path, write, kind, value, message):
    root = write(tmp_path / "set")
    found = open_label_set(root, "val", kind)
    values = read_values(Path(found.files[0][1])).astype(np.int64)
    values[5, 7] = value
    save_map(found.files[0][1], values)
    with pytest.raises(UserError, match=message):
        found.read(0)
    with pytest.raises(UserError, match=message):
        list(found.squares(16, 8, 2))
    assert found.read(1)[1].max() > 0  # the others are as they were


def read_values(file):
    with Image.open(file) as image:
        return np.array(image)


def cut(file):
    put(file, file.read_bytes()[:-40])


def flip(file):
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 30] ^= 1
    put(file, bytes(data))


def turned(file):
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def tall(file):
    put(file, gray_png(np.ones((1, 1)), 8, size=(2**31 - 1, 1)))


@pytest.mark.parametrize(
    ("which", "spoil", "message"),
    [
        (1, lambda f: f.unlink(), r"no label map .*1000\.png"),
        (1, cut, r"1000\.png cannot be read \(PNG: "),
        (1, flip, r"1000\.png cannot be read \(PNG: wrong checksum"),
        (1, tall, r"1000\.png cannot be read \(declares 1 x 2147483647 pixels"),
        (1, lambda f: put(f, b"\xff\xd8\xff\xe0 a JPEG"), r"1000\.png cannot be read"),
        (1, lambda f: put(f, b""), r"1000\.png cannot be read"),
        (1, lambda f: Image.new("RGB", (80, 64)).save(f), r"1000\.png is no label map: it has 3 channels"),
        (
            1,
            lambda f: save_map(f, np.ones((60, 80))),
            r"1000\.png has 80 x 60 pixels, its image .*1000\.jpg 80 x 64$",
        ),
        (0, lambda f: put(f, f.read_bytes()[:400]), r"1000\.jpg cannot be read"),
        (0, lambda f: f.unlink(), r"1000\.jpg cannot be read \(No such file"),
        (0, turned, r"1000\.png has 80 x 64 pixels, its image .*1000\.jpg 64 x 80 \(as EXIF turns it\)"),
    ],
)
def test_a_broken_file_is_named(tmp_path, which, spoil, message):
    found = open_label_set(write_folder(tmp_path / "set"), "val", n_classes=4)
    spoil(Path(found.files[0][which]))
    with pytest.raises(UserError, match=message) as error:
        found.read(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("depth", "color"), [(8, 3), (16, 0), (1, 0), (8, 0)], ids=["palette", "16", "1", "8"]
)
def test_a_mask_that_declares_900_million_pixels_is_refused_before_it_is_decoded(tmp_path, depth, color):
    """The file is small; its decoded pixels take up to 1.8 GB."""
    write_folder(tmp_path, 2, 2)
    data = png(30_000, 30_000, depth=depth, color=color, data=b"\0" * 10_000)
    (tmp_path / "masks/train/1.png").write_bytes(data)
    told = r"train/1\.png cannot be read .declares 30000 x 30000 pixels, more than 200 million"
    tracemalloc.start()
    with pytest.raises(UserError, match=told):
        open_label_sets(tmp_path, "folder", 0)
    with pytest.raises(UserError, match=told):
        open_label_set(tmp_path, "train").check()
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
