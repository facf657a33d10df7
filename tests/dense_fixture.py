"""A tiny backbone to start a post-training from, and the settings of one."""

import torch
from photos import TINY

from pretrain.build import build_backbone
from pretrain.weights import save_backbone

# On pretrain/recipes/paka-25ep.yaml.
DENSE = [
    *(word for word in TINY if not word.startswith("heads.n_prototypes")),
    "method=paka",
    "data.source=auto",
    "data.split=",
    "crops.local_px=48",
    "crops.local_scale=[0.2,0.6]",
    "alignment.region_grid=3",
    "alignment.min_overlap_patches=0.5",
    "optim.base_lr=1e-3",
]
TIED = ["positions.encoding=field", "positions.augment=true"]
GRAM = ["alignment.loss=gram", "alignment.head=false", "optim.teacher_momentum=1.0"]


def write_start(path, name="vit_tiny_patch16", **model_kwargs):
    """A backbone of random weights, larger than at a fresh start, so that patches differ; returns its
    file."""
    torch.manual_seed(5)
    vit = build_backbone(name, **{"depth": 2, "pos_encoding": "standard", "pos_grid": 4, **model_kwargs})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    told = {"method": "earlier", "effective_epochs": 12.5}
    return save_backbone(path, vit.state_dict(), name=name, model_kwargs=vit.model_kwargs, provenance=told)
