"""Peak memory and time of heads and losses: in chunks against the plain float32 form, each in a process of its own."""

import multiprocessing
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import SIZES
from pretrain.config import load_config
from pretrain.device import choose_device
from pretrain.heads import HeadOutput, ProjectionHead
from pretrain.losses import image_loss, patch_loss


def measure(backbone: str, n_images: int, device: str = "auto", precision: str = "float32") -> dict[str, Any]:
    """Peak MiB (weights, gradients, everything) of all heads and losses of a step, forward and backward, and their ratio.

    Args:
        backbone: registry name; gives the tokens' width.
        n_images: of a step; 64 images have 640 [CLS] rows and about 7,500 masked patches.
        device: where; on CUDA torch's own account is read, elsewhere the growth of the process.
        precision: of the chunked form: ``float32`` | ``bf16``; the plain form is float32 always.

    Returns:
        ``memory_ratio`` and ``time_ratio`` (chunked over plain), with the raw figures.
    """
    where = choose_device(device)
    forms = {"chunked": (load_config().step.loss_rows, precision), "plain": (0, "float32")}
    figures = {name: in_a_process(backbone, n_images, rows, str(where), kind) for name, (rows, kind) in forms.items()}
    (memory, seconds), (plain_memory, plain_seconds) = figures["chunked"], figures["plain"]
    return {
        "memory_ratio": round(memory / plain_memory, 3),
        "time_ratio": round(seconds / plain_seconds, 3),
        "chunked_mib": round(memory, 1),
        "plain_mib": round(plain_memory, 1),
        "chunked_seconds": round(seconds, 3),
        "plain_seconds": round(plain_seconds, 3),
        "backbone": backbone,
        "n_images": n_images,
        "device": str(where),
        "precision": precision,
    }


def in_a_process(*arguments: Any) -> tuple[float, float]:
    """:func:`one_form` in a fresh process: peaks of a process never come down again."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(one_form, arguments)


def one_form(backbone: str, n_images: int, n_rows: int, device: str, precision: str) -> tuple[float, float]:
    """Peak MiB above the start, and seconds, of one forward and backward pass of three heads and their losses."""
    where, config = torch.device(device), load_config()
    torch.manual_seed(0)
    before = held_mib(where)
    dim, heads = SIZES[backbone.split("_")[1]]["embed_dim"], config.heads
    shape = (heads.n_prototypes, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
    student, teacher = ([ProjectionHead(dim, *shape).to(where) for _ in range(3)] for _ in range(2))
    rows = [int(n_images * config.crops.n_global * 196 * sum(config.masks.ratio) / 2 * share) for share in (0.5, 0.5)]
    n_views = config.crops.n_global + config.crops.n_local
    tokens = [torch.randn(n_views, n_images, dim, device=where), *(torch.randn(m, dim, device=where) for m in rows)]
    started = time.perf_counter()
    with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = total_loss(student, teacher, tokens, n_rows, config.crops.n_global)
    loss.backward()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return held_mib(where) - before, time.perf_counter() - started


def total_loss(
    student: list[ProjectionHead], teacher: list[ProjectionHead], tokens: list[Tensor], n_rows: int, n_global: int
) -> Tensor:
    """The image loss and both patch losses; the teacher reads the same tokens."""
    temperatures, k = (0.1, 0.04), student[0].last_layer.out_features
    center = torch.zeros(1, k, device=tokens[0].device)
    losses = []
    for i, (ours, theirs, x) in enumerate(zip(student, teacher, tokens)):
        with torch.no_grad():
            target: HeadOutput = theirs(x[:n_global] if i == 0 else x)
        if i == 0:
            losses.append(image_loss(ours(x), target, center, temperatures, n_rows))
        else:
            weights = torch.full((len(x),), 1 / len(x), device=x.device)
            losses.append(patch_loss(ours(x), target, center, weights, 1, temperatures, n_rows))
    return torch.stack(losses).sum()


def held_mib(device: torch.device) -> float:
    """Peak so far, MiB: of torch on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
