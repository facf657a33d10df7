"""posfield data check of masks: every planted fault is found, counted and named, a clean set says nothing, and what a
training would refuse is what is told as refused."""

import io
import re
import shutil

import numpy as np
import pytest
from formats_fixture import coco, scene, write_images, write_json, write_yolo
from label_set_fixture import VOC_VOID, save_map, write_ade, write_folder, write_voc
from PIL import Image
from tool_fixture import ended

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")

from mmseg.registry import DATASETS

from pretrain.data.broken import UnreadableImage
from pretrain.data.datasets import mask_rule
from pretrain.errors import UserError
from seg_plugin.check import check, pictures
from seg_plugin.data import PARTS, check_parts, label_set, recipe_for, section

FIRST = "masks/train/0.png"
STEPS = [{"type": "mmseg.PosfieldLoadImage"}, {"type": "mmseg.PosfieldLoadLabels"}]


def write(root):
    root = write_folder(root, n_train=12, n_val=4)
    (root / "classes.txt").write_text("road\ncar\nsky\ntree\n")
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")


def found(report):
    return {(odd.split, odd.what): list(odd.names) for odd in report.odd}


def values_of(file):
    with Image.open(file) as image:
        return np.array(image)


def ends_training(root):
    """What a training does before its first step, and then all that its first epoch reads."""
    try:
        recipe = recipe_for(root, None, {})
        check_parts(*(label_set(section(recipe, root, part, ())) for part in PARTS.values()))
        train = DATASETS.build(section(recipe, root, "train", STEPS))
        for index in range(len(train)):
            try:
                train[index]
            except UnreadableImage:
                pass
    except UserError:
        return True
    return False


def edit(change, name=FIRST):
    """Store other values."""
    return lambda root: save_map(root / name, change(values_of(root / name)))


def write_as(make, name=FIRST):
    """Store another image."""
    return lambda root: make(values_of(root / name)).save(root / name, "PNG")


def colored(values):
    return Image.fromarray(np.array([(9, 9, 9), (200, 0, 0), (0, 200, 0), (0, 0, 200)], np.uint8)[values % 4])


def with_palette(values):
    made = Image.fromarray(values)
    made.putpalette([channel for k in range(256) for channel in (k, 255 - k, 128)])
    return made


def as_jpeg(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=80)
    return file.getvalue()


def jpeg_beside(root):
    (root / "masks/train/0.jpg").write_bytes(as_jpeg(values_of(root / FIRST)))
    (root / FIRST).unlink()


def smooth(root):
    """Of values that lie apart; without names, so that all are classes."""
    (root / "classes.txt").unlink()
    for file in (root / "masks").rglob("*.png"):
        values = values_of(file)
        save_map(file, np.where(values == 255, 255, 40 * values))
    values = np.minimum(values_of(root / FIRST), 120)
    Image.fromarray(values).resize(values.shape[::-1], box=(1.5, 1.5, 60, 60)).save(root / FIRST)


def cut_off(name):
    def cut(root):
        file = root / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def of_all(change, part="*"):
    return lambda root: [edit(change, file)(root) for file in (root / "masks").glob(f"{part}/*.png")]


def one_name_more(root):
    with (root / "classes.txt").open("a") as file:
        file.write("boat\n")


def other_name(root):
    for file in (root / "masks/train").iterdir():
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    shutil.copy(root / "masks/train/1_mask.png", root / "masks/train/note.png")


def in_both(root):
    shutil.copy(root / "images/train/0.jpg", root / "images/val/0.jpg")
    shutil.copy(root / FIRST, root / "masks/val/0.png")


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "images/train/0.jpg") as image:
        image.load()
    image.save(root / "images/train/0.jpg", exif=exif)


def remove(name):
    return lambda root: (root / name).unlink()


def without(label, other=0):
    return lambda values: np.where(values == label, other, values)


PLANTED = {
    # what: (planted by, split, kind begins, names, exit code)
    "no mask": (remove(FIRST), "train", "images without a mask", ["0"], 2),
    "no image": (remove("images/val/1001.jpg"), "val", "masks without an image", ["1001"], 2),
    "another size": (
        edit(lambda values: values[:-1]), "train", "masks of another size than their image", ["0.png (80 x 63, not 80 x 64)"], 2,
    ),
    "another size, val": (
        edit(lambda values: values[:-1], "masks/val/1000.png"), "val", "masks of another size",
        ["1000.png (80 x 63, not 80 x 64)"], 2,
    ),
    "orientation": (turned, "train", "masks of another size", ["0.png (80 x 64, not 64 x 80, as EXIF turns it)"], 2),
    "beyond": (edit(without(0, 9)), "train", "masks with values that are no class", ["0.png (9)"], 2),
    "colors": (write_as(colored), "train", "colored masks", 1, 2),
    "gray as RGB": (
        write_as(lambda values: Image.fromarray(values).convert("RGB")), "train", "colored masks",
        ["0.png (gray: keep one channel)"], 2,
    ),
    "palette": (write_as(with_palette), "train", "palette masks", ["0.png"], 0),
    "16 bits": (
        write_as(lambda values: Image.fromarray(values.astype(np.uint16))), "train", "masks of 16 bits", ["0.png"], 0,
    ),
    "void": (edit(lambda values: np.full_like(values, 255)), "train", "masks of which no pixel counts", ["0.png"], 0),
    "a JPEG called PNG": (
        lambda root: (root / FIRST).write_bytes(as_jpeg(values_of(root / FIRST))), "train",
        "masks that are JPEGs (lossy", ["0.png"], 2,
    ),
    "a JPEG": (jpeg_beside, "train", "images among the masks that are no PNG", ["0.jpg (JPEG: lossy)"], 2),
    "stray values": (smooth, "train", "masks with stray values", 1, 0),
    "an image cut off": (cut_off("images/train/0.jpg"), "train", "unreadable images", ["0.jpg"], 0),
    "an image cut off, val": (cut_off("images/val/1000.jpg"), "val", "unreadable images", ["1000.jpg"], 2),
    "images cut off": (
        lambda root: [cut_off(f"images/train/{i}.jpg")(root) for i in range(2)], "train", "unreadable images",
        ["0.jpg", "1.jpg"], 2,
    ),
    "a mask cut off": (cut_off(FIRST), "train", "masks that cannot be read", 1, 2),
    "twice, by name": (in_both, "train and val", "images in two splits, by name", ["0.jpg"], 0),
    "twice, by content": (in_both, "train and val", "images in two splits, by content", ["0.jpg = 0.jpg"], 0),
    "not in training": (of_all(without(3), "train"), "val", "classes of validation that training never has", ["tree"], 0),
    "not in validation": (of_all(without(2), "val"), "train", "classes of training that validation never has", ["sky"], 0),
    "never": (of_all(without(1)), "train and val", "classes that never occur", ["car"], 0),
    "a name too many": (one_name_more, "train and val", "classes that never occur", ["boat"], 2),
    "called otherwise": (other_name, "train", "PNG files that are called otherwise", ["note.png"], 0),
}  # fmt: skip


def test_a_clean_set(root, capsys):
    report = check(root)
    assert report.odd == [] and not report.refused and not ends_training(root)
    assert report.heads == ["", "train: pixels", "images", "val: pixels", "images"]
    assert report.rows[:2] == [["images", "", 12, "", 4], ["masks", "", 12, "", 4]]
    masks = [values_of(file) for file in (root / "masks/train").iterdir()]
    pixels = np.array([[(mask == value).sum() for value in (255, 0, 1, 2, 3)] for mask in masks])
    shares = [pixels[:, 0].sum() / pixels.sum(), *pixels[:, 1:].sum(0) / pixels[:, 1:].sum()]
    names = ["not counted", "class road", "class car", "class sky", "class tree"]
    expected = [[n, f"{s:.2%}", k] for n, s, k in zip(names, shares, (pixels > 0).sum(0).tolist())]
    assert [row[:3] for row in report.rows[2:]] == expected
    assert ended("data check", root) == 0
    told = capsys.readouterr().out
    assert told.startswith("masks (folder): train ") and "usable: posfield segment would train on it" in told
    assert "named by classes.txt, not counted: 255" in told
    assert "images 80 x 64 (8), 64 x 80 (8) pixels" in told


@pytest.mark.parametrize("what", PLANTED)
def test_planted_faults_are_found(root, what, capsys):
    plant, split, kind, names, code = PLANTED[what]
    plant(root)
    told = found(check(root))
    own = next(own for (at, each), own in told.items() if at == split and each.startswith(kind))
    assert own == names if isinstance(names, list) else len(own) == names
    assert ended("data check", root) == code and ends_training(root) == (code == 2)
    printed = capsys.readouterr()
    assert f"{split}: {len(own)} {kind}" in printed.out and own[0] in printed.out
    assert ("a training would refuse it" in printed.err) == (code == 2)


def test_nothing_else_is_told_than_what_is_planted(root):
    for what in ("another size", "beyond", "palette", "16 bits", "void", "a mask cut off", "never"):
        shutil.rmtree(root)
        PLANTED[what][0](write(root))
        assert len(check(root).odd) == 1, what


def test_all_kinds_at_once(root):
    """One fault hides no other."""
    edit(lambda values: values[:-1])(root)
    edit(without(0, 9), "masks/train/1.png")(root)
    write_as(colored, "masks/train/2.png")(root)
    cut_off("images/train/3.jpg")(root)
    remove("masks/train/4.png")(root)
    remove("images/val/1000.jpg")(root)
    assert len(found(check(root))) == 6


def test_options_are_a_trainings(tmp_path, capsys):
    root = write_folder(tmp_path / "set", 12, 4, values=(0, 1, 2, 255), void=9)
    told = found(check(root, mask_rule(void="0,9", map="255=3")))
    assert told == {} and ended("data check", root, "--void", "0,9", "--map", "255=3") == 0
    assert "3 classes" in capsys.readouterr().out
    (root / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert [ended("data check", root, "--void", "9,255", *more) for more in ((), ("--classes", 5))] == [2, 0]
    (root / "classes.txt").unlink()
    told = found(check(root, mask_rule(void="9,255"), n_classes=2))
    assert [what for _, what in told] == ["masks with values that are no class"] * 2
    assert ended("data check", root, "--crowds", "objects") == 2
    assert "--crowds has no effect on what posfield segment takes" in capsys.readouterr().err


def test_colors_that_labels_yaml_names(root):
    for file in (root / "masks").rglob("*.png"):
        colored(np.minimum(values_of(file), 3)).save(file)
    (root / "classes.txt").unlink()
    colors = "'#090909': road, '#c80000': car, '#00c800': sky"
    (root / "labels.yaml").write_text(f"map: {{{colors}, '#0000c8': tree}}\n")
    assert check(root).odd == [] and not check(root).refused
    (root / "labels.yaml").write_text(f"map: {{{colors}}}\n")
    own = found(check(root))["val", "masks with values that are no class"]
    assert (
        own[0] == "1000.png (holds the color #0000c8, which labels.yaml does not name, nor a tool's own file)"
        and len(own) == 4
    )
    assert check(root).refused and ends_training(root)


def test_lists_and_a_part_that_is_missing(tmp_path, root):
    flat = write_folder(tmp_path / "flat", 12, 4, flat=True)
    assert check(flat).odd == []
    lines = (flat / "train.txt").read_text().splitlines()
    (flat / "train.txt").write_text("\n".join([*lines[1:], "new"]))
    told = found(check(flat))
    assert told["train+val", "images that no list names"] == ["0"]
    assert told["train", "images without a mask"] == told["train", "masks without an image"] == ["new"]
    shutil.rmtree(root / "images/val")
    report = check(root)
    assert [split.name for split in report.splits] == ["train"] and "neither images/val" in report.refused


def test_public_sets(tmp_path, capsys):
    ade = write_ade(tmp_path / "ade", 12, 4)
    values = values_of(file := next(ade.rglob("annotations/training/*.png")))
    report = check(ade)
    assert [odd.what for odd in report.odd] == ["classes that never occur"] and not report.refused
    assert len(report.odd[0].names) == 146 and report.first.startswith("masks (ade20k): train ")
    save_map(file, np.where(values == 1, 200, values))  # no training opens it before its first epoch
    report = check(ade)
    assert "it would end in the first epoch: train: 1 masks with values that are no class" in report.refused
    voc = write_voc(tmp_path / "voc", 12, 4, augmented=False)
    assert VOC_VOID == 255 and not check(voc).refused


def test_a_set_of_both(tmp_path, root, capsys):
    objects = dict(list(scene(7).items())[:6])
    for split in ("train", "val"):
        write_images(root / split, objects)
        write_json(root / f"annotations/{split}.json", coco(objects, polygons=True))
    assert ended("data check", root) == 2
    assert "labels of objects, and masks: give --task detect or --task segment" in capsys.readouterr().err
    assert [ended("data check", root, "--task", task) for task in ("segment", "detect")] == [0, 0]
    told = capsys.readouterr().out
    assert "posfield segment would train on it" in told and "posfield detect would train on it" in told
    names = "train: images/train\nval: images/val\nnames: [ant, bee, cat]\n"
    both = {"train": objects, "val": objects}
    yolo = write_yolo(
        tmp_path / "yolo", both, yaml=names
    )  # labels/train may be a folder of masks by its name
    assert ended("data check", yolo) == 0 and "YOLO: " in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert ended("data check", tmp_path / "none") == 2
    assert (
        "posfield segment learns from masks" in (told := capsys.readouterr().err) and "images/{train" in told
    )


def test_the_page(root, tmp_path):
    edit(without(0, 9), "masks/train/1.png")(root)
    (root / "images/train/1.jpg").rename(root / "images/train/<b>&.jpg")
    (root / "masks/train/1.png").rename(root / "masks/train/<b>&.png")
    assert ended("data check", root, "--output", tmp_path / "page", "--samples", 3) == 2
    text = (tmp_path / "page/index.html").read_text()
    assert "<b>&.jpg" not in text and "&lt;b&gt;&amp;.jpg" in text and "A training would refuse it" in text
    assert text.count("<figure>") == 4 and "values that are no class" in text  # 3, and the odd one
    assert "http" not in re.sub(r"http-equiv", "", text) and "<script" not in text


def test_samples_show_the_masks(root):
    """Two halves of one picture: in the right one the classes' colors, the same on all samples."""
    half = np.zeros((64, 80), np.uint8)
    half[:, 40:] = 1
    for i in (0, 2):
        save_map(root / f"masks/train/{i}.png", half)
        Image.fromarray(np.full((64, 80, 3), 128, np.uint8)).save(root / f"images/train/{i}.jpg")
    shown = {made["title"]: made for made in pictures(check(root), 99)}
    assert len(shown) == 16 and shown["0.jpg"]["caption"] == "train, 2 classes"
    one, other = (np.array(Image.open(io.BytesIO(shown[f"{i}.jpg"]["png"]))).astype(int) for i in (0, 2))
    assert np.array_equal(one, other)
    row = one[one.shape[0] // 4]
    right = row[row.shape[0] // 2 :]
    chroma = np.ptp(right, axis=1)
    colors = {tuple(pixel) for pixel, c in zip(right.tolist(), chroma) if c > 60}
    assert np.ptp(row[: row.shape[0] // 2], axis=1).max() < 10 and len(colors) >= 2
