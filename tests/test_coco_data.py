"""COCO-format data as people have them: every layout, every oddity with a documented handling, every
damage with a clear error."""

import json
import math
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_fixture import annotation_file, edit, relayout, rle_of_box, write_coco
from PIL import Image
from tool_fixture import load_tool

from det_plugin.coco import metrics as coco_metrics_module
from det_plugin.coco.annotations import Data, read_classes, read_split, read_truth, run_lengths
from det_plugin.coco.layout import LAYOUTS, locate
from det_plugin.coco.masks import coco_api, encode_mask
from det_plugin.coco.metrics import coco_metrics
from det_plugin.loader import batches
from det_plugin.protocol import n_share, protocol, with_overrides
from det_plugin.run import DetectionRun, run_deviations
from det_plugin.torchvision_engine.loader import TrainSamples
from det_plugin.torchvision_engine.train import train
from det_plugin.train import choose_engine, settings_of
from pretrain.build import build_backbone
from pretrain.data.broken import Skipped
from pretrain.errors import UserError
from pretrain.results import read_result
from pretrain.weights import save_backbone

ROOT = Path(__file__).parents[1]
TINY = "vit_tiny_patch16"
SMALL = dict(
    max_iters=1, milestones=(), warmup_iters=1, batch_size=2, image_size_px=64, channels=16, box_fc=32,
    box_convs=1, mask_convs=1, num_classes=3, roi_batch_per_image=16, rpn_pre_nms=(100, 50), rpn_post_nms=(50, 20),
    anchor_sizes_px=(8, 16, 32, 64, 128), detections_per_image=10,
)  # fmt: skip
RECIPE = with_overrides(protocol("coco-12ep", TINY), SMALL)
tool = load_tool("detect")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


def read(root, split="train", training=True, **options):
    return read_split(root, split, **{"num_classes": 3, "training": training, **options})


def ids(split):
    return [picture.id for picture in split.pictures]


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["coco", "roboflow", "plain", "plain instances", "yaml"])
def test_every_layout_is_the_same_data(pristine, root, layout):
    data = relayout(root, layout)
    for split in ("train", "val"):
        expected, found = (read(where, split, split == "train") for where in (pristine, data))
        assert list(found.pictures) == list(expected.pictures) and found.class_names == expected.class_names
        assert all(np.array_equal(found.load(p), expected.load(p)) for p in expected.pictures)
        assert locate(str(data), split).annotations == found.file
    assert read_classes(data, "val") == {3: "rectangle", 7: "disc", 90: "bar"}


def test_an_export_is_evaluated_on_valid_then_val_then_test(root):
    data = relayout(root, "roboflow")
    shutil.copytree(data / "valid", data / "test")
    assert locate(data, "val").images == data / "valid"
    (data / "valid").rename(data / "val")
    assert locate(data, "val").images == data / "val"
    shutil.rmtree(data / "val")
    assert locate(data, "val").images == data / "test"


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(UserError, match="no file .*nowhere and no folder"):
        locate(tmp_path / "nowhere", "train")
    (root / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"no folder .*train2017 for the images of .*instances_train2017\.json"
    ):
        locate(root, "train")
    annotation_file(root, "train").unlink()
    with pytest.raises(UserError) as error:
        locate(root, "train")
    assert str(root) in str(error.value) and all(name in str(error.value) for name, _ in LAYOUTS["train"])


LINKS = (f"a{k}: &a{k} [{', '.join([f'*a{k - 1}' if k else '1'] * 9)}]\n" for k in range(12))
BOMB = "".join(LINKS) + "train: *a11"  # 9 ** 12 numbers, if it were written out


@pytest.mark.parametrize("text, message", [
    ("train: {annotations: a.json, images: .}", "no file .*a.json"),
    ("val: {annotations: a.json, images: .}", "must hold train: "),
    ("train: {annotations: a.json}", "must hold train: {annotations: FILE, images: FOLDER}"),
    ("train: {annotations: a.json, images: ., extra: b}", "must hold train"),
    ("train: {annotations: 3, images: .}", "must hold train"),
    ("train: " + "[" * 5000, "is no YAML"), (BOMB, "must hold train"),
    ("train: coco", "must hold train: {annotations: FILE, images: FOLDER}$"), ("- train", "must hold train"),
    ("a: [", "is no YAML"), ("", "must hold train"),
])  # fmt: skip
def test_damaged_yaml_is_named(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        locate(tmp_path / "data.yaml", "train")
    assert "\n" not in str(error.value)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.json is no COCO instances file"):
        locate(tmp_path / "data.json", "train")
    (tmp_path / "data.txt").write_text("{}")
    with pytest.raises(UserError, match=r"data\.txt is neither a folder nor a \.yaml file"):
        locate(tmp_path / "data.txt", "train")


# --- a share of the images --------------------------------------------------------------------------------


def test_a_share_is_the_same_in_every_run_and_of_the_images_that_training_uses(tmp_path):
    root = write_coco(tmp_path / "coco", n_train=30)
    whole, half, fifth = (read(root, share=share) for share in (1.0, 0.5, 0.2))
    assert len(whole.pictures) == 29 and len(half.pictures) == n_share(29, 0.5) and len(fifth.pictures) == 6
    assert set(ids(fifth)) < set(ids(half)) < set(ids(whole)) and ids(half) == sorted(ids(half))
    assert ids(half) != ids(whole)[: len(ids(half))]  # not the first ones
    assert len(read(root, share=1e-9).pictures) == 1
    # The order of the entries changes nothing but the order.
    edit(annotation_file(root, "train"), lambda content: content["images"].reverse())
    assert sorted(ids(read(root, share=0.5))) == ids(half) and ids(read(root, share=0.5)) == ids(half)[::-1]
    data = Data.read(root, with_overrides(RECIPE, dict(train_share=0.5)))
    assert sorted(ids(data.train)) == ids(half) and len(data.val.pictures) == 4


def test_validation_images_that_are_training_images_are_told(tmp_path, capsys):
    root = write_coco(tmp_path / "coco")
    assert Data.read(root, RECIPE).n_shared == 0
    (root / "again.yaml").write_text(
        "train: {annotations: annotations/instances_val2017.json, images: val2017}\n"
        "val: {annotations: annotations/instances_val2017.json, images: val2017}\n"
    )
    data = Data.read(root / "again.yaml", RECIPE)
    assert data.n_shared == 3  # the last one has no object to learn from
    assert "3 of the 4 validation images are training images, too" in capsys.readouterr().err
    run = DetectionRun(TINY, None, root, tmp_path / "out", RECIPE, device="cpu")
    assert run_deviations(run, (3, 4), data.n_shared)["shared_images"] == [0, 3]
    assert "shared_images" not in run_deviations(run, (3, 4))


@pytest.mark.detectron2
def test_a_share_is_the_same_in_both_engines(tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is optional)")
    from det_plugin.detectron2_engine.catalog import coco_dicts

    data = relayout(write_coco(tmp_path / "coco", n_train=12), "roboflow")
    theirs = coco_dicts(data, "train", num_classes=3, filter_empty=True, share=0.3)
    assert [picture["image_id"] for picture in theirs] == ids(read(data, share=0.3)) and len(theirs) == 3


def test_a_share_can_be_recomputed_by_anyone():
    """The images of a published run must be known for ever: numpy's frozen generator, written out."""
    assert np.random.RandomState(0).permutation(10).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]


# --- what is allowed --------------------------------------------------------------------------------------


def add(content, **fields):
    """One more object, on the third image."""
    known = dict(
        id=500, image_id=content["images"][2]["id"], category_id=3, bbox=[10, 10, 20, 20], area=400, iscrowd=0
    )
    content["annotations"].append({**known, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], **fields})


def only_crowds(content, image):
    """Turn all objects of an image into crowds."""
    for annotation in content["annotations"]:
        if annotation["image_id"] == content["images"][image]["id"]:
            annotation["iscrowd"] = 1


def perfect(root, category_ids=(3, 7, 90)):
    """The objects of the validation split as predictions."""
    split, found = read(root, "val", False, num_classes=None), []
    for picture in split.pictures:
        for k, segmentation in zip(picture.classes, picture.segmentations):
            if not segmentation:
                continue
            mask = mask_of(segmentation, picture.height, picture.width)
            y, x = np.nonzero(mask)
            box = [int(x.min()), int(y.min()), int(x.max() - x.min() + 1), int(y.max() - y.min() + 1)]
            found.append(
                dict(
                    image_id=picture.id,
                    category_id=category_ids[k],
                    bbox=box,
                    score=0.9,
                    segmentation=encode_mask(mask > 0),
                )
            )
    return found


def mask_of(segmentation, height, width):
    api = coco_api().mask
    rles = api.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else segmentation
    rles = (
        api.frPyObjects(rles, height, width)
        if isinstance(rles, dict) and isinstance(rles["counts"], list)
        else rles
    )
    return api.decode(api.merge(rles) if isinstance(rles, list) else rles)


def test_crowd_only_and_empty_images(root):
    """Out of training; in evaluation they are there, and what is found in a crowd is neither right nor
    wrong."""
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda content: only_crowds(content, 1))
    assert ids(read(root)) == [1, 3, 4, 5] and ids(read(root, "val", False)) == [1001, 1002, 1003, 1004]
    assert not read(root, "val", False).pictures[1].classes
    file = annotation_file(root, "val")
    found = perfect(root)
    crowd = next(a for a in json.loads(file.read_text())["annotations"] if a["image_id"] == 1002)
    inside = dict(image_id=1002, category_id=crowd["category_id"], bbox=crowd["bbox"], score=0.95)
    found.append({**inside, "segmentation": encode_mask(mask_of(crowd["segmentation"], 96, 64) > 0)})
    metrics = coco_metrics(file, found)
    assert metrics["mask_ap"] == pytest.approx(100)
    found[-1] = {**found[-1], "image_id": 1004}  # the empty image: there the same box is wrong
    assert coco_metrics(file, found)["mask_ap"] < 99


def test_objects_without_extent_or_mask_teach_nothing(root):
    def change(content):
        add(content, id=500, bbox=[10, 10, 0, 20])
        add(content, id=501, bbox=[10, 10, 5, 0], segmentation=[])
        add(content, id=502, segmentation=[[10, 10, 30, 30]])  # two points
        add(
            content, id=503, segmentation=[[10, 10], [10, 10, 30, 10, 30, 30, 10, 30]]
        )  # the second one counts

    for split in ("train", "val"):
        edit(annotation_file(root, split), change)
    assert len(read(root).pictures[2].classes) == 3
    third = read(root, "val", False).pictures[2]
    assert len(third.classes) == 6 and [len(s) for s in third.segmentations[2:]] == [1, 0, 0, 1]
    metrics = coco_metrics(
        annotation_file(root, "val"), perfect(root)
    )  # all are counted, as COCO does; no crash
    assert 30 < metrics["mask_ap"] < 100
    truth = {
        annotation["id"]: annotation for annotation in read_truth(annotation_file(root, "val"))["annotations"]
    }
    assert mask_of(truth[502]["segmentation"], 100, 128).sum() == 0


def test_masks_leave_the_image_and_are_clipped(root):
    far = [[-40, -30, 20, -30, 20, 25, -40, 25]]
    edit(
        annotation_file(root, "train"),
        lambda content: add(content, bbox=[-40, -30, 60, 55], segmentation=far),
    )
    edit(
        annotation_file(root, "train"),
        lambda content: add(content, id=501, bbox=[300, 300, 9, 9], segmentation=[[300, 300] * 3]),
    )
    split = read(root)
    assert split.pictures[2].segmentations[2] == far
    assert mask_of(far, 100, 128).sum() == 20 * 25
    recipe = with_overrides(RECIPE, dict(jitter_scale=(2.0, 2.0)))
    for position in range(12):
        sample = TrainSamples(split, recipe, seed=0)[position]
        height, width = sample["image"].shape[1:]
        boxes = sample["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2::2] <= width).all() and (boxes[:, 3::2] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()  # the object outside is gone


def test_rles_of_both_kinds_are_the_polygons_mask(root):
    height, width = 100, 128  # of the third image
    mask = np.zeros((height, width), np.uint8)
    mask[10:30, 10:30] = 1
    plain, packed = rle_of_box(width, height, 10, 10, 20, 20), encode_mask(mask > 0)
    assert run_lengths(packed["counts"]) == plain["counts"] and isinstance(packed["counts"], str)

    def change(content):
        for id, segmentation in ((500, plain), (501, packed)):
            add(content, id=id, segmentation=segmentation)

    edit(annotation_file(root, "train"), change)
    masks = [mask_of(s, height, width) for s in read(root).pictures[2].segmentations[2:]]
    assert np.array_equal(masks[0], mask) and np.array_equal(masks[1], mask)


def test_run_lengths_are_pycocotools():
    api = coco_api().mask
    for seed in range(20):
        mask = cv2.GaussianBlur(np.random.default_rng(seed).random((90, 300)), (0, 0), 1 + seed) > 0.5
        rle = encode_mask(mask)
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1
        runs = np.diff([0, *changes, mask.size]).tolist()
        assert run_lengths(rle["counts"]) == ([0, *runs] if mask[0, 0] else runs)
        assert np.array_equal(api.decode(rle), mask)


def test_ids_from_zero_absent_fields_and_names_twice(pristine, root):
    """What common exports write. COCOeval takes the annotation id 0 for "no match": we count from 1."""

    def change(content):
        for annotation in content["annotations"]:
            annotation["id"] -= 1
            annotation["category_id"] = {3: 0, 7: 1, 90: 2}[annotation["category_id"]]
            annotation["made_by"] = "hand"
            if not annotation["iscrowd"]:
                del annotation["area"], annotation["iscrowd"]
        names = ("thing", "thing", "bar")
        content["categories"] = [
            {"id": k, "name": name, "supercategory": "none"} for k, name in enumerate(names)
        ]
        content["info"] = {"year": 2026}

    before = coco_metrics(annotation_file(pristine, "val"), perfect(pristine))
    for split in ("train", "val"):
        edit(annotation_file(root, split), change)
    assert read_classes(root, "val") == {0: "thing (0)", 1: "thing (1)", 2: "bar"}
    assert list(read(root).pictures) == list(read(pristine).pictures)
    metrics = coco_metrics(annotation_file(root, "val"), perfect(root, category_ids=(0, 1, 2)))
    assert metrics["mask_ap"] == metrics["box_ap"] == pytest.approx(100) == before["mask_ap"]
    assert set(metrics["mask_ap_classes"]) <= {"thing (0)", "thing (1)", "bar"}


def test_truth_of_a_clean_file_is_the_file(pristine):
    content, truth = (
        json.loads(annotation_file(pristine, "val").read_text()),
        read_truth(annotation_file(pristine, "val")),
    )
    assert {key: truth[key] for key in ("images", "annotations")} == {
        key: content[key] for key in ("images", "annotations")
    }
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    (path := pristine.parent / "without.json").write_text(json.dumps(content))
    for annotation, image in zip(read_truth(path)["annotations"], truth["annotations"]):
        size = next((i["height"], i["width"]) for i in content["images"] if i["id"] == image["image_id"])
        assert annotation["area"] == mask_of(annotation["segmentation"], *size).sum()


def test_images_in_subfolders(root):
    (root / "train2017" / "a" / "b").mkdir(parents=True)
    (root / "train2017" / "000000000002.png").rename(root / "train2017" / "a" / "b" / "2.png")
    edit(annotation_file(root, "train"), lambda content: content["images"][1].update(file_name="a/b/2.png"))
    split = read(root)
    assert split.load(split.pictures[1]).shape == (96, 64, 3)


def test_turned_photographs_are_upright(root):
    """EXIF: the file holds 64 x 96 pixels, the annotations speak of the image as it is seen, 96 x 64."""
    upright = Image.open(root / "train2017" / "000000000001.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "train2017" / "1.jpg", exif=exif, quality=95)
    edit(annotation_file(root, "train"), lambda content: content["images"][0].update(file_name="1.jpg"))
    split = read(root)
    split.check_headers()
    assert np.abs(split.load(split.pictures[0]).astype(int) - np.asarray(upright)).mean() < 5


@pytest.mark.parametrize("area", [None, "big", -1, math.nan, math.inf, 1e308, 10**400, True, [1]])
def test_an_area_that_is_none_is_the_masks(root, capsys, area):
    file, found = annotation_file(root, "val"), perfect(root)
    edit(file, lambda content: content["annotations"][0].pop("area"))
    expected, truth = coco_metrics(file, found), read_truth(file)
    edit(file, lambda content: content["annotations"][0].update(area=area))
    assert coco_metrics(file, found) == expected and expected["mask_ap"] == pytest.approx(100)
    areas = ({a["id"]: a["area"] for a in content["annotations"]} for content in (truth, read_truth(file)))
    assert next(areas) == next(areas)
    Data.read(root, RECIPE)
    assert "instances_val2017.json: 1 areas are no number of pixels (the first: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", [None, "0", "", False, 0.0, "false"])
def test_an_iscrowd_of_another_type_is_zero(pristine, root, flag):
    for split in ("train", "val"):
        edit(
            annotation_file(root, split),
            lambda c: [a.update(iscrowd=a["iscrowd"] or flag) for a in c["annotations"]],
        )
    assert list(read(root).pictures) == list(read(pristine).pictures)
    file, found = annotation_file(root, "val"), perfect(root)
    assert coco_metrics(file, found) == coco_metrics(annotation_file(pristine, "val"), found)


@pytest.mark.parametrize("which", [0, 1, 3, 4, 5, 6])  # the third is a crowd, whose area is not read
def test_the_evaluation_is_tried_before_the_first_iteration(root, tmp_path, monkeypatch, which):
    """Whichever annotation of the file breaks it."""

    def broken(*args):
        truth = read_truth(*args)
        truth["annotations"][which]["area"] = "5"
        return truth

    monkeypatch.setattr(coco_metrics_module, "read_truth", broken)
    run = DetectionRun(
        TINY, None, root, tmp_path / "out", RECIPE, device="cpu", workers=0, model_kwargs=dict(depth=1)
    )
    with pytest.raises(
        UserError, match=r"val2017\.json cannot be evaluated \(TypeError: '<' not supported between instances"
    ):
        train(run)
    assert not run.output.exists()


def as_cvat(content):
    """Every object a mask with ``iscrowd`` 1, as CVAT writes them."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    for a in content["annotations"]:
        a.update(iscrowd=1, segmentation=encode_mask(mask_of(a["segmentation"], *sizes[a["image_id"]]) > 0))


def test_crowds_that_are_objects_are_named_and_can_be_taken(pristine, root, tmp_path, capsys):
    Data.read(root, RECIPE)
    told = capsys.readouterr().err
    assert "train2017.json: 1 of 11 annotations are crowds (iscrowd 1): left out of training" in told
    whole = read(pristine)
    edit(annotation_file(root, "val"), as_cvat)
    edit(annotation_file(root, "train"), lambda c: [as_cvat(c), c["annotations"][0].update(iscrowd=0)])
    Data.read(root, RECIPE)
    told = capsys.readouterr().err
    assert "6 of 6 annotations are crowds" in told and "give --crowds objects" in told and "disc" in told
    file, taken = annotation_file(root, "val"), read(root, crowds="objects")
    assert [p.classes for p in taken.pictures] == [p.classes for p in whole.pictures]
    found = perfect(pristine)
    assert "box_ap" not in coco_metrics(file, found)
    assert coco_metrics(file, found, "objects")["box_ap"] == pytest.approx(100)
    out = tmp_path / "out"
    tool.main(words(root, out, "--backbone", TINY, "--crowds", "objects", "backbone.depth=1"))
    assert "annotations are crowds (iscrowd 1), taken as objects" in capsys.readouterr().err
    assert read_result(out).protocol.deviations["crowds"] == ["ignored", "objects"]
    tool.main(["--data", str(root), "--output", str(out), "--eval-only", "--device", "cpu", "--workers", "0"])
    assert "nan" not in capsys.readouterr().err.split("AP75")[0].split("box AP")[1]
    with pytest.raises(UserError, match="--eval-only: .*leave out --crowds"):
        tool.main(["--data", str(root), "--output", str(out), "--eval-only", "--crowds", "objects"])


@pytest.mark.detectron2
def test_detectron2_takes_crowds_as_objects(root, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is optional)")
    from detectron2.config import instantiate

    from det_plugin.detectron2_engine.evaluate import config_deviations
    from det_plugin.detectron2_engine.lazy import config

    for split in ("train", "val"):
        edit(annotation_file(root, split), as_cvat)
    cfg = config(with_overrides(RECIPE, dict(crowds="objects", amp=False)), TINY, data=root, device="cpu")
    assert sum(len(d["annotations"]) for d in instantiate(cfg.dataloader.train.dataset)) == 10
    assert instantiate(cfg.dataloader.evaluator).reading == {"crowds": "objects"}
    changed = config_deviations(cfg)
    assert changed["crowds"] == ["ignored", "objects"] and not any("dataset" in key for key in changed)
    assert "crowds" not in config(RECIPE, TINY, data=root).dataloader.train.dataset


def test_hashes_of_runs_from_before_crowds_stay(root, tmp_path):
    run = settings_of(TINY, None, root, tmp_path, "coco-12ep", {})
    assert "crowds" not in run.settings()["protocol"]
    run = settings_of(TINY, None, root, tmp_path, "coco-12ep", {"crowds": "objects"})
    assert run.settings()["protocol"]["crowds"] == "objects"


def test_names_of_categories_are_one_line(root):
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda c: c["categories"][0].update(name="a\nb\x1b[2J\ud800"))
    assert read(root).class_names[0] == "a b [2J " == read_classes(root, "val")[3]
    assert "a b [2J " in coco_metrics(annotation_file(root, "val"), perfect(root))["box_ap_classes"]


def test_a_long_outline_that_hardly_crosses_itself_is_kept(root):
    turn = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    rough = 20 + np.random.default_rng(0).uniform(0, 0.05, 5000)
    outline = np.stack([40 + rough * np.cos(turn), 40 + rough * np.sin(turn)], 1).ravel().tolist()
    edit(annotation_file(root, "train"), lambda content: add(content, segmentation=[outline]))
    assert read(root).pictures[2].segmentations[2] == [outline]


# --- what is not ------------------------------------------------------------------------------------------


def first(**fields):
    """A change of the first annotation."""
    return lambda content: content["annotations"][0].update(fields)


def image(**fields):
    """A change of the first image's entry."""
    return lambda content: content["images"][0].update(fields)


def tangle(n):
    """A polygon of random points, which crosses itself about n * n / 9 times."""
    return np.random.default_rng(0).uniform(0, 60, 2 * n).tolist()


DAMAGED = [
    (
        lambda c: [a.pop("segmentation") for a in c["annotations"]],
        "none of 10 objects has a mask .'segmentation'.; masks=off learns the boxes of all",
    ),
    (first(segmentation=[]), "1 of 10 objects have no mask .the first: annotation 1.; masks=off .* masks=on"),
    (first(segmentation=None), "1 of 10 objects have no mask .the first: annotation 1.; masks=off"),
    (first(bbox=[1, 2, math.nan, 4]), r"annotation 1 has the bbox \[1, 2, nan, 4\]"),
    (first(bbox=["1", "2", "3", "four"]), "annotation 1 has the bbox .*not x, y, width, height"),
    (first(bbox=[1, 2, 3]), "annotation 1 has the bbox"),
    (first(bbox=None, segmentation=[]), r"annotation 1 has the bbox \[\]"),
    (lambda c: c["annotations"][1].pop("bbox"), "lacks 'bbox'"),
    (first(segmentation=[1, 2, 3, 4, 5]), "annotation 1 has a segmentation that is no polygons"),
    (first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "no polygons"),
    (first(segmentation=[[[1, 2], [3, 4], [5, 6]]]), "no polygons"),
    (first(segmentation=[["1"] * 6]), "no polygons"),
    (first(segmentation=[[1, 2, math.nan, 4, 5, 6]]), "no polygons"),
    (first(segmentation=[[1, 2, 1e9, 4, 5, 6]]), "no polygons"),
    (first(segmentation="mask.png"), "no polygons"),
    (first(segmentation={"size": [64, 96]}), "no polygons and no RLE"),
    (
        first(segmentation={"size": [96, 64], "counts": [96 * 64]}),
        r"RLE of size \[96, 64\], but its image is 64 high and 96 wide",
    ),
    (
        first(segmentation={"size": [64, 96], "counts": [96 * 63]}),
        "RLE of 6048 pixels, but its image has 6144",
    ),
    (first(segmentation={"size": [64, 96], "counts": [-1, 96 * 64 + 1]}), "no RLE"),
    (first(segmentation={"size": [64, 96], "counts": ["6144"]}), "no RLE"),
    (first(segmentation={"size": [64, 96], "counts": "zzz"}), "RLE"),
    (first(category_id=4), "annotation 1 has the unknown category_id 4"),
    (first(image_id="one"), "annotation 1 has the unknown image_id 'one'"),
    (first(id=2), "an annotation id twice: 2"),
    (first(id="a"), "the annotation id 'a' is no integer"),
    (first(iscrowd="yes"), "annotation 1 has the iscrowd 'yes': not 0 or 1"),
    (first(iscrowd=-1), "annotation 1 has the iscrowd -1"),
    (first(iscrowd=math.nan), "annotation 1 has the iscrowd nan"),
    (first(iscrowd=[0]), r"annotation 1 has the iscrowd \[0\]"),
    (first(bbox=[10**400, 0, 5, 5]), r"annotation 1 has the bbox \[1000.*\.\.\.: not x, y"),
    (first(bbox=[1e308, 0, 1e308, 5]), "annotation 1 has the bbox"),
    (first(segmentation=[[10**400, 2, 3, 4, 5, 6]]), "no polygons"),
    (first(segmentation={"size": [64, 10**400], "counts": [6144]}), "RLE of size"),
    (first(segmentation={"size": [64, 96], "counts": [10**400]}), "RLE of 1000.*\\.\\.\\. pixels"),
    (first(segmentation=[[0, 0, 1e6, 1e6] * 20]), "a polygon of 40 points, 4.* pixels long"),
    (first(segmentation=[tangle(4000)]), "a polygon of 4000 points, .* crosses itself about [0-9]{7} times"),
    (first(id=10**400), "the annotation id 1000.*\\.\\.\\. is larger than"),
    (first(image_id=10**400), "the unknown image_id 1000.*\\.\\.\\."),
    (image(width=10**400), "image 1 is 1000.*\\.\\.\\. x 64 pixels"),
    (image(file_name="a\nb.png"), r"image 1: the file_name 'a\\nb.png' has a line break"),
    (image(file_name="\ud800.png"), r"image 1: the file_name '\\ud800.png' has a line break or the like"),
    (lambda c: c["categories"][0].update(name=[[[]]]), "the category 3 has the name .*: no text"),
    (image(id=2), "an image id twice: 2"),
    (image(id="one"), "the image id 'one' is no integer"),
    (image(width="96 px"), "image 1 is '96 px' x 64 pixels"),
    (image(height=-1), "image 1 is 96 x -1 pixels"),
    (image(file_name="../1.png"), "image 1: the file_name '../1.png' leads out of the folder"),
    (image(file_name="/tmp/1.png"), "image 1: the file_name '/tmp/1.png' leads out of the folder"),
    (
        lambda c: c["images"][0].update(coco_url="http://images/" + c["images"][0].pop("file_name")),
        "image 1 has no file_name",
    ),
    (lambda c: c["categories"].append(c["categories"][0]), "a category id twice: 3"),
    (lambda c: c["categories"].clear(), "no categories"),
    (lambda c: c["categories"][0].pop("name"), "lacks 'name'"),
    (lambda c: c.update(annotations=[1]), "an entry is damaged"),
    (
        lambda c: c.pop("categories"),
        "is no COCO instances file: it has no list 'categories'",
    ),  # a captions file
    (lambda c: [c["annotations"].clear(), c["images"].clear()], "has no images with objects"),
]


@pytest.mark.parametrize("change, message", DAMAGED)
def test_damaged_annotations_are_named(root, change, message):
    edit(annotation_file(root, "train"), change)
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        read(root)
    assert "instances_train2017.json" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600 and time.monotonic() - started < 5


@pytest.mark.parametrize("depth", [100, 300, 500, 800, 900, 950, 980, 2000, 100_000])
@pytest.mark.parametrize("key", ["bbox", "segmentation", "area", "iscrowd", "category_id", "id"])
def test_deep_values_end_in_one_line(root, depth, key):
    file = annotation_file(root, "train")
    edit(file, first(**{key: "DEEP"}))
    file.write_text(file.read_text().replace('"DEEP"', "[" * depth + "1" + "]" * depth))
    try:
        read(root)  # an area is replaced
    except UserError as error:
        assert "instances_train2017.json" in str(error) and "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"images": {}}', "\x00", '{"images": [], "annotations": []}']
)
def test_other_files_are_no_coco(root, text):
    annotation_file(root, "train").write_text(text)
    with pytest.raises(
        UserError, match="instances_train2017.json (is no COCO|cannot be read as JSON|holds no mapping)"
    ):
        read(root)


def shorten(path):
    """Leave two thirds of a JPEG in place of a PNG."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(path.with_suffix(".jpg"), quality=95)
    content = path.with_suffix(".jpg").read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


IMAGES = [
    (lambda path: path.unlink(), "names 000000000001.png, which .*train2017 does not hold"),
    (lambda path: path.write_bytes(b"no image"), "000000000001.png cannot be read as an image"),
    (lambda path: path.write_bytes(b""), "000000000001.png cannot be read as an image"),
    (lambda path: path.write_bytes(path.read_bytes()[:20]), "000000000001.png cannot be read as an image"),
    (
        lambda path: Image.new("L", (96, 65)).save(path),
        "000000000001.png is 96 x 65 pixels, but .* says 96 x 64",
    ),
]


@pytest.mark.parametrize("damage, message", IMAGES)
def test_bad_images_are_found_before_the_first_iteration(root, tmp_path, damage, message):
    damage(root / "train2017" / "000000000001.png")
    run = DetectionRun(
        TINY, None, root, tmp_path / "out", RECIPE, device="cpu", workers=0, model_kwargs=dict(depth=1)
    )
    with pytest.raises(UserError, match=message):
        train(run)
    assert not run.output.exists()


def test_a_truncated_image_is_named_when_it_is_met(root):
    shorten(root / "train2017" / "000000000001.png")
    split = read(root)
    for check in (split.check_headers, lambda: split.load(split.pictures[0])):  # the header is whole
        with pytest.raises(UserError, match="000000000001.png cannot be read as an image"):
            check()


def test_training_takes_another_image_in_place_of_a_truncated_one(root, tmp_path, capsys, monkeypatch):
    """Drawn from (seed, position) alone; named, once, and counted; too many are an error."""
    whole = TrainSamples(read(root, training=True), RECIPE, seed=3)
    before = [whole[i] for i in range(24)]
    shorten(root / "train2017" / "000000000001.png")
    split = read(root, training=True)
    n = len(split.pictures)
    split.check_headers(1 / n)
    assert f"1 of {n} images cannot be read" in capsys.readouterr().err
    samples, order = TrainSamples(split, RECIPE, seed=3), [*range(5, 24), *range(5)]
    after = {i: samples[i] for i in order}  # as after a resumption
    replaced = [i for i in order if "broken" in after[i]]
    assert replaced and len(replaced) < 24
    for i in order:
        same = torch.equal(after[i]["image"], before[i]["image"])
        assert same != (i in replaced)
        assert torch.equal(after[i]["image"], TrainSamples(split, RECIPE, seed=3)[i]["image"])
    skipped = Skipped(tmp_path)
    for made in batches(samples, [[i] for i in order], 0, torch.device("cpu"), skipped):
        assert "broken" not in made[0]
    lines = (tmp_path / "broken_images.txt").read_text().splitlines()
    assert len(lines) == 1 and "000000000001.png cannot be read" in lines[0]
    assert (skipped.account.n_read, skipped.account.n_failed >= len(replaced)) == (24, True)
    assert capsys.readouterr().err.count("another image takes its place") == 1
    with pytest.raises(UserError, match="reads failed .*more than a share of 0.1; .*broken_images.txt"):
        skipped.record(1000, lines * 200)


# --- the tool ---------------------------------------------------------------------------------------------


def words(data, output, *more, **changes):
    """A command line of one small iteration."""
    small = {**{key: value for key, value in SMALL.items() if key != "num_classes"}, **changes}
    named = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in small.items()]
    base = [
        "--engine",
        "torchvision",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--data",
        str(data),
        "--output",
        str(output),
    ]
    return [*base, *map(str, more), *named]


def test_classes_come_from_the_data_and_mark_the_result(root, tmp_path, capsys):
    """One's own data in one command, out of a .yaml file."""
    data = relayout(root, "yaml")
    tool.main(
        words(
            data,
            tmp_path / "out",
            "--backbone",
            TINY,
            "--protocol",
            "coco10pct-12ep",
            "backbone.depth=1",
            train_share=0.4,
        )
    )
    assert f"num_classes=3, as in {data}; the protocol's is 80" in capsys.readouterr().out
    result = read_result(tmp_path / "out")
    assert result.protocol.name == "coco10pct-12ep" and result.protocol.deviations["num_classes"] == [80, 3]
    assert result.protocol.deviations["train_images"] == [n_share(117_266, 0.4), 2]
    assert result.protocol.deviations["train_share"] == [0.1, 0.4]
    with pytest.raises(UserError, match="has 3 categories, but num_classes=4"):
        tool.main(words(data, tmp_path / "other", "--backbone", TINY, num_classes=4))
    with pytest.raises(UserError, match="--eval-only: .*out has its settings already, leave out .*lr=1"):
        tool.main(["--data", str(data), "--output", str(tmp_path / "out"), "--eval-only", "lr=1"])


def test_number_of_classes_of_coco_needs_no_word(root, tmp_path, capsys):
    categories = [
        {"id": k, "name": f"class {k}"} for k in range(1, 91) if k not in (4, 5, 6, 8, 9, 10, 11, 12, 13, 14)
    ]
    for split in ("train", "val"):
        edit(annotation_file(root, split), lambda content: content.update(categories=categories))
    run = settings_of(TINY, None, root, tmp_path / "out", "coco-12ep", {})
    assert run.protocol.num_classes == 80 and "num_classes" not in capsys.readouterr().out


def test_the_engine_is_that_of_the_folder(tmp_path):
    for file, engine in (("config_resolved.yaml", "detectron2"), ("config.json", "torchvision")):
        folder = tmp_path / engine
        folder.mkdir()
        (folder / file).write_text("{}")
        assert choose_engine("auto", folder) == (engine, f"it trained {folder}")
    assert choose_engine("torchvision", tmp_path / "detectron2")[0] == "torchvision"


def test_a_checkpoint_of_another_width_ends_in_one_line(root, tmp_path):
    torch.manual_seed(0)
    vit = build_backbone(TINY, depth=1)
    file = save_backbone(
        tmp_path / "tiny.safetensors",
        vit.state_dict(),
        name=TINY,
        model_kwargs=vit.model_kwargs,
        provenance={},
    )
    with pytest.raises(
        UserError, match=r"tiny\.safetensors.*"
    ) as error:  # pretrain.cli prints it and ends with code 2
        tool.main(words(root, tmp_path / "out", "--backbone", "vit_small_patch16", "--weights", file))
    assert "192" in str(error.value) and "384" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
