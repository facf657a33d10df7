"""One file flows: the same ``backbone.safetensors`` in every consumer gives the same features for the same
pixels."""

import importlib.util
from pathlib import Path

import pytest
import torch
from test_rotary import DINOV3, as_transformers, sharp

from det_plugin.features import detection_features
from det_plugin.protocol import protocol
from det_plugin.torchvision_engine.model import build_model
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import save_backbone

ROOT = Path(__file__).parents[1]
NAME = "vit_tiny_patch16"
needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)


@pytest.fixture(params=["field", "standard", "rotary"])
def file(request, tmp_path):
    """A backbone with everything that a consumer could lose: registers, LayerScale, final norm, positions."""
    own = dict(swiglu=True, qkv_bias="no_key", ln_eps=1e-5) if request.param == "rotary" else {}
    how = dict(depth=2, n_registers=3, layerscale=0.5, pos_encoding=request.param, mask_tokens=True)
    model = build_backbone(NAME, **how, **own)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save_backbone(
        tmp_path / "backbone.safetensors", model.state_dict(), name=NAME, model_kwargs=model.model_kwargs
    )


@pytest.fixture
def x():
    return torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(1))


def expected(file, x):
    with torch.no_grad():
        return build_backbone(NAME, weights=file).eval().feature_map(x)


def detectron2_backbone(weights):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate

    from det_plugin.detectron2_engine.lazy import config

    cfg = config(protocol("coco-12ep", NAME), NAME, weights, device="cpu")
    model = instantiate(cfg.model)
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    return model.backbone.net


def mmseg_backbone(weights, name=NAME):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    import seg_plugin  # noqa: F401  (registers the backbone)
    from seg_plugin.config import segmenter_config

    cfg = Config(segmenter_config("ade20k-160k", name, weights=weights))
    init_default_scope("mmseg")
    from mmseg.registry import MODELS

    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.backbone


def segmenter_backbone(file, name):
    model = mmseg_backbone(file, name).eval()
    return lambda x: model(x)[0]


def detector_vit(file, name):
    backbone = build_model(build_backbone(name, file), protocol("coco-12ep", name)).eval().backbone
    return lambda x: detection_features(backbone.vit, x, backbone.options)


def stock_detectors_backbone(file):
    """Of the config that the stock launcher is given."""
    if importlib.util.find_spec("detectron2") is None:
        return build_backbone(weights=file).eval().feature_map
    from detectron2.config import LazyConfig, instantiate

    cfg = LazyConfig.load(str(ROOT / "configs" / "det" / "mask_rcnn_vits16_coco_12ep.py"))
    cfg.model.backbone.net.weights = str(file)
    net = instantiate(cfg.model.backbone.net).eval()
    return lambda x: net(x)["last_feat"]


def test_torchvision_engine(file, x):
    detector = build_model(build_backbone(NAME, file, drop_path=0.1), protocol("coco-12ep", NAME)).eval()
    seen = []
    detector.backbone.pyramid.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        detector.backbone(x)
    torch.testing.assert_close(seen[0], expected(file, x), atol=1e-5, rtol=1e-5)


@needs_detectron2
def test_detectron2(file, x):
    with torch.no_grad():
        got = detectron2_backbone(file).eval()(x)["last_feat"]
    torch.testing.assert_close(got, expected(file, x), atol=1e-5, rtol=1e-5)


def test_mmseg(file, x):
    with torch.no_grad():
        (got,) = mmseg_backbone(file).eval()(x)
    torch.testing.assert_close(got, expected(file, x), atol=1e-5, rtol=1e-5)


def test_each_consumer_at_1024_px_equals_transformers(tmp_path):
    """DINOv3's network where the protocols use it: positions span the padded square of 4,096 patches."""
    name = "vit_small_patch16"
    torch.manual_seed(0)
    vit = sharp(build_backbone(name, depth=2, **DINOV3, mask_tokens=True))
    file = save_backbone(
        tmp_path / "dinov3.safetensors", vit.state_dict(), name=name, model_kwargs=vit.model_kwargs
    )
    x = torch.randn(1, 3, 1024, 1024)
    own = segmenter_backbone(file, name), detector_vit(file, name), stock_detectors_backbone(file)
    with torch.no_grad():
        theirs = as_transformers(vit)(x).last_hidden_state[:, 5:].transpose(1, 2).unflatten(2, (64, 64))
        for features in own:
            torch.testing.assert_close(features(x), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edit, named", [("missing", "blocks.1.ls2.gamma"), ("left over", "surprise")])
@pytest.mark.parametrize(
    "consumer", ["torchvision", pytest.param("detectron2", marks=needs_detectron2), "mmseg"]
)
def test_a_tensor_too_few_or_too_many_is_named(file, consumer, edit, named):
    model = build_backbone(NAME, weights=file)
    state = dict(model.state_dict())
    if edit == "missing":
        del state[named]
    else:
        state[named] = torch.zeros(1)
    save_backbone(file, state, name=NAME, model_kwargs=model.model_kwargs)
    build = {
        "torchvision": lambda: build_backbone(NAME, file),
        "detectron2": lambda: detectron2_backbone(file),
        "mmseg": lambda: mmseg_backbone(file),
    }[consumer]
    with pytest.raises(UserError, match=f"{edit} {named}"):
        build()
