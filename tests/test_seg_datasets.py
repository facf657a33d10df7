"""The data sets of the segmentation plug-in: each layout trained through the tool, in MMSegmentation's words."""

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
from mmseg.registry import DATASETS as REGISTRY
from seg_fixture import ROOT

from pretrain.data.datasets import open_label_set
from pretrain.errors import UserError
from pretrain.results.schema import read_result
from seg_plugin.config import segmenter_config
from seg_plugin.data import (
    DATASETS,
    CheckLabels,
    PosfieldLoadImage,
    dataset_of,
    recipe_for,
    section,
)
from seg_plugin.protocol import protocol, with_overrides

SHIPPED = Path(mmseg.datasets.__file__).parents[1] / ".mim" / "configs" / "_base_" / "datasets"
WRITERS = {
    "voc": write_voc,
    "voc_aug": partial(write_voc, aug=True),
    "cityscapes": write_cityscapes,
    "own": write_own,
}
SMALL = "max_iters=2 val_every=2 batch_size=2 resize_px=64,32 crop_px=32 slide_crop_px=32 slide_stride_px=32".split()


def validation(folder, **overrides):
    """The validation part of a folder in ADE20K's layout, with four classes, as MMSegmentation's data set."""
    recipe = with_overrides(protocol(), {"num_classes": 4, **overrides})
    made = segmenter_config(recipe, "vit_tiny_patch16", data_root=folder)
    return REGISTRY.build(made["val_dataloader"]["dataset"])


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
    names = open_label_set(data, "val", dataset.kind).classes
    assert name != "own" or names == ("red", "green", "blue", "yellow")
    assert set(result.metrics["iou"]) <= set(names) and set(names[:4]) <= set(result.metrics["iou"])
    kind = Config.fromfile(tmp_path / "run" / "config.py").val_dataloader.dataset.kind
    assert kind == dataset.kind


@pytest.mark.parametrize(
    "name, shipped, files",
    [
        ("ade20k", "ade20k", write_ade),
        ("voc", "pascal_voc12", write_voc),
        ("cityscapes", "cityscapes", write_cityscapes),
    ],
)
def test_images_labels_and_classes_are_mmsegs(name, shipped, files, tmp_path):
    """Of MMSegmentation's own configs: its data set gives the same files, in its order, and the same labels."""
    root, theirs = files(tmp_path / "data"), Config.fromfile(SHIPPED / f"{shipped}.py")
    recipe = protocol(DATASETS[name].protocol)
    for part, loader in (("train", "train_dataloader"), ("val", "val_dataloader")):
        labels = [{"type": "LoadAnnotations"}]
        cfg = {**theirs[loader].dataset, "data_root": str(root), "pipeline": labels}
        if name == "ade20k":
            labels[0]["reduce_zero_label"] = True
        other = REGISTRY.build(cfg)
        one = REGISTRY.build(section(recipe, root, part, [{"type": "PosfieldLoadLabels"}]))
        assert len(one) == len(other) and one.metainfo["palette"] == other.metainfo["palette"]
        assert one.metainfo["classes"] == tuple(word.strip() for word in other.metainfo["classes"])
        for i in range(len(one)):
            info, found = other.get_data_info(i), one.get_data_info(i)
            same = ("img_path", "seg_map_path")
            assert all(Path(info[key]).samefile(found[key]) for key in same)
            expected = other.pipeline(info)["gt_seg_map"]
            found |= {"label_set": one.labels, "ignore_index": 255, "ori_shape": expected.shape}
            np.testing.assert_array_equal(one.pipeline(found)["gt_seg_map"], expected)
    assert recipe.num_classes == len(one.metainfo["classes"])
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
    assert cfg.train_dataloader.dataset.kind == dataset_of(recipe).kind
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
            folder = writer(tmp_path / name, n_train=4, n_val=1)
            assert recipe_for(folder, None, {}).name == DATASETS[name].protocol
    write_voc(tmp_path / "around" / "VOCdevkit" / "VOC2012", n_train=1, n_val=1)
    assert recipe_for(tmp_path / "around", None, {}).name == "voc2012-40k"
    folder = write_ade(tmp_path / "ade" / "sets", n_train=4, n_val=1)
    assert recipe_for(folder, None, {}).name == "own-160k"  # of other names than ADE20K's
    folder.rename(tmp_path / "ade" / "ADEChallengeData2016")
    assert recipe_for(tmp_path / "ade", None, {}).name == "ade20k-160k"
    with pytest.raises(UserError, match="dataset: 'coco' is none of ade20k, voc, voc_aug, cityscapes, own"):
        recipe_for(tmp_path, "coco", {})
    with pytest.raises(UserError, match="no folder .*nowhere"):
        recipe_for(tmp_path / "nowhere", None, {"num_classes": "4"})
    with pytest.raises(UserError, match="holds no labeled set that is known: looked for"):
        recipe_for(tmp_path, None, {})


def test_the_number_of_ones_own_classes(tmp_path):
    root = write_own(tmp_path / "own", n_train=4, n_val=1)
    assert recipe_for(root, None, {}).num_classes == 4
    with pytest.raises(UserError, match="classes.txt names 4 that count, not 5 classes"):
        recipe_for(root, None, {"num_classes": "5"})
    (root / "classes.txt").unlink()
    assert recipe_for(root, None, {}).num_classes == 4  # found out
    assert recipe_for(root, None, {"num_classes": "6"}).num_classes == 6
    assert recipe_for(root, None, {"reduce_zero_label": "true"}).num_classes == 3  # as --void 0,255
    with pytest.raises(UserError, match="num_classes=20, .* are not those of voc2012-40k; .*--dataset own"):
        section(with_overrides(protocol("voc2012-40k"), {"num_classes": "20"}), root, "train", [])


def test_trainaug_is_asked_for_by_name(tmp_path):
    root = write_voc(tmp_path, n_train=2, n_val=1)
    made = section(protocol("voc2012aug-40k"), root, "train", [])
    with pytest.raises(UserError, match="has no trainaug.txt and SegmentationClassAug"):
        REGISTRY.build(made)


def test_ade20k_with_fewer_classes_is_read_as_ones_own_masks(tmp_path):
    """Label 0 stays what is not counted."""
    around = write_ade(tmp_path / "ade" / "ADEChallengeData2016").parent
    found = validation(around)
    assert found.metainfo["classes"] == ("class 1", "class 2", "class 3", "class 4")
    assert found.metainfo["values"] == (1, 2, 3, 4) and found.labels.table[0] == found.labels.table[255] == 0
    assert validation(around, reduce_zero_label=False, num_classes=5).metainfo["values"] == (0, 1, 2, 3, 4)


# --- what the masks hold


def test_what_the_check_of_a_validation_part_finds(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=2)
    image, mask = root / "images/validation/0001.jpg", root / "annotations/validation/0001.png"
    labels, kept = np.array(Image.open(mask)), mask.read_bytes()
    validation(root).labels.check()
    for changed, told in (
        (np.where(labels == 1, 9, labels), "0001.png holds the value 9, which is none of ade .4 classes."),
        (labels[:, :-1], "0001.png has 39 x 56 pixels, its image .*0001.jpg 40 x 56"),
    ):
        Image.fromarray(changed).save(mask)
        with pytest.raises(UserError, match=told):
            validation(root).labels.check()
    mask.write_bytes(kept)
    photo = image.read_bytes()
    image.write_bytes(photo[: len(photo) // 2])
    with pytest.raises(UserError, match="0001.jpg cannot be read"):
        validation(root).labels.check()
    image.write_bytes(photo)
    for path in sorted((root / "annotations/validation").iterdir()):
        validation(root).labels.check()  # one without a class is fine
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    with pytest.raises(
        UserError, match="no pixel of the 2 val masks in .*annotations/validation has a class"
    ):
        validation(root).labels.check()


def test_a_mask_of_another_size_is_named(tmp_path):
    found = validation(write_ade(tmp_path / "ade", n_train=1, n_val=1))
    results = {**found.get_data_info(0), "label_set": found.labels, "ignore_index": 255, "ori_shape": (3, 3)}
    with pytest.raises(UserError, match=r"0000.png is \(40, 56\), but its image is \(3, 3\)"):
        found.pipeline.transforms[2](results)


def test_the_check_that_earlier_configs_name():
    results = dict(gt_seg_map=np.array([[0, 9, 255]]), seg_map_path="a.png")
    assert CheckLabels(num_classes=10)(results) is results
    with pytest.raises(UserError, match="a.png holds class 9, but there are 9"):
        CheckLabels(num_classes=9)(results)


def test_an_ignored_number_of_ones_own_network(tmp_path):
    root = write_own(tmp_path / "own", n_train=4, n_val=1)
    recipe = with_overrides(protocol("own-160k"), {"num_classes": "4", "ignore_index": "4"})
    for path in (root / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 255, 4, labels).astype(np.uint8)).save(path)
    found = REGISTRY.build(section(recipe, root, "val", [{"type": "PosfieldLoadLabels"}]))
    info = {**found.get_data_info(0), "label_set": found.labels, "ignore_index": 4}
    with Image.open(info["seg_map_path"]) as mask:
        stored = np.array(mask)
    assert 4 in stored and np.array_equal(
        found.pipeline({**info, "ori_shape": stored.shape})["gt_seg_map"], stored
    )


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
    loaded = PosfieldLoadImage()({"img_path": str(path)})["img"]
    assert loaded.shape == (40, 56, 3)
    path.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(UserError, match=r"validation/0000.jpg is no readable image \(.*\)$"):
        PosfieldLoadImage()({"img_path": str(path)})
    for content in (b"", b"\xff\xd8", b"\x89PNG"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="validation/0000.jpg is no readable image"):
            PosfieldLoadImage()({"img_path": str(path)})
