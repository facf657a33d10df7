"""Schedules: pure functions of the iteration (METHOD.md 6)."""

import math


def cosine(it: int, total_iters: int, start: float, end: float) -> float:
    """From ``start`` at iteration 0 towards ``end`` at ``total_iters`` along half a cosine; ``end``
    afterwards."""
    if it >= total_iters:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * it / total_iters))


def warmup_cosine(it: int, total_iters: int, warmup_iters: int, peak: float, end: float) -> float:
    """Linear from 0 to ``peak`` (reached at the last warm-up iteration, as DINOv2's), then a cosine to
    ``end``."""
    if it < warmup_iters:
        return peak * it / max(warmup_iters - 1, 1)
    return cosine(it - warmup_iters, total_iters - warmup_iters, peak, end)


def scaled_lr(base_lr: float, batch_size: int, rule: str) -> float:
    """``sqrt_1024``: base * sqrt(batch / 1024) (DINOv2); ``linear_256``: base * batch / 256 (MAE);
    ``none``: base."""
    factors = {"sqrt_1024": math.sqrt(batch_size / 1024), "linear_256": batch_size / 256, "none": 1.0}
    return base_lr * factors[rule]


def effective_epochs(epochs: float, n_global: int, n_local: int, global_px: int, local_px: int) -> float:
    """Epochs weighted by the area of the views: epochs * sum (size / 224)^2 (paper, footnote 4); 2 + 8
    views: 3.47 an epoch."""
    return epochs * (n_global * (global_px / 224) ** 2 + n_local * (local_px / 224) ** 2)
