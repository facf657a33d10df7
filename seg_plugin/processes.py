"""A run's processes: those that share the batch, and those that load the data."""

import signal
from typing import Any

from mmengine.model import MMDistributedDataParallel
from mmengine.registry import FUNCTIONS, MODEL_WRAPPERS
from torch import nn

from pretrain.signals import SIGNALS


@MODEL_WRAPPERS.register_module()
class PosfieldDataParallel(MMDistributedDataParallel):
    """mmengine's, on the model's own device.

    mmengine takes CUDA device number LOCAL_RANK, even if the process runs on the CPU or only sees one device.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        device = next(module.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        super().__init__(module, device_ids=ids, broadcast_buffers=False, **options)


@FUNCTIONS.register_module()
def posfield_worker(number: int) -> None:
    """Start of a data-loading process.

    A signal often goes to all processes of a job. If the training listens to it
    (:class:`pretrain.signals.StopSignals`), the training decides when to stop, and a worker that dies would
    end it before it has saved.
    """
    if callable(signal.getsignal(signal.SIGTERM)):  # the parent's handler; torch's own are not Python's
        for name in (*SIGNALS, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)


def end_workers(runner: Any) -> None:
    """End the data-loading processes. At exit Python would send them a signal that they ignore."""
    for loop in (runner._train_loop, runner._val_loop):
        iterator = getattr(getattr(loop, "dataloader", None), "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
