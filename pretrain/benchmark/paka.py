"""What a step of a post-training costs, PaKA and Gram anchoring, against a step of the DINOv2 baseline in the same engine."""

import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pretrain.benchmark.step import resident, settle, synthetic_batch
from pretrain.benchmark.turns import Work, in_turns, ratio
from pretrain.config import load_config
from pretrain.device import choose_device
from pretrain.methods.intertwined import build_student_backbone
from pretrain.recipe import BASELINE, COCO_TRAIN, GRAM, PAKA, SIZES_PX
from pretrain.trainer import Length, Trainer
from pretrain.weights import save_backbone

DENSE = {"run.algorithm": "dense", "run.leaves": "student", "masks.content_share": 0.0, "masks.position_share": 0.0, **PAKA}
BASELINE_PX = 224  # DINOv2's global crops, whatever the patch size
STEPS_A_TURN = {"cuda": 10}  # a queue of steps, as in training: launching hides behind computing; elsewhere 1


def recipes(backbone: str, patch_size: int, batch_size: int) -> dict[str, list[str]]:
    """``key=value`` of each contender: its recipe with crops for the patch size; the weights of a post-training are left out."""
    global_px, local_px = SIZES_PX[patch_size]
    common = {"backbone.name": backbone, "backbone.patch_size": patch_size, "optim.batch_size": batch_size}
    dense = {**DENSE, **common, "crops.global_px": global_px, "crops.local_px": local_px}
    baseline = {**BASELINE, **common, "crops.local_px": local_px, "positions.grid": BASELINE_PX // patch_size}
    contenders = {"dinov2": baseline, "paka": dense, "gram": {**dense, **GRAM}}
    return {name: [f"{key}={value}" for key, value in changes.items()] for name, changes in contenders.items()}


def measure(
    backbone: str, batch_size: int, rounds: int, device: str = "auto", patch_size: int = 16, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Seconds and peak memory of a training step on synthetic pixels, in turns, each contender in a process of its own.

    All see as many images a step. The baseline makes of each 2 crops of 224 px and 8 local ones; PaKA and Gram anchoring, which see
    the same crops, 2 of 224 px (patches of 16) or 518 px (of 14) and 4 local ones. Memory is the most that a process holds for
    networks, heads, moments, gradients and activations (on CUDA torch's own account).

    Args:
        backbone: registry name; all have its network with random weights.
        batch_size: images a step.
        rounds: counted turns of each.
        patch_size: 16 | 14.
        overrides: more ``key=value``, for all.

    Returns:
        ``time_ratio`` and ``memory_ratio``, PaKA over DINOv2, and ``gram_...``, Gram anchoring over DINOv2; seconds, images/s and
        MiB behind them; ``hours_full_run`` of a whole post-training at these seconds a step, and its ``arithmetic``.

    Raises:
        UserError: no such backbone or device; settings that do not fit.
    """
    where = choose_device(device)
    words = {
        name: [*own, *overrides, f"run.device={where.type}"] for name, own in recipes(backbone, patch_size, batch_size).items()
    }
    n_steps = STEPS_A_TURN.get(where.type, 1)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_start(Path(folder) / "backbone.safetensors", words["dinov2"])
        for name in ("paka", "gram"):
            words[name].append(f"backbone.weights={weights}")
        found = in_turns({name: (training_steps, (own, n_steps)) for name, own in words.items()}, str(where), rounds)
    seconds = {name: median(figures.seconds) / n_steps for name, figures in found.items()}
    ratios = {
        f"{prefix}{key}_ratio": value
        for prefix, name in (("", "paka"), ("gram_", "gram"))
        for key, value in ratio(found[name], found["dinov2"]).items()
    }
    return {
        **ratios,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "img_per_s": {name: round(batch_size / value, 2) for name, value in seconds.items()},
        "peak_mib": {name: round(figures.peak_mib, 1) for name, figures in found.items()},
        **full_run({name: seconds[name] for name in ("paka", "gram")}, batch_size),
        "backbone": backbone,
        "patch_size": patch_size,
        "batch_size": batch_size,
        "settings": list(overrides),
        "device": str(where),
        "threads": torch.get_num_threads(),
    }


def full_run(seconds: dict[str, float], batch_size: int) -> dict[str, Any]:
    """Hours of PaKA's whole recipe at the measured seconds a step, and how they come about."""
    epochs, epoch_it = PAKA["optim.epochs"], COCO_TRAIN // batch_size
    hours = {name: epochs * epoch_it * value / 3600 for name, value in seconds.items()}
    steps = f"{epochs} epochs * floor({COCO_TRAIN} images / {batch_size} images a step) = {epochs * epoch_it} steps"
    arithmetic = {name: f"{steps} * {value:.4g} s = {hours[name]:.4g} h" for name, value in seconds.items()}
    arithmetic["not counted"] = "reading and decoding images, probes, checkpoints"
    return {"hours_full_run": {name: round(value, 2) for name, value in hours.items()}, "arithmetic": arithmetic}


def write_start(path: Path, words: Sequence[str]) -> Path:
    """A file of the network that a config would train from scratch, with random weights."""
    config = load_config(None, words)
    vit = build_student_backbone(config, 0.0)
    return save_backbone(path, vit.state_dict(), name=config.backbone.name, flags=vit.flags)


def training_steps(words: Sequence[str], n_steps: int) -> Work:
    """Some training steps of a config, on batches of noise."""
    config = load_config(None, words)
    trainer = Trainer(config, Length(1000, 100_000, 0, 0))
    batches = [resident(synthetic_batch(config, it), trainer.device) for it in range(4)]
    steps = count()

    def work() -> None:
        for _ in range(n_steps):
            trainer.step([batches[next(steps) % len(batches)]])
        settle(trainer.device)

    return work
