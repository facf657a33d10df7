"""A detector on one's own images: both engines alike, the results' file, the images, and what cannot be
read."""

import importlib
import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_fixture import CATEGORIES, annotation_file, write_coco
from PIL import Image
from test_torchvision_engine import SMALL, TINY, detector, detectron2_names
from tool_fixture import load_tool

from det_plugin.coco.annotations import read_split
from det_plugin.coco.masks import coco_api, encode_mask
from det_plugin.figures import Shown, color_of, draw_objects
from det_plugin.predict import load_detector
from det_plugin.run import DetectionRun
from det_plugin.tiles import detect_in_tiles, merged, tiles
from det_plugin.torchvision_engine.folder import CONFIG, resolved_config, save_checkpoint
from det_plugin.torchvision_engine.train import evaluate_folder
from pretrain.analysis.colors import _lab
from pretrain.errors import UserError
from pretrain.files import write_json

FLAGS = dict(depth=2, drop_path=0.0)
needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2, the other engine, is not installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run folder of the torchvision engine, and its model; the weights are random, of ordinary size
    everywhere."""
    folder, model = tmp_path_factory.mktemp("runs") / "torchvision", detector(**FLAGS).eval()
    run = DetectionRun(TINY, None, data, folder, SMALL, device="cpu", model_kwargs=FLAGS)
    split = read_split(data, "train", num_classes=3, training=True)
    write_json(folder / CONFIG, resolved_config(run, model.backbone.vit, split))
    save_checkpoint(folder, {"iteration": 1, "model": model.state_dict()})
    return folder, model


@pytest.fixture
def images(tmp_path):
    """Images as people have them, and a few that are none."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, (60, 90, 3), np.uint8), (9, 9), 0)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels).save(folder / "a.jpg", exif=rotated)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).save(folder / "sub" / "a.jpg")
    Image.fromarray(np.dstack([pixels, pixels[:, :, 0]]), "RGBA").save(folder / "alpha.png")
    Image.fromarray(pixels[:, :, 0]).save(folder / "gray.png")
    (folder / "cut.jpg").write_bytes((folder / "sub" / "a.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_detector_finds_what_the_evaluation_found(trained, data):
    folder, _ = trained
    evaluate_folder(folder, data, device="cpu", workers=0)
    found, split = load_detector(folder, "cpu"), read_split(data, "val", num_classes=3, training=False)
    assert found.classes == CATEGORIES and found.protocol == SMALL
    results = found.detect([split.load(picture) for picture in split.pictures])
    own = [{"image_id": picture.id, **p} for picture, result in zip(split.pictures, results) for p in result]
    assert own == json.loads((folder / "predictions.json").read_text()) and len(own) > 100
    assert found.detect([]) == []
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(UserError, match=r"is not uint8 \[H, W, 3\]"):
            found.detect([bad])


@needs_detectron2
def test_both_engines_find_the_same(trained, data, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate

    from det_plugin.detectron2_engine.lazy import config
    from det_plugin.detectron2_engine.saved_config import resolved

    folder, model = trained
    cfg = config(SMALL, TINY, data=data, output=tmp_path, device="cpu", model_kwargs=FLAGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = instantiate(cfg.model)
    theirs.load_state_dict(detectron2_names(model.state_dict()))
    with pytest.raises(UserError, match="neither config.json nor config_resolved.yaml"):
        load_detector(tmp_path, "cpu")
    LazyConfig.save(resolved(cfg), str(tmp_path / "config_resolved.yaml"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_detector(tmp_path, "cpu")
    DetectionCheckpointer(theirs, str(tmp_path)).save("model_final")
    one, other = load_detector(folder, "cpu"), load_detector(tmp_path, "cpu")
    assert one.classes == other.classes == CATEGORIES and one.protocol == other.protocol
    split = read_split(data, "val", num_classes=3, training=False)
    pixels = [split.load(picture) for picture in split.pictures]
    for ours, expected in zip(one.detect(pixels), other.detect(pixels)):
        assert len(ours) == len(expected) > 10
        assert [p["category_id"] for p in ours] == [p["category_id"] for p in expected]
        assert [p["score"] for p in ours] == pytest.approx([p["score"] for p in expected], abs=1e-5)
        for mine, reference in zip(ours, expected):
            assert mine["bbox"] == pytest.approx(reference["bbox"], abs=1e-2)
            pair = [p["segmentation"] for p in (mine, reference)]
            masks = [coco_api().mask.decode(rle).astype(bool) for rle in pair]
            assert (masks[0] != masks[1]).sum() <= 2  # a probability at 1/2 may fall either way
    load_tool("analyze detections").main(
        ["--run", str(tmp_path), "--data", str(data), "--images", "1001", "--device", "cpu"]
    )
    assert (tmp_path / "figures" / "val_1.png").is_file()


def predict(trained, *words):
    tool = load_tool("predict")
    tool.main(["--run", str(trained[0]), "--device", "cpu", *map(str, words)])


def test_predictions_of_a_folder(trained, images, tmp_path, capsys):
    output = images / "found"  # inside the folder: its images are not taken for images
    for _ in range(2):
        predict(trained, "--images", images, "--output", output, "--min-score", 0.002)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith(
        f"objects in 5 images, 2 skipped: {output / 'predictions.json'}"
    )
    assert "cut.jpg cannot be read" in said.err and "empty.png cannot be read (empty file)" in said.err
    assert "left out, no images by their names: 1 .txt in" in said.err and "the first notes.txt" in said.err
    coco = coco_api().COCO(str(output / "predictions.json"))
    names = {image["file_name"]: (image["width"], image["height"]) for image in coco.dataset["images"]}
    assert names == {
        "a.jpg": (60, 90),
        **dict.fromkeys(["a.png", "alpha.png", "gray.png", "sub/a.jpg"], (90, 60)),
    }
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == CATEGORIES
    assert len(coco.anns) > 20 and min(a["score"] for a in coco.anns.values()) >= 0.002
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        assert annotation["segmentation"]["size"] == [image["height"], image["width"]]
        assert annotation["area"] == coco.annToMask(annotation).sum() and annotation["iscrowd"] == 0
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [(line["file_name"], line["width"], line["height"]) for line in lines] == [
        (image["file_name"], image["width"], image["height"]) for image in coco.dataset["images"]
    ]
    objects = [found for line in lines for found in line["objects"]]
    assert [(o["label"], o["bbox"], o["score"]) for o in objects] == [
        (CATEGORIES[a["category_id"]], a["bbox"], a["score"]) for a in coco.dataset["annotations"]
    ]
    pictures = sorted(
        path.relative_to(output / "pictures").as_posix() for path in (output / "pictures").rglob("*.*")
    )
    assert pictures == ["a.jpg", "a.png.jpg", "alpha.png.jpg", "gray.png.jpg", "sub/a.jpg"]
    assert cv2.imread(str(output / "pictures" / "a.jpg")).shape == (640, 427, 3)  # enlarged, upright


def test_predictions_of_files(trained, images, tmp_path):
    output = tmp_path / "out"
    predict(
        trained,
        "--images",
        images / "a.png",
        images / "sub",
        "--output",
        output,
        "--no-pictures",
        "--min-score",
        1,
    )
    content = json.loads((output / "predictions.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert (
        names == [(images / "a.png").as_posix(), (images / "sub" / "a.jpg").as_posix()]
        and content["annotations"] == []
    )
    assert sorted(path.name for path in output.iterdir()) == ["predictions.json", "predictions.jsonl"]


def test_nothing_to_read_is_an_error(trained, images, tmp_path):
    (tmp_path / "none").mkdir()
    for path, message in [
        (tmp_path / "none", "no images in"),
        (tmp_path / "nowhere", "no file or folder"),
        (images / "cut.jpg", "none of 1 files could be read"),
    ]:
        with pytest.raises(UserError, match=message):
            predict(trained, "--images", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()
    with pytest.raises(UserError, match="is no folder of a detection run"):
        predict((tmp_path / "none",), "--images", images, "--output", tmp_path / "out")


def test_pictures_stay_in_their_folder_and_apart():
    tool, folder = load_tool("predict"), Path("pictures")
    names = ["/data/x.jpg", "../x.jpg", "x.jpg", "x.png", "x.png.jpg"]
    found = list(tool.picture_paths(names, folder))
    assert found == [folder / name for name in ("data/x.jpg", "x.jpg", "x_3.jpg", "x.png.jpg", "x.png_5.jpg")]


def test_visualize_beside_ground_truth(trained, data, tmp_path, capsys):
    tool, (folder, _) = load_tool("analyze detections"), trained
    base = ["--run", str(folder), "--data", str(data), "--output", str(tmp_path), "--device", "cpu"]
    tool.main([*base, "--split", "train", "--count", "4"])
    assert "predictions: made now" in capsys.readouterr().out
    evaluate_folder(folder, data, device="cpu", workers=0)
    tool.main([*base, "--images", "1003,1001", "--min-score", "0.1"])
    assert f"predictions: {folder / 'predictions.json'}" in capsys.readouterr().out
    same_ids = write_coco(
        tmp_path / "same"
    )  # the predictions left are of other images, whose ids are those of these
    shutil.copytree(same_ids / "val2017", same_ids / "train2017", dirs_exist_ok=True)
    shutil.copy(annotation_file(same_ids, "val"), annotation_file(same_ids, "train"))
    tool.main([*base[:2], "--data", str(same_ids), *base[4:], "--split", "train", "--count", "4"])
    assert "predictions: made now" in capsys.readouterr().out
    val, left = (
        read_split(data, "val", num_classes=3, training=False),
        json.loads((folder / "predictions.json").read_text()),
    )
    assert tool.are_of(left, val)
    assert not tool.are_of(
        left, replace(val, pictures=[replace(picture, height=99) for picture in val.pictures])
    )
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert (
        list(captions) == ["train_1.png", "val_1.png"]
        and "score 0.1 and more" in captions["val_1.png"]["caption"]
    )
    assert all(cv2.imread(str(tmp_path / name)).std() > 10 for name in captions)
    with pytest.raises(UserError, match="has no image '7'"):
        tool.main([*base, "--images", "1001,7"])
    file = annotation_file(write_coco(tmp_path / "other"), "val")
    file.write_text(
        file.read_text().replace('"id": 90', '"id": 91').replace('"category_id": 90', '"category_id": 91')
    )
    with pytest.raises(UserError, match="has other categories"):
        tool.main(
            ["--run", str(folder), "--data", str(tmp_path / "other"), "--device", "cpu", "--images", "1001"]
        )


def test_labels_keep_apart_and_classes_have_their_colors():
    """Six boxes at one place: every label's background is whole, so none lies on another."""
    mask, objects = np.zeros((300, 400), bool), []
    for k in range(6):
        objects.append(Shown(k, mask, (100, 80, 300, 220), "label"))
    drawn = draw_objects(np.zeros((300, 400, 3), np.uint8), objects)
    sizes = [int((drawn == color_of(k)).all(axis=2).sum()) for k in range(6)]
    assert min(sizes) > 200
    seen = _lab(np.array([color_of(k) for k in range(80)]) / 255)  # by four eyes
    distances = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1) + 1e3 * np.eye(80)
    assert distances.min() > 5 and distances[:, :12, :12].min() > 15


def test_a_file_an_image_and_an_array_give_the_same(trained, images):
    found = load_detector(str(trained[0]), "cpu")
    for name in ("a.jpg", "alpha.png", "gray.png"):  # a.jpg lies on its side
        path = images / name
        whole = found.predict(path)
        with Image.open(path) as image:
            assert found.predict(image).results == found.predict(str(path)).results == whole.results
        assert found.predict(whole.image).results == found.detect([whole.image])[0] == whole.results
        height, width = whole.image.shape[:2]
        assert (height, width) == ((90, 60) if name == "a.jpg" else (60, 90)) and len(whole.results) > 10
        assert whole.boxes.shape == (len(whole.results), 4) and whole.masks.dtype == bool
        assert whole.masks.shape == (len(whole.results), height, width)
        assert whole.labels == [CATEGORIES[p["category_id"]] for p in whole.results]
        assert (np.diff(whole.scores) <= 0).all() and (whole.boxes[:, 2:] > whole.boxes[:, :2]).all()
        few = found.predict(path, min_score=float(whole.scores[5]))
        assert few.results == [p for p in whole.results if p["score"] >= whole.scores[5]]
    none = found.predict(images / "a.png", min_score=1.1)
    assert none.boxes.shape == (0, 4) and none.masks.shape == (0, 60, 90) and none.labels == []
    with pytest.raises(UserError, match="cut.jpg cannot be read"):
        found.predict(images / "cut.jpg")


@pytest.mark.parametrize(
    "width, height, side, overlap, expected",
    [
        (100, 80, 128, 0.2, [(0, 0, 100, 80)]),
        (100, 40, 60, 0.5, [(0, 0, 60, 40), (30, 0, 90, 40), (40, 0, 100, 40)]),
        (50, 50, 25, 0.0, [(0, 0, 25, 25), (25, 0, 50, 25), (0, 25, 25, 50), (25, 25, 50, 50)]),
    ],
)
def test_tiles_cover_an_image(width, height, side, overlap, expected):
    assert tiles(width, height, side, overlap) == expected
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in tiles(width, height, side, overlap):
        covered[y0:y1, x0:x1] = True
    assert covered.all()


def squares(images):
    """A detector of white squares, blind to those below a 25th of the image that it is given; whole ones score best."""
    found = []
    for image in images:
        labels, n = cv2.connectedComponents((image[..., 0] > 128).astype(np.uint8))[1], 0
        results = []
        for k in range(1, labels.max() + 1):
            mask = labels == k
            ys, xs = np.where(mask)
            box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
            if max(box[2:]) >= 4 / 100 * max(image.shape[:2]):
                score = min(box[2:]) / max(box[2:]) - 0.001 * n
                results.append(
                    {"category_id": 1, "bbox": box, "score": score, "segmentation": encode_mask(mask)}
                )
                n += 1
        found.append(results)
    return found


def test_small_objects_are_found_in_tiles_and_large_ones_whole():
    """A small square is found in tiles alone, each once; one that crosses tiles is found whole, not in pieces."""
    image = np.zeros((400, 600, 3), np.uint8)
    boxes = [(10, 10, 12, 12), (355, 30, 14, 14), (560, 370, 10, 10), (100, 100, 220, 220)]
    for x, y, w, h in boxes:
        image[y : y + h, x : x + w] = 255
    assert [p["bbox"] for p in squares([image])[0]] == [list(boxes[3])]
    found = detect_in_tiles(squares, image, 150, 0.2, nms=0.5)
    assert sorted(p["bbox"] for p in found) == sorted(map(list, boxes))
    assert [p["score"] for p in found] == sorted((p["score"] for p in found), reverse=True)
    union = np.zeros((400, 600), bool)
    for p in found:
        x, y, w, h = p["bbox"]
        mask = coco_api().mask.decode(p["segmentation"]).astype(bool)
        assert mask.sum() == w * h and mask[y : y + h, x : x + w].all()
        union |= mask
    assert (union == (image[..., 0] > 0)).all()
    assert detect_in_tiles(squares, image, 1000, 0.2, 0.5) == squares([image])[0]


def test_merging_keeps_classes_apart_and_whole_boxes_before_cut_ones():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 4, 10], [20, 0, 24, 10]], float)
    scores, kinds = np.array([0.8, 0.9, 0.5, 0.99, 0.7]), np.array([1, 1, 2, 1, 1])
    cut = np.array([False, False, False, True, True])
    assert merged(boxes, scores, kinds, cut, 0.5) == [1, 2, 4]  # 3 lies in 1, though its score is higher
    assert merged(boxes[:0], scores[:0], kinds[:0], cut[:0], 0.5) == []


def test_tiles_of_the_command_are_the_functions(trained, images, tmp_path):
    output = tmp_path / "out"
    predict(trained, "--images", images / "a.png", "--output", output, "--tile", 40, "--min-score", 0.01)
    detector = load_detector(trained[0], "cpu")
    found = detector.predict(images / "a.png", 0.01, tile_px=40)
    lines = json.loads((output / "predictions.jsonl").read_text())
    assert [o["score"] for o in lines["objects"]] == list(found.scores) and len(found.results) > 10
    assert found.masks.shape[1:] == (60, 90)
    for words, message in [(["--tile", -1], "--tile: -1"), (["--overlap", 1], "--overlap: 1.0 is not")]:
        with pytest.raises(UserError, match=message):
            predict(trained, "--images", images, "--output", output, *words)


def write_video(path, n=7):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for k in range(n):
        frame = np.full((64, 96, 3), 40, np.uint8)
        cv2.circle(frame, (10 + 10 * k, 30), 9, (0, 0, 250), -1)
        writer.write(frame)
    writer.release()


def test_frames_of_a_video_are_images(trained, images, tmp_path, capsys):
    write_video(images / "clip.mp4")
    (images / "broken.avi").write_bytes(b"no video")
    output = tmp_path / "out"
    predict(trained, "--images", images, "--output", output, "--every", 3, "--min-score", 0.01)
    said = capsys.readouterr()
    assert "objects in 8 images, 3 skipped" in said.out
    assert "broken.avi cannot be read as a video; other containers: ffmpeg" in said.err
    content = json.loads((output / "predictions.json").read_text())
    sizes = {i["file_name"]: (i["width"], i["height"]) for i in content["images"] if "clip" in i["file_name"]}
    assert sizes == dict.fromkeys(["clip.mp4#0", "clip.mp4#3", "clip.mp4#6"], (96, 64))
    drawn = cv2.VideoCapture(str(output / "pictures" / "clip.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (
        3,
        pytest.approx(10 / 3, 0.01),
    )
    assert drawn.read()[1].std() > 10
