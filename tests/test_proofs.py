"""What is too slow for ``make test``: ``make proofs`` runs these, minutes each on two cores."""

import importlib.util
import json
import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from det_plugin.protocol import protocol
from det_plugin.torchvision_engine.model import build_model
from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.data.toy_sets import write_toy_data
from pretrain.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["toy", "toy_dinov2"])
def test_the_demos_pretraining_learns(tmp_path, recipe):
    """Patch terms and KoLeo of the last 30 iterations are clearly below those of the first 10; [CLS] does not collapse.

    The image term starts low, since all images look alike to a random network, rises, and would end at ln K if the teacher's
    distributions became uniform.
    """
    write_toy_data(tmp_path / "toy", n_images=400, n_train=0, n_val=0, size_px=128)
    overrides = [f"data.root={tmp_path / 'toy' / 'images'}", f"run.output={tmp_path / 'run'}", "log.period_it=1"]
    folder = train(load_config(f"configs/pretrain/{recipe}.yaml", overrides))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = [t for t in ("image", "content", "position", "koleo") if t in lines[0]]
    assert terms == (["image", "content", "position", "koleo"] if recipe == "toy" else ["image", "content", "koleo"])
    image = fmean(x["image"] for x in lines[-30:])
    assert image < math.log(256) - 0.3, f"image: {image:.3f}, uniform would be {math.log(256):.3f}"
    for term in terms[1:]:
        first, last = fmean(x[term] for x in lines[:10]), fmean(x[term] for x in lines[-30:])
        assert last < first - 0.1, f"{term}: {first:.3f} -> {last:.3f}"


def targets_of(n=3, size=1024):
    """A few rectangles as boxes and masks."""
    boxes = torch.tensor([[100.0, 120, 300, 400], [500, 500, 700, 560], [20, 800, 90, 1000]])[:n]
    masks = torch.zeros(n, size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = 1
    return boxes, torch.tensor([1, 5, 80])[:n], masks


def test_the_full_detection_protocol_steps_at_1024_px():
    """ViT-S/16, every number of coco-12ep but the batch, one step of the torchvision engine: losses and gradients are finite."""
    vit = build_backbone("vit_small_patch16", pos_encoding="field", layerscale=1e-5, drop_path=0.1)
    model = build_model(vit, protocol("coco-12ep", "vit_small_patch16")).train()
    boxes, labels, masks = targets_of()
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1024, 900), dtype=np.uint8))
    losses = model([image], [{"boxes": boxes, "labels": labels, "masks": masks[:, :, :900]}])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert vit.pos_field.grad.abs().sum() > 0


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed")
def test_the_full_detection_protocol_steps_in_detectron2():
    """The same step by Detectron2's own model, built from the lazy config."""
    from detectron2.config import instantiate
    from detectron2.structures import BitMasks, Boxes, Instances

    from det_plugin.lazy import config

    recipe = replace(protocol("coco-12ep", "vit_small_patch16"), amp=False)
    model = instantiate(config(recipe, "vit_small_patch16", backbone_flags=dict(pos_encoding="field"), device="cpu").model)
    from detectron2.utils.events import EventStorage

    boxes, labels, masks = targets_of()
    objects = Instances((1024, 900), gt_boxes=Boxes(boxes), gt_classes=labels - 1, gt_masks=BitMasks(masks[:, :, :900].bool()))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1024, 900), dtype=np.uint8))
    with EventStorage():
        losses = model.train()([{"image": image, "instances": objects, "height": 1024, "width": 900}])
    sum(losses.values()).backward()
    assert len(losses) == 5 and all(torch.isfinite(loss) for loss in losses.values())
    assert model.backbone.net.vit.pos_field.grad.abs().sum() > 0
