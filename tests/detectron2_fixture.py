"""What the files of Detectron2's tests start from."""

import json
from pathlib import Path

import torch
from backbone_fixture import randomize
from detectron2.config import LazyConfig

from det_plugin.detectron2_engine.saved_config import protocol_in
from det_plugin.protocol import with_overrides
from det_plugin.run import DetectionRun
from pretrain.build import build_backbone
from pretrain.weights import save_backbone

ROOT = Path(__file__).parents[1]
TOY = ROOT / "configs" / "det" / "toy.py"
TINY = "vit_tiny_patch16"
FIELD = dict(depth=2, pos_encoding="field", n_registers=2, layerscale=1e-2)


def save_pretrained(path):
    """A backbone as pre-training leaves it: field, registers, LayerScale, mask tokens, and what it says
    about itself."""
    model = randomize(build_backbone(TINY, mask_tokens=True, **FIELD))
    said = {"method": "ours", "effective_epochs": 3}
    return save_backbone(
        path, model.state_dict(), name=TINY, model_kwargs=model.model_kwargs, provenance=said
    )


def toy_run(folder, coco, weights, **changes):
    """Four iterations of configs/det/toy.py on the fixture's three classes; ``changes`` are fields of the
    protocol."""
    small = dict(max_iters=4, milestones=(3,), eval_every=2, num_classes=3)
    recipe = with_overrides(protocol_in(LazyConfig.load(str(TOY))), {**small, **changes})
    return DetectionRun(TINY, weights, coco, folder, recipe, seed=5, device="cpu", workers=0, accumulate=2)


def metrics_lines(folder):
    """A run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    """Nested dicts and lists of tensors and plain values, to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b
