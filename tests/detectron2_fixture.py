"""What both files of Detectron2's tests start from."""

from pathlib import Path

import torch

from pretrain.build import build_backbone
from pretrain.weights import save_backbone

ROOT = Path(__file__).parents[1]
TOY = ROOT / "configs" / "det" / "toy.py"
TINY = "vit_tiny_patch16"
FIELD = dict(depth=2, pos_encoding="field", n_registers=2, layerscale=1e-2)


def randomise(model, seed=0):
    """Weights of ordinary size everywhere, so that no term hides behind a zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_pretrained(path):
    """A backbone as pre-training leaves it: field, registers, LayerScale, mask tokens, and what it says about itself."""
    model = randomise(build_backbone(TINY, mask_tokens=True, **FIELD))
    said = {"method": "ours", "effective_epochs": 3}
    return save_backbone(path, model.state_dict(), name=TINY, flags=model.flags, provenance=said)
