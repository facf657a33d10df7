"""What MMSegmentation 1.2.2 needs to run on mmcv-lite and on today's torch. ``import seg_plugin`` applies it.

* mmcv-lite has the Python side of ``mmcv.ops`` but not the compiled ``mmcv._ext``, so importing ``mmcv.ops``, and with
  it ``mmseg.models``, fails. (mmcv itself is source-only and does not compile against torch >= 2.12.)
* torch >= 2.6 reads checkpoints with ``weights_only=True``, and mmengine's hold a few objects besides tensors.

A full mmcv stays as it is, as do the forks onedl-mmcv, onedl-mmengine, onedl-mmsegmentation (same import names).
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

import torch

from pretrain.device import choose_device

EXTENSION = "mmcv._ext"


def import_ops_without_extension() -> None:
    """Import ``mmcv.ops`` if ``mmcv._ext`` is absent. Afterwards ``mmcv._ext`` is still absent.

    The pure Python operators (``point_sample``, ...) work. A compiled one raises a RuntimeError that names it when
    called. The stand-in must not outlive the import: mmengine and mmcv recognize the full mmcv by ``mmcv._ext``.
    """
    if "mmcv.ops" in sys.modules or importlib.util.find_spec(EXTENSION) is not None:
        return

    sys.modules[EXTENSION] = _NoExtension(EXTENSION)
    try:
        importlib.import_module("mmcv.ops")
    finally:
        del sys.modules[EXTENSION]


class _NoExtension(types.ModuleType):
    """Has every function, and each says what is missing."""

    def __getattr__(self, name: str) -> Any:
        def missing(*_: Any, **__: Any) -> Any:
            told = "is compiled code, which mmcv-lite does not have; install the full mmcv"
            raise RuntimeError(f"mmcv.ops: {name} {told}")

        if name.startswith("__"):
            raise AttributeError(name)
        return missing


def allow_checkpoint_classes() -> None:
    """Allow what mmengine's own checkpoints hold besides tensors: logged scalars, NumPy arrays in HistoryBuffers.

    A HistoryBuffer refers to its own methods, which pickle writes as ``getattr(HistoryBuffer, "min")``. With an open
    getattr a file could reach anything, so the name means :func:`_history_method` only. ``weights_only`` stays on.
    """
    import numpy as np
    from mmengine.logging import HistoryBuffer

    # Array, scalar; NumPy 2 moved them
    rebuild: list[Any] = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    dtypes = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)}
    methods = (_history_method, "builtins.getattr")
    torch.serialization.add_safe_globals([HistoryBuffer, *rebuild, np.ndarray, np.dtype, *dtypes, methods])


def _history_method(owner: Any, name: str) -> Any:
    """HistoryBuffer's statistics, the only attributes that a checkpoint may name."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise UnpicklingError(f"a checkpoint names {owner!r}.{name}")
    return getattr(owner, name)


@contextlib.contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """Make mmengine's Runner build on a device of torch, or on ``auto`` (its own choice), which its config
    cannot say.

    Raises:
        UserError: as :func:`pretrain.device.choose_device`, whose choice it gives.
    """
    import mmengine.device.utils as device

    chosen, before = choose_device(name), device.DEVICE
    device.DEVICE = before if name == "auto" else chosen.type
    try:
        yield chosen
    finally:
        device.DEVICE = before
