"""Images of a segmentation run: its data beside the ground truth, and a folder of one's own images."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tool_fixture import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from ade_fixture import write_ade
from seg_fixture import tiny, tiny_run

from pretrain.errors import UserError
from seg_plugin.figures import colored, draw_page, palette_of, save_labels
from seg_plugin.predict import (
    Segmented,
    dataset_of_run,
    load_segmenter,
    segment_dataset,
    segment_folder,
    spread,
)
from seg_plugin.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seg")
    run = tiny_run(
        write_ade(folder / "ade", n_val=5), folder / "run", protocol=tiny(max_iters=1, val_every=1)
    )
    train(run)
    return run


@pytest.fixture
def tool():
    return load_tool("analyze segmentations").main


def test_pages_of_the_validation_images_and_their_label_maps(run, tool, tmp_path):
    tool(["--run", str(run.output), "--device", "cpu", "--overlay", "--labels", "--output", str(tmp_path)])
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert captions.keys() == {"validation_001.png", "validation_002.png"}  # five images, four a page
    assert captions["validation_002.png"]["caption"] == "0004; light gray: not labeled."
    assert all(Image.open(tmp_path / name).width > 800 for name in captions)
    labels = sorted((tmp_path / "labels").iterdir())
    assert [path.stem for path in labels] == [f"{k:04d}" for k in range(5)]
    first = np.array(Image.open(labels[0]))  # a palette image: its indices
    assert first.shape == (40, 56) and 1 <= first.min() and first.max() <= 4  # as the masks: 0 is no class


def test_own_images_get_the_labels_that_validation_gives(run, tool, tmp_path):
    """Also gray ones, in folders; without ground truth the page has two columns."""
    segmenter = load_segmenter(run.output, "cpu")
    images = run.data / "images" / "validation"
    (tmp_path / "own" / "inner").mkdir(parents=True)
    (tmp_path / "own" / "inner" / "a.jpg").write_bytes((images / "0000.jpg").read_bytes())
    Image.open(images / "0001.jpg").convert("L").save(tmp_path / "own" / "gray.png")
    (validated,) = segment_dataset(segmenter.model, dataset_of_run(segmenter.model, "validation"), [0])
    gray, copied = segment_folder(segmenter, tmp_path / "own")
    assert (
        np.array_equal(copied.predicted, validated.predicted)
        and copied.truth is None
        and gray.predicted.shape == (56, 40)
    )
    tool(
        [
            "--run",
            str(run.output),
            "--device",
            "cpu",
            "--images",
            str(tmp_path / "own"),
            "--labels",
            "--output",
            str(tmp_path),
        ]
    )
    assert (tmp_path / "labels" / "inner" / "a.png").is_file() and (
        tmp_path / "predictions_001.png"
    ).is_file()
    assert np.array_equal(
        np.array(Image.open(tmp_path / "labels" / "inner" / "a.png")), validated.predicted + 1
    )


def test_what_cannot_be_drawn_is_named(run, tool, tmp_path):
    with pytest.raises(UserError, match="holds no segmentation run: there is no checkpoint iter_N.pth$"):
        tool(["--run", str(tmp_path)])
    (tmp_path / "iter_1.pth").write_bytes((run.output / "iter_1.pth").read_bytes())
    with pytest.raises(UserError, match="must hold one config, .*found: none$"):
        tool(["--run", str(tmp_path)])
    (tmp_path / "points").mkdir()
    with pytest.raises(UserError, match="is a sweep; give one of its runs, .*points/lr_LR_wd_WD/seed_N$"):
        tool(["--run", str(tmp_path)])
    with pytest.raises(UserError, match="split: 'test' is none of training, validation"):
        tool(["--run", str(run.output), "--split", "test", "--device", "cpu"])
    with pytest.raises(UserError, match="images: no .jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff in"):
        tool(["--run", str(run.output), "--images", str(tmp_path), "--device", "cpu"])
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="bad.jpg cannot be read"):
        tool(["--run", str(run.output), "--images", str(tmp_path), "--device", "cpu"])


def test_a_label_that_is_no_class_is_not_in_the_legend(tmp_path):
    """Whichever number ``ignore_index`` gives it."""
    labels = np.array([[0, 1], [200, 255]])
    row = Segmented(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), labels)
    draw_page(tmp_path / "page.png", [row], {"classes": ("a", "b")}, title="t", caption="c")
    assert Image.open(tmp_path / "page.png").width > 500


def test_colors(tmp_path):
    palette = palette_of({"classes": ("a", "b")})
    labels = np.array([[0, 1, 255]])
    assert colored(labels, palette).tolist() == [[palette[0].tolist(), palette[1].tolist(), [225, 225, 225]]]
    save_labels(tmp_path / "x.png", labels[:, :2], palette, (1, 2))
    saved = Image.open(tmp_path / "x.png")
    assert np.array(saved).tolist() == [[1, 2]]
    assert np.array(saved.convert("RGB"))[0].tolist() == palette.tolist()
    assert spread(3, 9) == [0, 4, 8] and spread(5, 2) == [0, 1]


def test_a_runs_config_is_read_as_data(run, tmp_path):
    """Also with other numbers; what would call a function or read a file is refused before it does."""
    shutil.copytree(run.output, tmp_path / "run")
    file, touched = tmp_path / "run" / "config.py", tmp_path / "touched"
    ours = file.read_text()
    file.write_text(ours.replace("dropout_ratio=0.0", "dropout_ratio=0.25"))
    assert load_segmenter(tmp_path / "run", "cpu").model.decode_head.dropout.p == 0.25
    loss, code = "type='CrossEntropyLoss'", f"open({str(touched)!r}, 'w').close()"
    for text, told in {
        f"{ours}\n{code}\n": "more than names with values",
        f"{ours}\nx = {code}\n": "calls a function",
        ours.replace("type='FCNHead'", "type='os.system'"): "model.decode_head.type holds 'os.system'",
        ours.replace(loss, f"{loss}, class_weight='w.pkl'"): "loss_decode.class_weight holds 'class_weight'",
        ours.replace("type='Resize'", "type='pickle.load'"): "type holds 'pickle.load'",
        "model = dict(": "is no plain data",
        "": "is no plain data",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_segmenter(tmp_path / "run", "cpu")
        assert told in str(error.value) and "--trust" in str(error.value) and "\n" not in str(error.value)
    assert not touched.exists()
    file.write_text(f"{ours}\n{code}\n")
    load_segmenter(tmp_path / "run", "cpu", trust=True)
    assert touched.exists()


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_runs_checkpoint_is_tensors_and_plain_values(run, tmp_path, capsys):
    shutil.copytree(run.output, tmp_path / "run")
    torch.save({"meta": Code()}, tmp_path / "run" / "iter_9.pth")
    for trust in (False, True):
        with pytest.raises(UserError, match=r"iter_9\.pth is none of a segmentation run"):
            load_segmenter(tmp_path / "run", "cpu", trust)
    assert "code ran" not in capsys.readouterr().out


def test_predict_leaves_label_maps_and_lines_of_images_and_frames(run, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "found"
    photos.mkdir()
    image = run.data / "images" / "validation" / "0000.jpg"
    (photos / "a.jpg").write_bytes(image.read_bytes())
    writer = cv2.VideoWriter(str(photos / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in (0, 100, 200):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    words = ["--run", run.output, "--images", photos, "--output", output, "--every", 2, "--device", "cpu"]
    load_tool("predict").main(list(map(str, words)))
    assert "label maps of 3 images: " in capsys.readouterr().out
    labels = load_segmenter(run.output, "cpu").predict(image).labels
    assert np.array_equal(np.array(Image.open(output / "labels" / "a.png")), labels + 1)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["a.jpg", "clip.avi#0", "clip.avi#2"]
    assert [line["label_map"] for line in lines] == [
        "labels/a.png",
        "labels/clip/000000.png",
        "labels/clip/000002.png",
    ]
    assert [sum(line["pixels"].values()) for line in lines] == [labels.size, 64 * 48, 64 * 48]
    assert all((output / line["label_map"]).is_file() for line in lines)
    assert (output / "pictures" / "clip.avi.mp4").is_file()
    with pytest.raises(UserError, match="--tile: a segmenter looks at whole images"):
        load_tool("predict").main([*map(str, words), "--tile", "64"])
