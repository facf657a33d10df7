"""Segmentation fine-tuning on MMSegmentation. ``custom_imports = dict(imports=["seg_plugin"])`` in a config
registers it."""

from importlib.util import find_spec

if absent := [name for name in ("mmengine", "mmcv", "mmseg") if find_spec(name) is None]:
    told = f"seg_plugin needs {', '.join(absent)}: pip install 'posfield[seg]'"
    raise ModuleNotFoundError(told, name=absent[0])

from seg_plugin import compat

compat.import_ops_without_extension()  # before anything imports mmseg.models
compat.allow_checkpoint_classes()

from seg_plugin import backbone, data, hooks, loop, optim  # noqa: E402, F401  (they register themselves)
