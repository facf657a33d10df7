"""Peak memory and time of heads and losses: in chunks against the plain float32 form, in turns, each in a
process of its own."""

from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import SIZES, size_name
from pretrain.benchmark.turns import Work, in_turns, report
from pretrain.config import load_config
from pretrain.device import choose_device
from pretrain.heads import HeadOutput, ProjectionHead
from pretrain.losses import image_loss, patch_loss


def measure(backbone: str, batch: int, device: str = "auto", precision: str = "float32") -> dict[str, Any]:
    """Memory (weights, gradients, everything) of all heads and losses of a step, forward and backward.

    Args:
        backbone: registry name; gives the tokens' width.
        batch: images of a step; 64 have 640 [CLS] rows and about 7,500 masked patches.
        device: where; see :func:`pretrain.benchmark.turns.in_turns`.
        precision: of the chunked form: ``float32`` | ``bf16``; the plain form is float32 always.

    Returns:
        ``memory_ratio`` and ``time_ratio`` (chunked over plain), with the raw figures.
    """
    where = str(choose_device(device))
    forms = {"chunked": (load_config().step.loss_rows, precision), "plain": (0, "float32")}
    tasks = {name: (form, (backbone, batch, where, *how)) for name, how in forms.items()}
    found = report(in_turns(tasks, where, rounds=1), {"{}_ratio": ("chunked", "plain")})
    return found | {"backbone": backbone, "n_images": batch, "device": where, "precision": precision}


def form(backbone: str, n_images: int, device: str, n_rows: int, precision: str) -> Work:
    """One forward and backward pass of three heads and their losses, ``n_rows`` rows at a time (0: all)."""
    where, config = torch.device(device), load_config()
    torch.manual_seed(0)
    dim, heads = SIZES[size_name(backbone) or ""]["embed_dim"], config.heads
    shape = (heads.n_prototypes, heads.hidden_dim, heads.bottleneck_dim, heads.n_layers)
    student, teacher = ([ProjectionHead(dim, *shape).to(where) for _ in range(3)] for _ in range(2))
    n_masked = int(n_images * config.crops.n_global * 196 * sum(config.masks.ratio) / 2 * 0.5)  # of a kind
    n_views = config.crops.n_global + config.crops.n_local
    tokens = [torch.randn(n_views, n_images, dim, device=where)]
    tokens += [torch.randn(n_masked, dim, device=where) for _ in range(2)]

    def work() -> None:
        for head in student:
            head.zero_grad(set_to_none=True)
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = total_loss(student, teacher, tokens, n_rows, config.crops.n_global)
        loss.backward()

    return work


Heads = list[ProjectionHead]


def total_loss(student: Heads, teacher: Heads, tokens: list[Tensor], n_rows: int, n_global: int) -> Tensor:
    """The image loss and both patch losses; the teacher reads the same tokens."""
    temperatures = (0.1, 0.04)
    center = torch.zeros(1, student[0].last_layer.out_features, device=tokens[0].device)
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
