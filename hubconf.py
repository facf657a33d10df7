"""torch.hub: ``torch.hub.load(REPOSITORY, "posfield", source="local", weights="run/backbone.safetensors")``.

``posfield`` builds what the weights are of; each name of the registry (``vit_small_patch16``, ...) is an
entry point, too.
"""

from pretrain.build import backbone_names as _names
from pretrain.build import build_backbone as _build
from pretrain.weights import backbone_name as _name_in

dependencies = ["torch", "numpy", "fvcore", "safetensors", "msgpack"]


def posfield(weights, backbone=None, source=None, **model_kwargs):
    """A ViT with any supported file of weights, in evaluation mode.

    weights: a file of ours or of another method, or a folder of Hugging Face's. backbone: a registry name,
    where the weights do not say it. source: whose file it is, where that is not clear. flags: those of
    pretrain.build.build_backbone (patch_size, ...).

    vit(image) gives cls [B, D], registers [B, R, D] and patches [B, N, D]; vit.feature_map(image) [B, D, h,
    w].
    """
    return _build(_name_in(backbone, weights, source), weights, source=source, **model_kwargs).eval()


def _entry(name):
    def entry(weights=None, source=None, **model_kwargs):
        return _build(name, weights, source=source, **model_kwargs).eval()

    entry.__name__ = name
    entry.__doc__ = f"{name}, in evaluation mode: of a file of weights, or freshly initialized without one; flags as for posfield."
    return entry


globals().update({_name: _entry(_name) for _name in _names()})
