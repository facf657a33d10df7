"""Which device a process computes on."""

import os

import torch

from pretrain.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")


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
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)
