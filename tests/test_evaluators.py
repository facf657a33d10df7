"""Detectron2's COCO evaluator and ours: the same AP from the same predictions, in every number."""

import importlib.util
import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from det_plugin.coco.masks import encode_mask
from det_plugin.coco.metrics import coco_metrics
from pretrain.errors import UserError

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2, the oracle, is not installed"
)
SIDE, CATEGORIES = (
    240,
    {2: "cat", 5: "dog", 17: "cup", 90: "bird"},
)  # nothing is a bird; of cups there are crowds alone


def disc(box):
    """Pixels of an ellipse in a box (x, y, width, height), and a corner of the image where it leaves
    nothing."""
    x, y, w, h = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def random_box(rng, sides):
    """Quarters of pixels, exact in float32."""
    w, h = np.minimum(rng.choice(sides) * rng.uniform(0.7, 1.4, 2), SIDE - 2)
    return (np.array([rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h), w, h]) * 4).round() / 4


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An annotation file, and detections by image: found, missed, doubled, displaced, of the wrong class,
    made up, with ties."""
    rng, annotations, found = np.random.default_rng(0), [], defaultdict(list)

    def detect(image, kind, box):
        score = rng.integers(1, 10) / 10  # many are equal
        found[image].append(
            {"image_id": image, "category_id": kind, "bbox": box.tolist(), "score": float(np.float32(score))}
        )

    for image in range(1, 13):
        for _ in range(0 if image in (4, 9) else int(rng.integers(1, 7))):
            kind, box, crowd = int(rng.choice([2, 5])), random_box(rng, [18, 60, 150]), rng.random() < 0.15
            kind = 17 if crowd and rng.random() < 0.5 else kind
            mask = encode_mask(disc(box))
            named = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": kind,
                "iscrowd": int(crowd),
            }
            annotations.append(
                {**named, "bbox": box.tolist(), "area": float(disc(box).sum()), "segmentation": mask}
            )
            for _ in range(int(rng.integers(0, 4))):
                moved = box + (rng.normal(0, 0.06, 4) * box[[2, 3, 2, 3]] * 4).round() / 4
                detect(image, kind if rng.random() < 0.9 else 5, moved)
        for _ in range(130 if image == 4 else int(rng.integers(0, 4))):  # more than the 100 that count
            detect(image, int(rng.choice([2, 5, 17, 90])), random_box(rng, [18, 60, 150]))
    for prediction in (p for own in found.values() for p in own):
        prediction["segmentation"] = encode_mask(disc(prediction["bbox"]))
    images = [
        {"id": image, "file_name": f"{image}.jpg", "width": SIDE, "height": SIDE} for image in range(1, 13)
    ]
    categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
    file = tmp_path_factory.mktemp("evaluators") / "instances.json"
    file.write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    )
    return file, dict(found)


def by_detectron2(file, found, name, fast):
    """What Detectron2's evaluator makes of them, under our names."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    from det_plugin.coco.masks import coco_api

    if name not in DatasetCatalog:
        register_coco_instances(name, {}, str(file), str(file.parent))
    DatasetCatalog.get(name)  # names the classes
    evaluator, kinds = (
        COCOEvaluator(name, tasks=("bbox", "segm"), distributed=False, use_fast_impl=fast),
        list(CATEGORIES),
    )
    evaluator.reset()
    for image in range(1, 13):
        own, instances = found.get(image, []), Instances((SIDE, SIDE))
        corners = np.array([p["bbox"] for p in own]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        instances.pred_boxes = Boxes(torch.from_numpy(corners).float())
        instances.scores = torch.tensor([p["score"] for p in own])
        instances.pred_classes = torch.tensor([kinds.index(p["category_id"]) for p in own], dtype=torch.long)
        masks = [coco_api().mask.decode(p["segmentation"]) for p in own]
        instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, SIDE, SIDE)).bool()
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return under_our_names(evaluator.evaluate()), evaluator._use_fast_impl


def under_our_names(results):
    """Metrics without ground truth (NaN) are left out."""
    names = {
        "AP": "ap",
        "AP50": "ap50",
        "AP75": "ap75",
        "APs": "ap_small",
        "APm": "ap_medium",
        "APl": "ap_large",
    }
    metrics = {}
    for task, kind in (("bbox", "box"), ("segm", "mask")):
        known = {key: value for key, value in results[task].items() if np.isfinite(value)}
        metrics |= {f"{kind}_{names[key]}": value for key, value in known.items() if key in names}
        by_class = {key.removeprefix("AP-"): value for key, value in known.items() if key.startswith("AP-")}
        metrics[f"{kind}_ap_classes"] = by_class
    return metrics


@needs_detectron2
@pytest.mark.parametrize("fast", [False, True])
def test_detectron2_and_ours_agree(case, fast):
    file, found = case
    expected, is_fast = by_detectron2(file, found, f"evaluators:{file}", fast)
    if fast and not is_fast:
        pytest.skip("Detectron2 is installed without its compiled evaluator")
    ours = coco_metrics(file, [p for own in found.values() for p in own])
    assert ours.keys() == expected.keys() and len(ours) == 2 * 7
    for kind in ("box", "mask"):
        assert ours[f"{kind}_ap_classes"].keys() == expected[f"{kind}_ap_classes"].keys() == {"cat", "dog"}
        for name in ("cat", "dog"):
            assert ours[f"{kind}_ap_classes"][name] == pytest.approx(
                expected[f"{kind}_ap_classes"][name], abs=1e-9
            )
        sizes = [ours.pop(f"{kind}_{name}") for name in ("ap_small", "ap_medium", "ap_large")]
        assert sizes == pytest.approx(
            [expected[f"{kind}_{name}"] for name in ("ap_small", "ap_medium", "ap_large")], abs=1e-9
        )
        for name in ("ap", "ap50", "ap75"):
            assert ours[f"{kind}_{name}"] == pytest.approx(expected[f"{kind}_{name}"], abs=1e-9)
        assert (
            5 < ours[f"{kind}_ap75"] < ours[f"{kind}_ap50"] < 95 and len({*sizes}) == 3
        )  # nothing is trivial


def test_without_annotations_there_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(UserError, match="instances.json cannot be read as JSON"):
        coco_metrics(tmp_path / "instances.json", [])
