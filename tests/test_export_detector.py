"""A detector as one ONNX file: it finds what the detector finds on photographs, and needs none of our code."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from backbone_fixture import ROTARY
from coco_fixture import CATEGORIES, write_coco
from PIL import Image
from test_torchvision_engine import SMALL, TINY, boxes, detector
from tool_fixture import load_tool
from torch import nn
from torchvision.ops import batched_nms
from torchvision.ops import boxes as torchvision_boxes

import pretrain.export.fixed_size
from det_plugin.augment import evaluation_geometry
from det_plugin.coco.annotations import read_split
from det_plugin.loader import to_tensor
from det_plugin.predict import load_detector
from det_plugin.protocol import with_overrides
from det_plugin.run import DetectionRun
from det_plugin.torchvision_engine import export
from det_plugin.torchvision_engine.folder import CONFIG, resolved_config, save_checkpoint
from pretrain.errors import UserError
from pretrain.export.programs import OPSET
from pretrain.files import write_json

for name in ("onnx", "onnxscript", "skimage"):
    pytest.importorskip(name)
onnxruntime = pytest.importorskip("onnxruntime", reason="not installed (pip install 'posfield[export]')")

FLAGS = dict(depth=1, drop_path=0.0, pos_encoding="field", pos_grid=6, n_registers=2, layerscale=0.5)
RECIPES = {
    "masks": SMALL,
    "boxes": with_overrides(
        SMALL,
        # what the graph could get wrong: windows that do not divide the grid, relative positions, a frame that
        # the size does not fill, many classes, a level less
        dict(masks="off", window_size=3, global_blocks=1, image_size_px=100, keep_special_tokens=False,
             pyramid_scales=(2.0, 1.0, 0.5), anchor_sizes_px=(16, 32, 64, 128), norm="", score_threshold=0.2),
    ),
    "rotary": with_overrides(SMALL, dict(window_size=3, global_blocks=1)),
}  # fmt: skip
MORE_FLAGS = {
    "masks": {},
    "boxes": dict(depth=2, pos_encoding="none", pos_grid=None, relative_positions=True),
    "rotary": dict(**ROTARY, pos_grid=None),
}


@pytest.fixture(scope="module")
def tool():
    return load_tool("export")


def leave_run(folder, data, kind):
    """The folder of a run; the weights are random, of ordinary size everywhere."""
    flags = {**FLAGS, **MORE_FLAGS[kind]}
    recipe, model = RECIPES[kind], detector(RECIPES[kind], **flags)
    run = DetectionRun(TINY, None, data, folder, recipe, device="cpu", model_kwargs=flags)
    split = read_split(data, "train", num_classes=3, training=True)
    folder.mkdir()
    write_json(folder / CONFIG, resolved_config(run, model.backbone.vit, split))
    save_checkpoint(folder, {"iteration": 1, "model": model.state_dict()})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run's folder of each recipe."""
    root = tmp_path_factory.mktemp("runs")
    data = write_coco(root / "coco")
    return {kind: leave_run(root / kind, data, kind) for kind in RECIPES}


@pytest.fixture(scope="module", params=RECIPES)
def exported(request, runs, tool, tmp_path_factory):
    """A run, the file that the tool made of it, and the code that the tool printed."""
    path, printed = tmp_path_factory.mktemp("out") / "new" / "detector.onnx", io.StringIO()
    with contextlib.redirect_stdout(printed):
        tool.main(["--weights", str(runs[request.param]), "--detector", "--output", str(path)])
    summary, code = printed.getvalue().split("\n\n", 1)
    assert "of 300 detections as the detector's on images of three sizes" in summary
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return runs[request.param], path, code


def photograph(kind):
    """uint8 RGB [H, W, 3]."""
    import skimage.data

    upright = np.ascontiguousarray(skimage.data.rocket()[:, 200:400])  # Pillow shrinks its rows first
    return {
        "landscape": skimage.data.chelsea(),
        "portrait": upright,
        "small": skimage.data.coffee()[:40, :37],
    }[kind]


@pytest.mark.parametrize("kind", ["landscape", "portrait", "small"])
def test_it_finds_what_the_detector_finds(exported, kind, tmp_path, monkeypatch):
    """By the code that the tool prints, but for the score from which objects are kept."""
    run, _, code = exported
    photo = photograph(kind)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    code = code.replace("photo.jpg", str(tmp_path / "photo.png")).replace(">= 0.5\nboxes", ">= 0\nboxes")
    found: dict = {}
    exec(code, found)
    expected = load_detector(run, device="cpu").predict(photo)
    assert len(expected.results) == len(found["scores"]) > 20
    wanted = np.array([p["category_id"] for p in expected.results])
    apart = abs(found["boxes"][None] - expected.boxes[:, None]).max(-1)
    same = np.where(found["labels"] == wanted[:, None], apart, np.inf).argmin(1)
    assert sorted(same) == list(range(len(same)))  # each has its own
    assert found["boxes"].dtype == found["scores"].dtype == np.float32 and found["labels"].dtype == np.int64
    np.testing.assert_allclose(found["boxes"][same], expected.boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found["scores"][same], expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["labels"][same], wanted)
    assert [found["names"][i] for i in same] == expected.labels
    assert list(found["scores"]) == sorted(found["scores"], reverse=True)
    if expected.masks is None:
        assert not found["masks"] and not found["pasted"]
    else:
        pasted = np.stack(found["pasted"])[same]
        assert 0 < pasted.mean() < 1 and (pasted != expected.masks).sum() <= 1e-6 * pasted.size


def test_an_image_in_which_nothing_is_found(exported):
    run, path, _ = exported
    found = export.open_onnx(path, min_score=0.99).run(
        None, {"image": photograph("small").transpose(2, 0, 1)[None]}
    )
    assert [f.shape for f in found] == [(0, 4), (0,), (0,), (0, 28, 28)][: len(found)]
    assert len(found) == 3 + load_detector(run, device="cpu").protocol.has_masks


def test_a_file_says_what_it_is(exported):
    run, path, _ = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", [1, 3, "height", "width"])
    shapes = {
        "boxes": ["objects", 4],
        "scores": ["objects"],
        "labels": ["objects"],
        "masks": ["objects", 28, 28],
    }
    recipe = load_detector(run, device="cpu").protocol
    names = [*shapes][: 3 + recipe.has_masks]
    assert {out.name: out.shape for out in session.get_outputs()} == {name: shapes[name] for name in names}
    told = json.loads(session.get_modelmeta().custom_metadata_map["posfield"])
    assert told["classes"] == {str(label): name for label, name in CATEGORIES.items()}
    assert told["score_threshold"] == recipe.score_threshold and told["image_size_px"] == recipe.image_size_px
    assert told["detector"] == ("Mask R-CNN" if recipe.has_masks else "Faster R-CNN")
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"posfield", "torchvision", "onnxruntime", "pillow"} <= told["versions"].keys()
    assert told["backbone"]["relative_positions"] == (not recipe.has_masks)
    assert "def paste(mask, box, height, width):" in told["usage"]


def test_a_file_that_differs_is_not_left_behind(exported, runs, tool, tmp_path, monkeypatch):
    """The file of another network, whose pyramid has one other level: 13 of 300 detections differ."""
    run, path, _ = exported
    shutil.copytree(run, tmp_path / "run")
    kind = next(kind for kind, folder in runs.items() if folder == run)
    model = detector(RECIPES[kind], **{**FLAGS, **MORE_FLAGS[kind]})
    model.backbone.pyramid.simfp_4[-1].weight.data *= -1
    save_checkpoint(tmp_path / "run", {"iteration": 2, "model": model.state_dict()})
    monkeypatch.setattr(export, "write_onnx", lambda network, to, about: shutil.copy(path, to))
    with pytest.raises(
        RuntimeError, match=r"a\.onnx: the file finds \d+ of \d+ of the detector's detections"
    ):
        tool.main(
            ["--weights", str(tmp_path / "run"), "--detector", "--output", str(tmp_path / "out" / "a.onnx")]
        )
    assert list((tmp_path / "out").iterdir()) == []


def program(module, tmp_path, example, shapes):
    """A module as onnxruntime runs it."""
    with torch.no_grad():
        traced = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        table = {torch.ops.posfield.nms_of_each.default: export._onnx_nms_of_each}
        written = torch.onnx.export(
            traced, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False
        )
    written.save(tmp_path / "module.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "module.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *given: session.run(None, dict(zip(names, given)))[0]


class Resize(nn.Module):
    def forward(self, image):
        resized = export.resized_sides(image.shape[1:], 96)
        return export.resize(image.double(), resized, 96).to(torch.uint8)


def test_resizing_is_pillows(tmp_path):
    """To the bit, at any size: in one pass, in two of either order, to a smaller and a larger size."""
    dims = {1: torch.export.Dim("height", min=2, max=export.LARGEST_PX), 2: torch.export.Dim("width", min=2)}
    run = program(Resize(), tmp_path, (torch.zeros(3, 60, 80, dtype=torch.uint8),), {"image": dims})
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 500), (500, 1), (96, 96), (96, 40), (300, 200), (200, 300), (2000, 1500), (67, 3)]
    orders = set()
    for height, width in [*sizes, *rng.integers(2, 400, (40, 2)).tolist()]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        geometry = evaluation_geometry((width, height), 96)
        (new_width, new_height), expected = geometry.resized, geometry.pixels(image)
        assert export.resized_sides((height, width), 96).tolist() == [new_height, new_width]
        found = run(to_tensor(image).numpy())
        np.testing.assert_array_equal(found[:, :new_height, :new_width].transpose(1, 2, 0), expected)
        orders.add(height - new_height > 2 * max(width - new_width, 0))
    assert orders == {True, False}


class Suppress(nn.Module):
    def __init__(self):
        super().__init__()
        self.batched_nms = export.traceable_nms(80)

    def forward(self, boxes, scores, classes):
        return self.batched_nms(boxes, scores, classes, 0.5)


def test_nms_rounds_as_torchvisions(tmp_path):
    """Up to 1,000 boxes are shifted by class, and so rounded to 1/128 px; more are not. On a grid of IoUs around
    the threshold both give another selection."""
    n = torch.export.Dim("n", min=2, max=10**6)
    example = boxes(40), torch.rand(40), torch.zeros(40, dtype=torch.int64)
    run = program(Suppress(), tmp_path, example, {name: {0: n} for name in ("boxes", "scores", "classes")})
    generator = torch.Generator().manual_seed(0)
    differ = set()
    for number in (2, 999, 1000, 1001, 3000):
        pair = torch.arange(number) // 2
        corner = torch.rand(number, 2, generator=generator)[pair * 2 % number] * 800
        extent = torch.tensor([60.0, 40.0]).expand(number, 2).clone()
        extent[1::2, 0] = 30 + (torch.rand(number // 2, generator=generator) - 0.5) * 0.02  # IoU about 1/2
        given = torch.cat([corner, corner + extent], 1), torch.rand(number, generator=generator), pair % 80
        expected = batched_nms(*given, 0.5)
        assert torch.equal(Suppress()(*given), expected)
        np.testing.assert_array_equal(run(*(x.numpy() for x in given)), expected.numpy())
        plain = torchvision_boxes._batched_nms_vanilla(*given, 0.5)
        shifted = torchvision_boxes._batched_nms_coordinate_trick(*given, 0.5)
        differ.add((number > 1000, not torch.equal(plain, shifted)))
    assert {(False, True), (True, True)} <= differ


def test_what_cannot_be_exported_is_refused(runs, tool, tmp_path, monkeypatch):
    def refused(message, run=runs["masks"], output="a.onnx", *words):
        with pytest.raises(UserError, match=message):
            tool.main(["--weights", str(run), "--detector", "--output", str(tmp_path / output), *words])

    refused(r"ends in \.onnx, .*a\.pt2 does not", output="a.pt2")
    refused(r"is no folder of a detection run: it holds neither config\.json nor", run=tmp_path)
    refused(r"is no folder of a detection run", run=runs["masks"] / CONFIG)
    refused(
        "--format: a detector is written as onnx, not as timm", runs["masks"], "a.onnx", "--format", "timm"
    )
    refused("--size: has no effect on a detector", runs["masks"], "a.onnx", "--size", "64")
    refused("--patch-size: has no effect on a detector", runs["masks"], "a.onnx", "--patch-size", "8")
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2" / "config_resolved.yaml").write_text("{}")
    refused(
        r"d2 is a run of Detectron2's .*export_model\.py .*train with --engine torchvision",
        run=tmp_path / "d2",
    )
    monkeypatch.setattr(pretrain.export.fixed_size.importlib.util, "find_spec", lambda name: None)
    refused(r"format onnx needs onnx, onnxscript, onnxruntime: pip install 'posfield\[export\]'")
    assert [path.name for path in tmp_path.iterdir()] == ["d2"]
