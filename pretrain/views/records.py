"""The base of all parts of a batch: frozen dataclasses of tensors that move together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

R = TypeVar("R", bound="Record")

SMALL_BYTES = 1 << 20  # tensors up to this size travel between processes by value


class Record:
    """Base of the dataclasses whose fields are tensors, other records, and plain values."""

    def map(self: R, change: Callable[[Tensor], Tensor]) -> R:
        """The same record with ``change`` applied to each tensor, including those of inner records."""
        tensors = {name: change(value) for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        records = {k: value.map(change) for k, value in self.__dict__.items() if isinstance(value, Record)}
        return replace(self, **tensors, **records)  # type: ignore[type-var]

    def pin_memory(self: R) -> R:
        """The same record in page-locked memory; a thread of the data loader calls this."""
        return self.map(lambda tensor: tensor.pin_memory())

    def to(self: R, device: torch.device) -> R:
        """The same record on another device, without waiting for the copies."""
        # the host would read too early
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors become arrays: a tensor is sent as a shared file; a process opens about 1,000."""
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.nbytes <= SMALL_BYTES else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
        )
