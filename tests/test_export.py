"""Exported files do what the backbone does: read again by torch or onnxruntime alone, at any batch."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from backbone_fixture import sharp
from tool_fixture import load_tool

import pretrain.export.fixed_size
from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import FORMATS, FixedSizeViT, export
from pretrain.weights import save_backbone

TINY = "vit_tiny_patch16"
WITH_ALL = dict(pos_encoding="field", n_registers=4, layerscale=0.3)
ABSENT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
    bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (pip install 'posfield[export]')"
)
PROGRAMS = [pytest.param(name, marks=needs_onnx if name == "onnx" else ()) for name in ("torch", "onnx")]


def backbone(**model_kwargs) -> ViT:
    return sharp(build_backbone(TINY, depth=2, **model_kwargs))


def read(path: Path):
    """image -> outputs, by the format's own reader."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, map(torch.from_numpy, session.run(names, {"image": image.numpy()}))))


@pytest.mark.parametrize("format", PROGRAMS)
@pytest.mark.parametrize(
    "model_kwargs, size",
    [
        (WITH_ALL, (64, 96)),
        (dict(layerscale=None), (224, 224)),
        (dict(pos_interpolation="bicubic_antialias"), (70, 50)),
        (dict(pos_encoding="rotary", swiglu=True, qkv_bias="no_key", cls_norm=True), (70, 50)),
    ],
    ids=["field-registers-layerscale", "own-grid", "resampled-padded", "rotary-gated-untied-norms"],
)
def test_a_file_equals_the_backbone(tmp_path, format, model_kwargs, size):
    vit, path = backbone(**model_kwargs), tmp_path / "new" / f"backbone{FORMATS[format].suffix}"
    told = export(vit, format, size, path)
    run, generator = read(path), torch.Generator().manual_seed(1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # one file, and nothing beside it
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, *size, generator=generator)
        with torch.no_grad():
            outputs, expected = run(image), vit(image)
            maps = vit.feature_map(image)
        assert list(outputs) == ["feature_map", "cls", "registers"][: 3 if vit.n_registers else 2]
        wanted = dict(feature_map=maps, cls=expected.cls, registers=expected.registers)
        for name, output in outputs.items():
            largest = float(wanted[name].abs().max())
            torch.testing.assert_close(output, wanted[name], rtol=0, atol=1e-5 * largest)
    assert told < 1e-5


def test_nothing_is_resampled_inside():
    """A file at 64 x 96 px holds 24 positions, not the field."""
    module = FixedSizeViT(backbone(**WITH_ALL), (64, 96))
    assert dict(module.named_buffers()).keys() == {"prefix", "position"}
    assert module.position.shape == (1, 24, 192) and module.prefix.shape == (1, 5, 192)
    assert not {"pos_field", "cls_token", "reg_token"} & {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("format", PROGRAMS)
def test_a_file_says_how_to_feed_it(tmp_path, format):
    path = tmp_path / f"backbone{FORMATS[format].suffix}"
    export(backbone(), format, (32, 48), path)
    if format == "torch":
        extra = {"posfield.json": ""}
        torch.export.load(path, extra_files=extra)
        told = extra["posfield.json"]
    else:
        from onnxruntime import InferenceSession

        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        batch, *image = session.get_inputs()[0].shape
        assert isinstance(batch, str) and image == [3, 32, 48]  # a name: any number
        told = session.get_modelmeta().custom_metadata_map["posfield"]
    told = json.loads(told)
    assert told["image_size_px"] == [32, 48] and told["backbone"]["depth"] == 2
    assert told["pixel_mean"] == [0.485, 0.456, 0.406] and told["pixel_std"] == [0.229, 0.224, 0.225]


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    vit = backbone()
    for format, size, name, message in [
        ("tflite", (32, 32), "a.tflite", "format: 'tflite' is none of torch, onnx"),
        ("torch", (0, 32), "a.pt2", "size: 0 x 32"),
        ("onnx", (32, 32), "a.pt2", r"format onnx ends in \.onnx, .*a\.pt2"),
    ]:
        with pytest.raises(UserError, match=message):
            export(vit, format, size, tmp_path / name)
    monkeypatch.setattr(pretrain.export.fixed_size.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"format onnx needs onnx, onnxscript, onnxruntime: pip install 'posfield\[export\]'"
    ):
        export(vit, "onnx", (32, 32), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", PROGRAMS)
def test_large_features_are_rounded_more(tmp_path, format):
    """Public backbones have norm weights far from 1: rounding is a share of the output, and no error."""
    vit = backbone()
    vit.norm.weight.data *= 1e5
    assert export(vit, format, (32, 32), tmp_path / f"a{FORMATS[format].suffix}") < 1e-5


def test_a_file_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(FixedSizeViT, "forward", lambda self, image: {"feature_map": self.patch_embed(image)})
    with pytest.raises(RuntimeError, match=r"a\.pt2: outputs differ by .* of the backbone's"):
        export(backbone(), "torch", (32, 32), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tool():
    return load_tool("export")


def detection_run(train, folder, **changes):
    """Two iterations on toy data."""
    from coco_fixture import write_coco

    from det_plugin.protocol import protocol, with_overrides
    from det_plugin.run import DetectionRun

    small = dict(max_iters=2, milestones=(1,), warmup_iters=0, batch_size=1, eval_every=2, image_size_px=64, channels=16,
                 box_fc=32, box_convs=1, mask_convs=1, num_classes=3, roi_batch_per_image=16, rpn_pre_nms=(100, 50), amp=False,
                 rpn_post_nms=(50, 20), anchor_sizes_px=(8, 16, 32, 64, 128), detections_per_image=10, lr=0.1)  # fmt: skip
    recipe = with_overrides(protocol("coco-12ep", TINY), {**small, **changes})
    data = write_coco(folder.parent / "coco", n_train=2, n_val=2)
    model_kwargs = dict(depth=1, **WITH_ALL)
    train(DetectionRun(TINY, None, data, folder, recipe, device="cpu", workers=0, model_kwargs=model_kwargs))
    return folder


def is_in_checkpoint(vit, state, prefix):
    """Whether the state of a backbone is what a checkpoint holds under a prefix, name by name and bit by
    bit."""
    stored = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = vit.state_dict()
    return stored.keys() == own.keys() and all(torch.equal(value, stored[key]) for key, value in own.items())


def test_the_backbone_of_a_torchvision_run(tmp_path, tool):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (pip install 'posfield[det]')")
    from det_plugin.torchvision_engine.folder import load_checkpoint
    from det_plugin.torchvision_engine.train import train

    folder = detection_run(train, tmp_path / "run")
    vit = tool.backbone_of_run(folder)
    assert is_in_checkpoint(vit, load_checkpoint(folder)["model"], "backbone.vit.")
    tool.main(["--weights", str(folder), "--size", "64", "--output", str(tmp_path / "tuned.pt2")])
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        read(tmp_path / "tuned.pt2")(image)["cls"], vit.eval()(image).cls, rtol=0, atol=1e-5
    )
    card = tmp_path / "card.md"
    common = ["--weights", str(folder), "--output", str(tmp_path / "tuned.safetensors")]
    tool.main([*common, "--format", "safetensors", "--size", "64", "--card", str(card)])
    told = card.read_text()
    assert (
        "| Fine-tuned | detection, coco-12ep, scaled down (" in told
        and "Detection" not in told.split("## Results")[0]
    )
    assert "‡1" in told.split("## Results")[1]  # its own result, as every table marks it
    tool.main([*common, "--format", "posfield"])
    again = build_backbone(TINY, tmp_path / "tuned.safetensors").eval()
    assert torch.equal(again(image).patches, vit(image).patches)
    with pytest.raises(UserError, match="--source: .*run is a run's folder, which says all that itself"):
        tool.main([*common, "--source", "timm"])


def test_a_detector_without_the_final_norm_is_no_plain_vit(tmp_path, tool):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (pip install 'posfield[det]')")
    from det_plugin.torchvision_engine.train import train

    folder = detection_run(train, tmp_path / "run", final_norm=False)
    with pytest.raises(
        UserError, match=r"run ran its backbone with windows, or without the final norm or \[CLS\]"
    ):
        tool.backbone_of_run(folder)


def test_the_backbone_of_a_detectron2_run(tmp_path, tool):
    pytest.importorskip(
        "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
    )
    from det_plugin.detectron2_engine.train import train

    folder = detection_run(train, tmp_path / "run")
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    assert is_in_checkpoint(tool.backbone_of_run(folder), state, "backbone.net.vit.")


def test_a_folder_without_a_run_and_a_run_without_its_engine(tmp_path, tool, monkeypatch):
    with pytest.raises(
        UserError, match="is no folder of a fine-tuning run; of a pre-training, name the file in it"
    ):
        tool.backbone_of_run(tmp_path)
    (tmp_path / "config_resolved.yaml").write_text("{}")
    for name in [
        name for name in sys.modules if name.startswith(("detectron2", "det_plugin.detectron2_engine"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(UserError, match="Detectron2 is not installed"):
        tool.backbone_of_run(tmp_path)


def test_the_backbone_of_a_segmentation_run(tmp_path, tool):
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed (pip install 'posfield[seg]')")
    from ade_fixture import write_ade

    from seg_plugin.protocol import protocol, with_overrides
    from seg_plugin.run import SegmentationRun, train

    small = dict(max_iters=1, val_every=1, batch_size=1, resize_px=(56, 40), crop_px=32, slide_crop_px=32,
                 slide_stride_px=32, num_classes=4, lr=0.1)  # fmt: skip
    data, folder = write_ade(tmp_path / "ade", n_train=2, n_val=2), tmp_path / "run"
    recipe, model_kwargs = with_overrides(protocol(), small), dict(depth=1, **WITH_ALL)
    train(
        SegmentationRun(TINY, None, data, folder, recipe, device="cpu", workers=0, model_kwargs=model_kwargs)
    )
    state = torch.load(folder / "iter_1.pth", weights_only=False)["state_dict"]  # our own file, of this test
    assert is_in_checkpoint(tool.backbone_of_run(folder), state, "backbone.vit.")


def test_the_tool_exports_a_pretraining_file(tmp_path, tool, capsys):
    vit, file, out = backbone(**WITH_ALL), tmp_path / "backbone.safetensors", tmp_path / "backbone.pt2"
    save_backbone(file, vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs)
    tool.main(["--weights", str(file), "--size", "64", "48", "--output", str(out)])
    assert "64 x 48 px, largest relative difference from the backbone" in capsys.readouterr().out
    image = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(read(out)(image)["feature_map"], vit.feature_map(image), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="--size: one side, or height and width; not 1 2 3"):
        tool.main(["--weights", str(file), "--size", "1", "2", "3", "--output", str(out)])
