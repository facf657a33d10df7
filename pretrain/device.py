"""Which device a process computes on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pretrain.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
MEMORY_SHARE = 0.9  # of a GPU's memory that a fitted step may take: batches differ a little


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA (this rank's GPU under torchrun), else MPS, else the CPU.

    Raises:
        UserError: another name, or a device that torch does not see.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if has[device])
    if name not in has:
        raise UserError(f"device: {name!r} is none of {', '.join(DEVICES)}")
    if not has[name]:
        raise UserError(f"device: {name!r} is asked for, but torch sees none")
    if name == "cuda":
        # a task may see its own alone
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """torch's deterministic algorithms, on or off: with them a resumed run equals an uninterrupted one."""
    switch: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switch.fill_uninitialized_memory
    # CUDA's matrix products need it before the first of them
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    switch.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switch.fill_uninitialized_memory = before[1]


def fewest_parts(n_images: int, step: Callable[[int], object], device: torch.device) -> int | None:
    """The fewest equal parts of a batch whose steps fit into a GPU's memory; None: not even single images do.

    Args:
        step: takes steps in so many parts, and keeps nothing.
    """
    divisors = (n for n in range(1, n_images + 1) if n_images % n == 0)
    return next((n for n in divisors if fits(partial(step, n), device)), None)


def fits(step: Callable[[], object], device: torch.device) -> bool:
    """Whether steps take at most :data:`MEMORY_SHARE` of a GPU's memory."""
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device) <= MEMORY_SHARE * total
