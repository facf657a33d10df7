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
    from pretrain.build import build_backbone as build_backbone
    from pretrain.embed import embed as embed
    from pretrain.train import pretrain as pretrain

__version__ = "0.2.0"
_MODULES = {"build_backbone": "pretrain.build", "embed": "pretrain.embed", "pretrain": "pretrain.train"}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """The functions, each imported when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'posfield' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
