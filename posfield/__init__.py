"""posfield: pre-train Vision Transformers for object detection, and compare them on detection and
segmentation.

>>> import posfield
>>> backbone = posfield.build_backbone("runs/b16/backbone.safetensors")
>>> tokens = backbone(backbone.preprocess("photo.jpg"))  # cls [1, D], patches [1, N, D]

Each command of the console script ``posfield`` calls one of these functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from det_plugin.predict import load_detector as load_detector
    from det_plugin.train import finetune as finetune_detection
    from pretrain.build import build_backbone as build_backbone
    from pretrain.embed import embed as embed
    from pretrain.train import pretrain as pretrain
    from seg_plugin.predict import load_segmenter as load_segmenter
    from seg_plugin.run import finetune as finetune_segmentation

__version__ = "0.2.0"
_FUNCTIONS = {
    "build_backbone": ("pretrain.build", "build_backbone"),
    "embed": ("pretrain.embed", "embed"),
    "pretrain": ("pretrain.train", "pretrain"),
    "finetune_detection": ("det_plugin.train", "finetune"),
    "load_detector": ("det_plugin.predict", "load_detector"),
    "finetune_segmentation": ("seg_plugin.run", "finetune"),
    "load_segmenter": ("seg_plugin.predict", "load_segmenter"),
}
__all__ = [
    "build_backbone",
    "embed",
    "finetune_detection",
    "finetune_segmentation",
    "load_detector",
    "load_segmenter",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    """The functions, each imported when it is first used."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'posfield' has no attribute {name!r}")
    module, function = _FUNCTIONS[name]
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
