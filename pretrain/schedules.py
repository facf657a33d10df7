"""Schedules: pure functions of the iteration (METHOD.md 6)."""

import math


def cosine(it: int, total_it: int, start: float, end: float) -> float:
    """From ``start`` at iteration 0 towards ``end`` at ``total_it`` along half a cosine; ``end`` afterwards."""
    if it >= total_it:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * it / total_it))


def warmup_cosine(it: int, total_it: int, warmup_it: int, peak: float, end: float) -> float:
    """Linear from 0 to ``peak`` (reached at the last warm-up iteration, as DINOv2's), then a cosine to ``end``."""
    if it < warmup_it:
        return peak * it / max(warmup_it - 1, 1)
    return cosine(it - warmup_it, total_it - warmup_it, peak, end)


def scaled_lr(base_lr: float, batch_size: int, rule: str) -> float:
    """``sqrt_1024``: base * sqrt(batch / 1024) (DINOv2); ``linear_256``: base * batch / 256 (MAE); ``none``: base."""
    factors = {"sqrt_1024": math.sqrt(batch_size / 1024), "linear_256": batch_size / 256, "none": 1.0}
    return base_lr * factors[rule]


def effective_epochs(epochs: float, n_global: int, n_local: int, global_px: int, local_px: int) -> float:
    """Epochs weighted by the area of the views: epochs * sum (size / 224)^2 (paper, footnote 4); 2 + 8 views: 3.47 an epoch."""
    return epochs * (n_global * (global_px / 224) ** 2 + n_local * (local_px / 224) ** 2)
