"""Schedules: pure functions of the iteration (METHOD.md 6)."""

import math


def cosine(it: int, total_iters: int, start: float, end: float) -> float:
    """From ``start`` at iteration 0 to ``end`` at ``total_iters``, half a cosine; ``end`` afterwards."""
    if it >= total_iters:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * it / total_iters))


def warmup_cosine(it: int, total_iters: int, warmup_iters: int, peak: float, end: float) -> float:
    """Linear from 0 to ``peak`` (at the last warm-up iteration, as DINOv2's), then a cosine to ``end``."""
    if it < warmup_iters:
        return peak * it / max(warmup_iters - 1, 1)
    return cosine(it - warmup_iters, total_iters - warmup_iters, peak, end)


def scaled_lr(base_lr: float, batch_size: int, rule: str) -> float:
    """base * sqrt(batch / 1024) (``sqrt_1024``, DINOv2) | base * batch / 256 (``linear_256``, MAE) | base."""
    factors = {"sqrt_1024": math.sqrt(batch_size / 1024), "linear_256": batch_size / 256, "none": 1.0}
    return base_lr * factors[rule]


def effective_epochs(epochs: float, n_global: int, n_local: int, global_px: int, local_px: int) -> float:
    """epochs * sum over the views of (size / 224)^2 (paper, footnote 4); 2 + 8 views: 3.47 an epoch."""
    return epochs * (n_global * (global_px / 224) ** 2 + n_local * (local_px / 224) ** 2)


def iterations(epochs: float, n_images: int, batch_size: int) -> int:
    """Iterations of so many epochs, whole or not; an epoch's last batch counts as a whole one. At least 1."""
    return max(1, round(epochs * math.ceil(n_images / batch_size)))
