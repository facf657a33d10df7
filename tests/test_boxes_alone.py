"""Data whose objects have boxes and no masks, some masks, or no objects: what is read, learned, counted, left and
drawn, in both engines."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_fixture import annotation_file, edit, write_coco
from test_coco_data import RECIPE, SMALL, TINY, ids, only_crowds, perfect, read, words
from tool_fixture import load_tool

from det_plugin.augment import boxes_of_objects, jitter
from det_plugin.coco.annotations import Data
from det_plugin.coco.masks import coco_api
from det_plugin.coco.metrics import coco_metrics, in_words
from det_plugin.figures import SIDE_PX, color_of, draw_page
from det_plugin.predict import load_detector
from det_plugin.protocol import with_overrides
from det_plugin.run import DetectionRun
from det_plugin.torchvision_engine.folder import load_checkpoint
from det_plugin.torchvision_engine.loader import TrainSamples, to_device
from det_plugin.torchvision_engine.model import build_model
from det_plugin.torchvision_engine.train import evaluate_folder, train
from det_plugin.train import settings_of
from pretrain.analysis.picture_pages import GAP_PX, HEADER_PX
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results import read_result

ENGINES = ["torchvision"] + ["detectron2"] * bool(importlib.util.find_spec("detectron2"))
needs_detectron2 = pytest.mark.skipif(
    len(ENGINES) == 1, reason="Detectron2, the other engine, is not installed"
)
OFF = with_overrides(RECIPE, {"masks": "off"})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Masks everywhere; the last image of each split is empty."""
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def boxes(pristine, tmp_path_factory):
    """The same without masks."""
    root = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("boxes") / "coco"))
    for split in ("train", "val"):
        edit(annotation_file(root, split), without_masks)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


def without_masks(content, which=slice(None)):
    """Remove the masks of some of the objects; those of crowds stay."""
    for annotation in [a for a in content["annotations"] if not a["iscrowd"]][which]:
        annotation["segmentation"] = []


def corners(annotation):
    x, y, w, h = annotation["bbox"]
    return (x, y, x + w, y + h)


# --- what is read -----------------------------------------------------------------------------------------


def test_where_no_object_has_a_mask_boxes_alone_are_learned(pristine, boxes, root, tmp_path, capsys):
    def asked(data, **fields):
        return settings_of(TINY, None, data, tmp_path / "out", "coco-12ep", fields).protocol.masks

    assert asked(pristine) == "auto" and "masks=" not in capsys.readouterr().out
    assert asked(boxes) == "off"
    assert f"masks=off: no object of {boxes} has a mask" in capsys.readouterr().out
    assert asked(boxes, masks="on") == "on" and asked(pristine, masks="off") == "off"
    assert asked(boxes, crowds="objects") == "auto"  # then the crowds' masks are objects', too
    edit(annotation_file(root, "val"), without_masks)
    assert asked(root) == "auto"
    with pytest.raises(UserError, match="masks='no' should be"):
        asked(pristine, masks="no")


def test_boxes_alone_are_the_annotated_ones(pristine, boxes, root):
    """Whatever the masks are: they are not read."""
    edit(annotation_file(root, "train"), lambda c: [a.update(segmentation="junk") for a in c["annotations"]])
    known = json.loads(annotation_file(root, "train").read_text())["annotations"]
    for data in (boxes, root):
        split = read(data, masks="off")
        assert ids(split) == ids(read(pristine)) == [1, 2, 3, 4, 5]
        for picture in split.pictures:
            own = [corners(a) for a in known if a["image_id"] == picture.id and not a["iscrowd"]]
            assert list(picture.boxes) == own and picture.segmentations == ([],) * len(own)
    edit(annotation_file(root, "train"), lambda c: c["annotations"][1].update(bbox=[1, 2, 0, 4]))
    assert len(read(root, masks="off").pictures[0].boxes) == 1
    edit(annotation_file(root, "train"), lambda c: c["annotations"][1].update(bbox=[1, 2, "3", 4]))
    with pytest.raises(UserError, match="has the bbox"):
        read(root, masks="off")


def test_some_masks_are_a_question(root, capsys):
    """The line says how many, and the two choices; a validation may have any."""
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda content: without_masks(content, slice(0, 3)))
    told = r"3 of 10 objects have no mask \(the first: annotation 1\); masks=off learns .*, masks=on learns"
    with pytest.raises(UserError, match=told) as error:
        Data.read(root, RECIPE)
    assert "instances_train2017.json" in str(error.value) and "\n" not in str(error.value)
    Data.read(root, with_overrides(RECIPE, {"masks": "on"}))
    said = capsys.readouterr().err
    assert "train2017.json: 3 of 10 objects have no mask (the first: annotation 1): they teach boxes" in said
    assert "val2017.json: 3 of 6 objects have no mask" in said and "count as boxes" in said
    Data.read(root, OFF)
    assert "no mask" not in capsys.readouterr().err
    edit(annotation_file(root, "train"), without_masks)
    for masks in ("auto", "on"):
        with pytest.raises(UserError, match="none of 10 objects has a mask .*; masks=off learns"):
            read(root, masks=masks)


def test_objects_without_a_mask_keep_their_boxes(root):
    edit(annotation_file(root, "train"), lambda content: without_masks(content, slice(0, 3)))
    pictures = read(root, masks="on").pictures
    assert [p.masked for p in pictures] == [(False, False), (False, True), (), (), ()]
    x0, y0, x1, y1 = pictures[1].boxes[0]
    assert pictures[1].segmentations[0] == [[x0, y0, x1, y0, x1, y1, x0, y1]]


def test_which_objects_have_masks_survives_the_crop(root):
    """The second image's first object has none; the flags go with the objects that stay."""
    edit(annotation_file(root, "train"), lambda content: without_masks(content, slice(2, 3)))
    split = read(root, masks="on")
    flag_of = dict(zip(np.array(split.pictures[1].classes) + 1, (False, True)))
    samples = TrainSamples(split, with_overrides(RECIPE, {"jitter_scale": (1.0, 3.0)}), seed=0)
    mixed, seen = [s for s in map(samples.__getitem__, range(200)) if "has_mask" in s], []
    for sample in mixed:
        assert sample["has_mask"].tolist() == [flag_of[label] for label in sample["labels"].tolist()]
        assert len(sample["masks"]) == len(sample["has_mask"]) == len(sample["boxes"])
        seen.append(sample["has_mask"].tolist())
    assert len(mixed) == 40 and all(flags in seen for flags in ([True], [False], [False, True]))


def test_images_without_objects_are_counted_and_taken_as_negatives(root, capsys):
    edit(annotation_file(root, "train"), lambda content: only_crowds(content, 1))
    Data.read(root, RECIPE)
    said = capsys.readouterr().err
    assert "1 of 6 images have no objects: left out of training; keep_empty=true takes them" in said
    assert "1 of 6 images have only objects that cannot be learned" in said
    assert "val2017.json: 1 of 4 images have no objects\n" in said
    for masks in ("auto", "off"):
        data = Data.read(root, with_overrides(RECIPE, {"keep_empty": True, "masks": masks}))
        assert "1 of 6 images have no objects: negatives; keep_empty=false" in capsys.readouterr().err
        # The crowd's image is none without objects
        assert ids(data.train) == [1, 3, 4, 5, 6] and data.train.pictures[4].classes == ()
    edit(annotation_file(root, "train"), lambda content: content["annotations"].clear())
    with pytest.raises(UserError, match="has no images with objects"):
        read(root, keep_empty=True)


def test_negatives_are_for_own_data(pristine, root, tmp_path):
    """COCO's protocol leaves them out, as Detectron2 does; so does a run that began before there was a choice."""

    def asked(data, **fields):
        return settings_of(TINY, None, data, tmp_path / "out", "coco-12ep", fields).protocol.keep_empty

    assert asked(pristine) is True and asked(pristine, keep_empty="false") is False
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda content: content.update(categories=categories))
    assert asked(root) is False and asked(root, keep_empty="true") is True
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"protocol": {"name": "coco-12ep"}}')
    assert asked(pristine) is False
    (tmp_path / "out" / "config.json").write_text('{"protocol": {"keep_empty": true}}')
    assert asked(pristine) is True


def test_hashes_of_runs_with_masks_stay(root, tmp_path):
    how = TINY, None, root, tmp_path, "coco-12ep"
    held = settings_of(*how, {"keep_empty": False}).settings()["protocol"]
    assert not held.keys() & {"masks", "keep_empty", "crowds"}
    held = settings_of(*how, {"masks": "off"}).settings()["protocol"]
    assert (held["masks"], held["keep_empty"]) == ("off", True)


# --- what is learned --------------------------------------------------------------------------------------


@needs_detectron2
def test_boxes_equal_detectron2s():
    """Flipped, resized, cut at the crop, dropped where nothing is left: float for float."""
    from detectron2.data import transforms as T
    from detectron2.data.detection_utils import (
        annotations_to_instances,
        filter_empty_instances,
        transform_instance_annotations,
    )
    from detectron2.structures import BoxMode
    from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList
    from PIL import Image

    rng, dropped = np.random.default_rng(0), 0
    for _ in range(40):
        low = rng.uniform(-20, 110, (6, 2))
        given = np.concatenate([low, low + rng.uniform(0.5, 60, (6, 2))], axis=1)
        g = jitter((120, 90), RECIPE, rng)
        steps = [HFlipTransform(120)] if g.flip else []
        steps += [T.ResizeTransform(90, 120, *g.resized[::-1], Image.BILINEAR), CropTransform(*g.crop)]
        size = g.crop[3], g.crop[2]
        known = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k} for k, box in enumerate(given)
        ]
        theirs = [transform_instance_annotations(a, TransformList(steps), size) for a in known]
        expected = filter_empty_instances(annotations_to_instances(theirs, size))
        found, classes = boxes_of_objects(g, range(6), given)
        assert np.array_equal(found, expected.gt_boxes.tensor) and found.dtype == np.float32
        assert classes.tolist() == expected.gt_classes.tolist()
        dropped += 6 - len(found)
    assert 20 < dropped < 200
    nothing, classes = boxes_of_objects(g, (), ())
    assert nothing.shape == (0, 4) and classes.shape == (0,)


@needs_detectron2
def test_detectron2_reads_the_same_boxes_and_negatives(boxes, root):
    from detectron2.config import instantiate
    from detectron2.structures import PolygonMasks
    from detectron2.utils.events import EventStorage

    from det_plugin.detectron2_engine.catalog import coco_dicts
    from det_plugin.detectron2_engine.lazy import config

    edit(annotation_file(root, "train"), lambda content: without_masks(content, slice(0, 3)))
    for masks, data in (("off", boxes), ("on", root)):
        recipe = with_overrides(RECIPE, {"masks": masks, "keep_empty": True, "amp": False})
        cfg = config(recipe, TINY, data=data, device="cpu", model_kwargs=dict(depth=1))
        dicts = coco_dicts(data, "train", 3, True, masks=masks, keep_empty=True)
        ours = read(data, masks=masks, keep_empty=True).pictures
        assert (
            [d["image_id"] for d in dicts] == ids(read(data, masks=masks, keep_empty=True)) == [*range(1, 7)]
        )
        for own, picture in zip(dicts, ours):
            given = [tuple(a["bbox"]) for a in own["annotations"]]
            assert masks == "on" or given == list(picture.boxes)
            assert [a["category_id"] for a in own["annotations"]] == list(picture.classes)
        mapper = instantiate(cfg.dataloader.train.mapper)
        np.random.seed(0)
        samples = [mapper(own) for own in dicts]
        flags = [s["instances"].gt_has_mask.tolist() for s in samples if s["instances"].has("gt_has_mask")]
        assert all(flag in ([False, False], [False, True], [False], [True], []) for flag in flags)
        assert len(flags) == (2 if masks == "on" else 0)
        empty = samples[-1]["instances"]
        assert len(empty) == 0 and empty.gt_boxes.tensor.shape == (0, 4)
        assert (type(empty.gt_masks) is PolygonMasks) if masks == "on" else not empty.has("gt_masks")
        model = instantiate(cfg.model)
        with EventStorage():
            losses = model([samples[-1]] * 2)  # nothing but background
            assert {name for name, loss in losses.items() if loss == 0} == {
                *("loss_box_reg", "loss_rpn_loc"),
                *["loss_mask"] * (masks == "on"),
            }
            sum(losses.values()).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
            assert all(loss > 0 for loss in model(samples).values())


@needs_detectron2
def test_which_objects_have_masks_survives_detectron2s_crop(root):
    """The mapper drops what the crop leaves out; the flags go with the objects that stay."""
    from detectron2.data import transforms as T

    from det_plugin.detectron2_engine.catalog import CocoMapper, coco_dicts

    edit(annotation_file(root, "train"), lambda content: without_masks(content, slice(2, 3)))
    (own,) = [d for d in coco_dicts(root, "train", 3, True, masks="on") if d["image_id"] == 2]
    left = own["annotations"]
    assert [a["has_mask"] for a in left] == [False, True] and left[0]["bbox"][2] < left[1]["bbox"][0]
    for keep, flag in ((0, False), (1, True)):
        x0, y0, x1, y1 = map(int, left[keep]["bbox"])
        crop = [T.CropTransform(x0, y0, x1 - x0, y1 - y0)]
        mapper = CocoMapper(
            is_train=True,
            augmentations=crop,
            image_format="RGB",
            use_instance_mask=True,
            recompute_boxes=True,
        )
        instances = mapper(own)["instances"]
        assert instances.gt_has_mask.tolist() == [flag]
        assert instances.gt_classes.tolist() == [left[keep]["category_id"]]


def test_the_mask_of_an_object_without_one_teaches_nothing(root):
    """Were its box a mask, the loss of masks would be another one; of boxes nothing changes."""
    edit(annotation_file(root, "train"), lambda content: without_masks(content, slice(0, 4)))
    recipe = with_overrides(RECIPE, {"masks": "on", "drop_path": 0.0})
    samples = TrainSamples(read(root, masks="on"), recipe, seed=0)
    batch = [s for s in map(samples.__getitem__, range(20)) if "has_mask" in s and s["has_mask"].numel()][:2]
    torch.manual_seed(0)
    model = build_model(build_backbone(TINY, depth=1), recipe).train()
    images, targets = to_device(batch, torch.device("cpu"))
    losses = []
    for has_mask in (False, True):
        torch.manual_seed(1)
        flags = [{**t, "has_mask": torch.full_like(t["has_mask"], has_mask)} for t in targets]
        losses.append(model(images, flags))
    assert losses[0]["loss_mask"] == 0 and losses[1]["loss_mask"] > 0
    assert all(losses[0][name] == losses[1][name] for name in losses[0] if name != "loss_mask")


# --- what is counted --------------------------------------------------------------------------------------


def detections(root, seed=0):
    """The objects of the validation as boxes, moved, some missed, others made up."""
    rng, found = np.random.default_rng(seed), []
    for a in json.loads(annotation_file(root, "val").read_text())["annotations"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array(a["bbox"]) + rng.normal(0, 0.1, 4) * a["bbox"][2]
            kind = a["category_id"] if rng.random() < 0.8 else 7
            found.append(
                dict(image_id=a["image_id"], category_id=kind, score=float(rng.random()), bbox=box.tolist())
            )
    return found


def test_ap_of_boxes_is_pycocotools(boxes, pristine, monkeypatch):
    file, found = annotation_file(boxes, "val"), detections(boxes)
    assert len(found) > 4
    ours = coco_metrics(file, found, masks="off")
    truth = coco_api().COCO(str(file))
    evaluation = coco_api().COCOeval(truth, truth.loadRes([dict(p) for p in found]), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    expected = {f"box_{n}": 100 * v for n, v in zip(names, evaluation.stats) if v >= 0}
    assert {key: ours[key] for key in expected} == expected and 1 < ours["box_ap"] < 99
    assert ours.keys() == {*expected, "box_ap_classes"}
    assert "box AP" in in_words(ours) and "mask" not in in_words(ours)
    if importlib.util.find_spec("faster_coco_eval"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pycocotools", None)
            other = coco_metrics(file, found, masks="off")
        assert other.keys() == ours.keys() and other["box_ap"] == pytest.approx(ours["box_ap"])
    # What is counted of boxes does not depend on the masks beside them.
    with_masks = [{**p, "segmentation": p["segmentation"]} for p in perfect(pristine)]
    both, alone = (
        coco_metrics(annotation_file(pristine, "val"), with_masks, masks=m) for m in ("auto", "off")
    )
    assert alone == {key: value for key, value in both.items() if key.startswith("box")} != both


def test_masks_are_counted_where_there_are_any(root):
    """An object with a box alone is found as a box; a mask in it is neither right nor wrong."""
    file, found = annotation_file(root, "val"), perfect(root)
    edit(file, lambda content: without_masks(content, slice(0, 2)))
    metrics = coco_metrics(file, found)
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(100)
    elsewhere = {**found[0], "image_id": found[-1]["image_id"], "score": 0.99}
    size = json.loads(file.read_text())["images"][2]
    mask = np.zeros((size["height"], size["width"]), np.uint8, order="F")
    mask[:5, :5] = 1
    rle = coco_api().mask.encode(mask)
    elsewhere["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    assert coco_metrics(file, [*found, elsewhere])["mask_ap"] < 99
    assert coco_metrics(file, [p for p in found if p["image_id"] != 1001])["mask_ap"] == pytest.approx(100)
    edit(file, without_masks)
    metrics = coco_metrics(file, found)
    assert metrics["box_ap"] == pytest.approx(100) and not any(key.startswith("mask") for key in metrics)


# --- runs -------------------------------------------------------------------------------------------------


def engine_train(engine):
    return importlib.import_module(f"det_plugin.{engine}_engine.train")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_boxes_alone(boxes, tmp_path, capsys, engine):
    """From the command to its result, predictions, pictures, table and report: no word of masks."""
    out, base = tmp_path / "run", ["--engine", engine, "--backbone", TINY, "backbone.depth=1"]
    load_tool("detect").main(words(boxes, out, *base, score_threshold=0.0, amp="false"))
    assert "masks=off: no object of" in capsys.readouterr().out
    result = read_result(out)
    assert result.protocol.deviations["masks"] == ["auto", "off"]
    assert result.protocol.deviations["keep_empty"] == [False, True]
    assert result.protocol.deviations["train_images"][1] == 6
    assert "box_ap" in result.metrics and not any("mask" in key for key in result.metrics)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert "loss_box_reg" in log[0] and not any("mask" in key for line in log for key in line)
    left = "predictions.json" if engine == "torchvision" else "coco_instances_results.json"
    found = json.loads((out / left).read_text())
    keys = {"image_id", "category_id", "bbox", "score"}
    assert found and all(p.keys() == keys for p in found)
    first = read_result(out).metrics
    load_tool("detect").main(["--data", str(boxes), "--output", str(out), "--eval-only", "--device", "cpu"])
    assert read_result(out).metrics == first and "mask" not in capsys.readouterr().err.replace("masks", "")

    detector, image = load_detector(out, "cpu"), boxes / "val2017" / "000000001001.png"
    whole = detector.predict(image)
    assert whole.masks is None and whole.boxes.shape == (len(whole.results), 4) and len(whole.results) > 1
    words_of = ["--run", str(out), "--images", str(image), "--output", str(tmp_path / "found")]
    load_tool("predict").main([*words_of, "--min-score", "0", "--device", "cpu"])
    content = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert all("segmentation" not in a for a in content["annotations"]) and content["annotations"]
    first = content["annotations"][0]
    assert first["area"] == first["bbox"][2] * first["bbox"][3] and first["iscrowd"] == 0
    assert len(coco_api().COCO(str(tmp_path / "found" / "predictions.json")).anns) == len(whole.results)
    assert cv2.imread(str(tmp_path / "found" / "pictures" / "000000001001.png.jpg")).std() > 5
    drawn = ["--run", str(out), "--data", str(boxes), "--output", str(tmp_path / "drawn"), "--device", "cpu"]
    capsys.readouterr()
    load_tool("analyze detections").main(drawn)
    assert f"predictions: {out / left}" in capsys.readouterr().out  # those of the evaluation, not new ones
    assert cv2.imread(str(tmp_path / "drawn" / "val_1.png")).std() > 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("masks", ["off", "on"])
def test_resumed_equals_uninterrupted(boxes, root, tmp_path, engine, masks):
    """Bit for bit, with negatives in every epoch: of boxes alone, and of masks of some objects."""
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda content: without_masks(content, slice(0, 3)))
    steps = dict(max_iters=4, milestones=(3,), eval_every=2, amp=False, keep_empty=True, masks=masks)
    whole = DetectionRun(
        TINY, None, boxes if masks == "off" else root, tmp_path / "whole", with_overrides(RECIPE, steps),
        device="cpu", workers=0, model_kwargs=dict(depth=1),
    )  # fmt: skip
    parts, module = replace(whole, output=tmp_path / "parts"), engine_train(engine)
    module.train(whole)
    if engine == "torchvision":
        module.train(parts, stop_after_it=2)
        module.train(parts, resume=True)
        states = [load_checkpoint(run.output)["model"] for run in (whole, parts)]
    else:
        shutil.copytree(whole.output, parts.output)
        for name in ("result.json", "model_final.pth"):
            (parts.output / name).unlink()
        (parts.output / "last_checkpoint").write_text("model_0000001.pth")
        module.train(parts, resume=True)
        files = [run.output / "model_final.pth" for run in (whole, parts)]
        states = [torch.load(file, weights_only=True)["model"] for file in files]
    assert states[0].keys() == states[1].keys() and any("mask_head" in key for key in states[0]) == (
        masks == "on"
    )
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert read_result(parts.output).metrics == read_result(whole.output).metrics
    assert read_result(parts.output).config_hash == read_result(whole.output).config_hash
    with pytest.raises(UserError, match="other settings"):
        module.train(replace(whole, protocol=with_overrides(whole.protocol, {"keep_empty": False})))


def test_a_table_of_boxes_alone_has_no_column_of_masks(boxes, pristine, tmp_path):
    from pretrain.results.render import render
    from pretrain.results.report import build_report
    from pretrain.results.runs import read_run
    from pretrain.results.tables import comparison_table

    results = []
    for data, recipe in ((boxes, OFF), (pristine, RECIPE)):
        run = DetectionRun(
            TINY,
            None,
            data,
            tmp_path / recipe.masks,
            recipe,
            device="cpu",
            workers=0,
            model_kwargs=dict(depth=1),
        )
        results.append(read_result(train(run)))
    alone = comparison_table(results[:1], published=[], table="all")
    assert "box AP" in alone.columns and "mask AP" not in alone.columns
    assert all(len(line.cells) == len(alone.columns) for group in alone.groups for line in group)
    assert "mask AP" not in render(alone, "md") and "masks auto → off" in render(alone, "md")
    both = comparison_table(results, published=[], table="all")
    place = both.columns.index("mask AP")
    cells = [line.cells[place] for group in both.groups for line in group]
    assert cells.count("–") == 1 and len(cells) == 2
    page = build_report([read_run(tmp_path / "off" / "result.json")])
    assert "loss_mask" not in page and "loss_box_reg" in page


def test_pictures_of_boxes_alone_show_boxes(boxes, tmp_path):
    split = read(boxes, "val", False, masks="off")
    found = [
        {"image_id": p.id, "category_id": 3, "bbox": [5, 5, 20, 30], "score": 0.9} for p in split.pictures
    ]
    pages = []
    for predictions in (found, []):
        file = draw_page(split, list(split.pictures), predictions, tmp_path / "page.png")
        pages.append(cv2.imread(str(file)))
    assert (
        pages[0].shape == pages[1].shape and 0.001 < (pages[0] != pages[1]).mean() < 0.05
    )  # lines and labels
    picture, scale = split.pictures[0], SIDE_PX / 96
    for kind, (x0, y0, x1, y1) in zip(picture.classes, picture.boxes):
        for x, y in ((x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y1)):
            place = round(scale * y) + GAP_PX + HEADER_PX, round(scale * x) + GAP_PX
            assert pages[1][place][::-1].tolist() == list(color_of(kind))
    other = read(boxes, "val", False)  # as a run with masks reads it: the boxes are drawn all the same
    assert other.pictures[0].segmentations == ([], [])
    file = draw_page(other, list(other.pictures), [], tmp_path / "other.png")
    assert np.array_equal(cv2.imread(str(file)), pages[1])


def test_a_broken_picture_does_not_stop_a_page(root, tmp_path):
    split = read(root, "val", False, masks="off")
    files = [root / "val2017" / picture.file_name for picture in split.pictures]
    files[0].write_bytes(b"no picture")
    captions = json.loads(
        draw_page(split, split.pictures, [], tmp_path / "page.png").with_name("captions.json").read_text()
    )
    assert captions["page.png"]["caption"].endswith(f"Not readable: {files[0].name}.")
    rows = [cell["row"] for cell in captions["page.png"]["cells"]]
    assert rows == [file.name for file in files[1:] for _ in range(2)]
    for file in files:
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=files[-1].name):
        draw_page(split, split.pictures, [], tmp_path / "none.png")


def test_a_run_with_masks_is_evaluated_on_boxes_alone(boxes, pristine, tmp_path):
    run = DetectionRun(
        TINY, None, pristine, tmp_path / "run", RECIPE, device="cpu", workers=0, model_kwargs=dict(depth=1)
    )
    train(run)
    before = evaluate_folder(run.output, pristine, device="cpu", workers=0)
    after = evaluate_folder(run.output, boxes, device="cpu", workers=0)
    assert after == {key: value for key, value in before.items() if key.startswith("box")} != before
    assert SMALL["max_iters"] == run.protocol.max_iters
