"""Data sets other than ADE20K and one's own folders, each in its very layout; and what is wrong with
masks, said by name."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tool_fixture import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")

import mmseg.datasets
from ade_fixture import write_ade, write_cityscapes, write_own, write_voc
from mmengine.config import Config
from seg_fixture import ROOT

from pretrain.errors import UserError
from pretrain.results.schema import read_result
from seg_plugin.config import segmenter_config
from seg_plugin.data import CheckLabels, check_masks, check_whole
from seg_plugin.datasets import DATASETS, class_names, dataset_of, find_root, locate, own_layout, recipe_for
from seg_plugin.protocol import protocol, with_overrides
from seg_plugin.transforms import PosfieldLoadImage

SHIPPED = Path(mmseg.datasets.__file__).parents[1] / ".mim" / "configs" / "_base_" / "datasets"
WRITERS = {
    "voc": write_voc,
    "voc_aug": partial(write_voc, aug=True),
    "cityscapes": write_cityscapes,
    "own": write_own,
}
SMALL = "max_iters=2 val_every=2 batch_size=2 resize_px=64,32 crop_px=32 slide_crop_px=32 slide_stride_px=32".split()


def ade(folder, **overrides):
    """A located data set in ADE20K's layout, with four classes, and its protocol."""
    recipe = with_overrides(protocol(), {"num_classes": 4, **overrides})
    return locate(folder, recipe), recipe


def spoil(path, labels, **save):
    Image.fromarray(labels).save(path, **save)


# --- each layout, trained through the tool


@pytest.mark.parametrize("name", WRITERS)
def test_the_tool_trains_on_every_layout(name, tmp_path):
    data = WRITERS[name](tmp_path / "data", n_train=3, n_val=2)
    main = load_tool("segment").main
    named = ["--dataset", name] if name == "voc_aug" else []  # the others show what they are
    words = ["--backbone", "vit_tiny_patch16", "--data", str(data), "--output", str(tmp_path / "run"), *named]
    main([*words, "--workers", "0", "--device", "cpu", *SMALL, "backbone.depth=1", "backbone.pos_grid=4"])
    result, dataset = read_result(tmp_path / "run"), DATASETS[name]
    assert result.protocol.name == dataset.protocol and not result.protocol.full
    changed = result.protocol.deviations
    assert {"max_iters", "batch_size", "sweep"} <= set(changed) and "num_classes" not in changed
    assert not any(
        "dataset" in key for key in changed
    )  # the folders, suffixes and labels are those of the protocol
    if dataset.counts:
        assert changed["training_images"] == [dataset.counts[0], 3] and changed["validation_images"] == [
            dataset.counts[1],
            2,
        ]
    names = ("red", "green", "blue", "yellow") if name == "own" else dataset.classes
    assert set(result.metrics["iou"]) <= set(names) and set(names[:4]) <= set(result.metrics["iou"])
    kind = Config.fromfile(tmp_path / "run" / "config.py").val_dataloader.dataset.type
    assert kind == dataset.kind


@pytest.mark.parametrize(
    "name, shipped", [("ade20k", "ade20k"), ("voc", "pascal_voc12"), ("cityscapes", "cityscapes")]
)
def test_layout_and_classes_are_mmsegs(name, shipped):
    """Of MMSegmentation's own configs: folders, lists, and which labels are ignored; suffixes are its
    classes' defaults."""
    theirs = Config.fromfile(SHIPPED / f"{shipped}.py")
    recipe = protocol(DATASETS[name].protocol)
    ours = Config(segmenter_config(recipe, "vit_small_patch16"))
    for loader in ("train_dataloader", "val_dataloader"):
        one, other = ours[loader].dataset, theirs[loader].dataset
        assert (one.type, dict(one.data_prefix)) == (other.type, dict(other.data_prefix))
        assert one.ann_file == other.get("ann_file", "")
    assert (
        recipe.num_classes == len(DATASETS[name].classes) and "metainfo" not in ours.train_dataloader.dataset
    )
    lists = {"ann_file": ""} if name == "voc" else {}
    kind = getattr(mmseg.datasets, DATASETS[name].kind)
    if name != "voc":  # whose class looks for its files at once
        default = kind(lazy_init=True, **lists)
        assert (default.img_suffix, default.seg_map_suffix) == (
            ours.train_dataloader.dataset.img_suffix, ours.train_dataloader.dataset.seg_map_suffix)  # fmt: skip
        assert default.reduce_zero_label == recipe.reduce_zero_label
    resize = next(step for step in theirs.train_pipeline if step.type == "RandomResize")
    assert tuple(resize.scale) == recipe.resize_px and tuple(resize.ratio_range) == recipe.ratio_range
    assert next(step for step in theirs.test_pipeline if step.type == "Resize").scale == recipe.resize_px


@pytest.mark.parametrize("name", ["vits16_voc2012_40k", "vits16_cityscapes_80k"])
def test_configs_for_mmsegs_launchers(name, monkeypatch):
    monkeypatch.setenv("VOC2012", "somewhere")
    monkeypatch.setenv("CITYSCAPES", "somewhere")
    cfg = Config.fromfile(ROOT / "configs" / "seg" / f"segmenter_linear_{name}.py")
    recipe = protocol(cfg.custom_hooks[0].protocol.name)
    assert recipe.name.split("-")[0] in name.replace("_", "-") and cfg.train_cfg.max_iters == recipe.max_iters
    assert cfg.train_dataloader.dataset.type == dataset_of(recipe).kind
    assert {loader.dataset.data_root for loader in (cfg.train_dataloader, cfg.val_dataloader)} == {
        "somewhere"
    }


def test_every_data_set_has_a_name_of_its_own():
    names = [dataset.protocol for dataset in DATASETS.values()]
    assert len(set(names)) == len(names) and sum(name.startswith("ade20k") for name in names) == 1
    assert all(protocol(name).name == name for name in names)


# --- finding out


def test_the_folder_says_which_it_is(tmp_path):
    for name, writer in WRITERS.items():
        if name != "voc_aug":
            folder = writer(tmp_path / name, n_train=1, n_val=1)
            assert recipe_for(folder, None, {}).name == DATASETS[name].protocol
    devkit = write_voc(tmp_path / "around" / "VOCdevkit" / "VOC2012", n_train=1, n_val=1)
    assert recipe_for(tmp_path / "around", None, {}).name == "voc2012-40k"
    assert find_root(tmp_path / "around", DATASETS["voc"]) == devkit
    folder = write_ade(tmp_path / "ade" / "ADEChallengeData2016", n_train=1, n_val=1)
    assert (
        recipe_for(tmp_path / "ade", None, {"num_classes": "4"}).name == "own-160k"
    )  # of other names than ADE20K's
    for path in folder.rglob("0000.*"):
        path.rename(path.with_stem("ADE_train_00000001"))
    assert recipe_for(tmp_path / "ade", None, {}).name == "ade20k-160k"
    with pytest.raises(UserError, match="dataset: 'coco' is none of ade20k, voc, voc_aug, cityscapes, own"):
        recipe_for(tmp_path, "coco", {})


def test_the_number_of_ones_own_classes(tmp_path):
    root = write_own(tmp_path / "own", n_train=1, n_val=1)
    assert recipe_for(root, None, {}).num_classes == 4
    assert class_names(recipe_for(root, None, {}), root) == ("red", "green", "blue", "yellow")
    with pytest.raises(UserError, match="classes.txt has 4 different names, but num_classes is 5"):
        locate(root, recipe_for(root, None, {"num_classes": "5"}))
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match="how many classes has .*own.*num_classes=N.*classes.txt"):
        recipe_for(root, None, {})
    recipe = recipe_for(root, None, {"num_classes": "4"})
    assert locate(root, recipe).classes == ("class 0", "class 1", "class 2", "class 3")
    assert class_names(protocol())[0] == "wall" and class_names(protocol("voc2012-40k"))[0] == "background"


def test_ones_own_folders(tmp_path):
    root = write_own(tmp_path / "own", n_train=2, n_val=1)
    layout = own_layout(root)
    assert layout.images == ("images/train", "images/val") and layout.masks == ("masks/train", "masks/val")
    (root / "annotations").mkdir()
    with pytest.raises(UserError, match="must hold a folder annotations or masks; there are both"):
        own_layout(root)
    (root / "annotations").rmdir()
    Image.new("RGB", (4, 4)).save(root / "images" / "train" / "more.png")
    with pytest.raises(UserError, match="images must have one suffix; there are .*0000.jpg and .*more.png"):
        own_layout(root)
    (root / "images" / "train" / "more.png").unlink()
    (root / "images" / "val").rename(root / "images" / "test")
    with pytest.raises(UserError, match="images must hold a folder validation or val; there is none"):
        own_layout(root)


# --- what is missing


def test_an_image_and_its_mask_need_each_other(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=2)
    mask = root / "annotations" / "training" / "0001.png"
    kept = mask.read_bytes()
    mask.unlink()
    with pytest.raises(UserError, match=r"training/0001.jpg has no mask .*annotations/training/0001.png"):
        ade(root)
    mask.write_bytes(kept)
    (root / "images" / "validation" / "0000.jpg").unlink()
    with pytest.raises(
        UserError, match=r"annotations/validation/0000.png has no image in .*images/validation"
    ):
        ade(root)
    (root / "images" / "validation" / "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"no \*.jpg in .*images/validation"):
        ade(root)
    (root / "images" / "validation").rmdir()
    with pytest.raises(UserError, match="no .*images/validation"):
        ade(root)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="data: there is no folder .*nowhere"):
        recipe_for(tmp_path / "nowhere", None, {"num_classes": "4"})


def test_lists_of_names(tmp_path):
    root, recipe = write_voc(tmp_path, n_train=2, n_val=1), protocol("voc2012-40k")
    (root / "SegmentationClass" / "more.png").write_bytes(b"of another list")
    assert len(locate(root, recipe).pairs("training")) == 2
    lists = root / "ImageSets" / "Segmentation"
    (lists / "val.txt").write_text("absent\n")
    with pytest.raises(UserError, match="no image .*JPEGImages/absent.jpg, which .*val.txt lists"):
        locate(root, recipe)
    (lists / "val.txt").unlink()
    with pytest.raises(UserError, match="data: no .*val.txt"):
        locate(root, recipe)


# --- what the masks hold


def test_labels_beyond_the_classes_are_named(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=2)
    path = root / "annotations" / "validation" / "0001.png"
    labels = np.array(Image.open(path))
    labels[5, 7], labels[5, 8] = 9, 255
    spoil(path, labels)
    located, recipe = ade(root)
    check_masks(located, "training", recipe)
    with pytest.raises(
        UserError, match=r"0001.png holds label 9, but 4 classes are stored as 1 to 4 \(ignored: 0 and 255\)$"
    ):
        check_masks(located, "validation", recipe)
    check_masks(located, "validation", with_overrides(recipe, dict(num_classes=9)))
    with pytest.raises(
        UserError,
        match=r"label 9, but 9 classes are stored as 0 to 8 \(ignored: 255\); .*reduce_zero_label=true",
    ):
        check_masks(
            located, "validation", with_overrides(recipe, dict(num_classes=9, reduce_zero_label=False))
        )
    results = dict(gt_seg_map=labels, seg_map_path=path, ori_shape=labels.shape, reduce_zero_label=False)
    with pytest.raises(UserError, match=r"0001.png holds label 9, but 9 classes are stored as 0 to 8"):
        CheckLabels(num_classes=9)(results)
    assert CheckLabels(num_classes=10)(results) is results


def test_masks_of_another_size_are_named_and_turned_photographs_fit(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=1, n_val=1)
    image, path = (
        root / "images" / "validation" / "0000.jpg",
        root / "annotations" / "validation" / "0000.png",
    )
    labels = np.array(Image.open(path))
    located, recipe = ade(root)
    spoil(path, labels[:, :-1])
    with pytest.raises(UserError, match=r"0000.png is \(40, 55\), but its image is \(40, 56\)"):
        check_masks(located, "validation", recipe)
    results = dict(gt_seg_map=labels, seg_map_path=path, ori_shape=(3, 3), reduce_zero_label=True)
    with pytest.raises(UserError, match=r"0000.png is \(40, 56\), but its image is \(3, 3\)"):
        CheckLabels(num_classes=4)(results)
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(image) as picture:
        picture.save(image, exif=turned)
    spoil(path, labels.T.copy())
    check_masks(located, "validation", recipe)  # as mmcv reads it


@pytest.mark.parametrize("kind", ["I;16", "RGB", "RGBA", "LA"])
def test_masks_of_several_channels_or_16_bits_are_named(kind, tmp_path):
    root = write_ade(tmp_path / "ade", n_train=1, n_val=1)
    path = root / "annotations" / "validation" / "0000.png"
    labels = np.array(Image.open(path))
    if kind == "I;16":
        spoil(path, labels.astype(np.uint16) + 256)  # whose lower byte is a class
    else:
        Image.open(path).convert(kind).save(path)
    located, recipe = ade(root)
    with pytest.raises(
        UserError,
        match=f"validation/0000.png is of Pillow's mode {kind}; a mask has one channel of at most 8",
    ):
        check_masks(located, "validation", recipe)
    with pytest.raises(UserError, match=f"validation/0000.png is of Pillow's mode {kind}"):
        CheckLabels(num_classes=4)(
            dict(gt_seg_map=labels, seg_map_path=path, ori_shape=labels.shape, reduce_zero_label=True)
        )


def test_masks_without_a_label_are_fine_unless_all_are(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=1, n_val=2)
    located, recipe = ade(root)
    for name, fine in (("0000", True), ("0001", False)):
        path = root / "annotations" / "validation" / f"{name}.png"
        spoil(path, np.zeros_like(np.array(Image.open(path))))
        if fine:
            check_masks(located, "validation", recipe)
    with pytest.raises(UserError, match="no pixel of the validation masks in .* has a class"):
        check_masks(located, "validation", recipe)


def test_a_damaged_mask_is_named(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=1, n_val=1)
    path = root / "annotations" / "validation" / "0000.png"
    path.write_bytes(path.read_bytes()[:-30])
    located, recipe = ade(root)
    with pytest.raises(UserError, match="validation/0000.png is no readable mask"):
        check_masks(located, "validation", recipe)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photograph_that_is_cut_off_is_named(progressive, tmp_path):
    """Also one with a preview, which has an end of its own. OpenCV 4 fills what is missing with gray."""
    root = write_ade(tmp_path / "ade", n_train=1, n_val=1)
    path = root / "images" / "validation" / "0000.jpg"
    preview = path.read_bytes()
    with Image.open(path) as picture:
        picture.save(path, progressive=progressive)
    plain = path.read_bytes()
    segment = b"\xff\xe1" + (2 + len(preview)).to_bytes(2, "big") + preview
    whole = plain[:2] + segment + b"\xff" + plain[2:] + b"and what a camera adds"  # and a fill byte
    path.write_bytes(whole)
    located, recipe = ade(root)
    check_masks(located, "validation", recipe)
    loaded = PosfieldLoadImage()({"img_path": str(path)})["img"]
    assert loaded.shape == (40, 56, 3)
    path.write_bytes(whole[: len(whole) - 60])
    for read in (
        partial(check_masks, located, "validation", recipe),
        partial(PosfieldLoadImage(), {"img_path": str(path)}),
    ):
        with pytest.raises(
            UserError, match=r"validation/0000.jpg is no readable image \(JPEG without an end\)$"
        ):
            read()
    for content in (b"", b"\xff\xd8", b"\x89PNG"):
        path.write_bytes(content)
        if content == b"\xff\xd8":
            with pytest.raises(UserError, match="JPEG without an end"):
                check_whole(path)
        else:
            check_whole(path)  # no JPEG: OpenCV refuses it by itself
