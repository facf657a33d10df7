"""What a step of a post-training costs, PaKA and Gram anchoring, against a step of the DINOv2 baseline in the
same engine."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pretrain.benchmark.step import STEPS_A_TURN, training_steps
from pretrain.benchmark.turns import in_turns, report
from pretrain.config import load_config, recipe_info
from pretrain.device import choose_device
from pretrain.methods.backbones import new_backbone
from pretrain.settings import fields
from pretrain.weights import save_backbone

BASELINE_PX = 224  # DINOv2's global crops, whatever the patch size
RECIPES = {"dinov2": "dinov2-100ep", "paka": "paka-25ep", "gram": "gram-25ep"}


def words_of(backbone: str, patch_size: int, batch_size: int) -> dict[str, list[str]]:
    """``key=value`` of each contender over its recipe; the weights of a post-training are left out."""
    common = [f"backbone.name={backbone}", f"backbone.patch_size={patch_size}"]
    common.append(f"optim.batch_size={batch_size}")
    found = {name: list(common) for name in RECIPES}
    # The baseline's local crops are those of the post-training for this patch size, in whole patches.
    paka = load_config(RECIPES["paka"], [*common, "backbone.weights=FILE"])
    own = {"crops.local_px": paka.crops.local_px, "positions.grid": BASELINE_PX // patch_size}
    found["dinov2"] += [f"{key}={value}" for key, value in own.items()]
    return found


def measure(
    backbone: str,
    batch: int,
    rounds: int,
    device: str = "auto",
    patch_size: int = 16,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Seconds and peak memory of a step on synthetic pixels, in turns, each contender in its own process.

    All see as many images a step. The baseline makes of each 2 crops of 224 px and 8 local ones; PaKA and
    Gram anchoring, which see the same crops, 2 of 224 px (patches of 16) or 518 px (of 14) and 4 local ones.
    Memory is the most that a process holds for networks, heads, moments, gradients and activations (on CUDA
    torch's own account).

    Args:
        backbone: registry name; all have its network with random weights.
        batch: images a step.
        rounds: counted turns of each.
        patch_size: 16 | 14.
        overrides: more ``key=value``, each for all that have its key.

    Returns:
        ``time_ratio`` and ``memory_ratio``, PaKA over DINOv2, and ``gram_...``, Gram anchoring over DINOv2;
        seconds, images/s and MiB behind them; ``hours_full_run`` of a whole post-training at these seconds a
        step, and its ``arithmetic``.

    Raises:
        UserError: no such backbone or device; settings that do not fit.
    """
    where = choose_device(device)
    words = words_of(backbone, patch_size, batch)
    for name, more in shared(overrides).items():
        words[name] += [*more, f"run.device={where.type}"]
    with tempfile.TemporaryDirectory() as folder:
        weights = write_start(Path(folder) / "backbone.safetensors", words["dinov2"])
        for name in ("paka", "gram"):
            words[name].append(f"backbone.weights={weights}")
        tasks = {name: (training_steps, (RECIPES[name], own)) for name, own in words.items()}
        found = in_turns(tasks, str(where), rounds, steps=STEPS_A_TURN.get(where.type, 1))
    seconds = {name: median(figures.seconds) for name, figures in found.items()}
    ratios = {"{}_ratio": ("paka", "dinov2"), "gram_{}_ratio": ("gram", "dinov2")}
    rates = {name: round(batch / value, 2) for name, value in seconds.items()}
    whole = full_run({name: seconds[name] for name in ("paka", "gram")}, batch)
    asked = {"backbone": backbone, "patch_size": patch_size, "batch_size": batch, "settings": list(overrides)}
    return report(found, ratios) | {"img_per_s": rates, "device": str(where)} | whole | asked


def shared(overrides: Sequence[str]) -> dict[str, list[str]]:
    """``key=value`` words by contender: whatever it has, and what none has, which is then refused."""
    configs = {name: load_config(recipe, ["backbone.weights=FILE"]) for name, recipe in RECIPES.items()}
    keys = {name: {key for key, _, _ in fields(type(config))} for name, config in configs.items()}
    others = {name: set[str]().union(*keys.values()) - own for name, own in keys.items()}
    return {name: [w for w in overrides if w.split("=")[0] not in others[name]] for name in RECIPES}


def full_run(seconds: dict[str, float], batch_size: int) -> dict[str, Any]:
    """Hours of PaKA's whole recipe at the measured seconds a step, and how they come about."""
    recipe = load_config(RECIPES["paka"], ["backbone.weights=FILE"])
    epochs, n_images = recipe.optim.epochs, recipe_info(recipe.recipe).n_images
    n_steps = epochs * (n_images // batch_size)
    hours = {name: n_steps * value / 3600 for name, value in seconds.items()}
    steps = f"{epochs} epochs * floor({n_images} images / {batch_size} images a step) = {n_steps} steps"
    arithmetic = {name: f"{steps} * {value:.4g} s = {hours[name]:.4g} h" for name, value in seconds.items()}
    arithmetic["not counted"] = "reading and decoding images, probes, checkpoints"
    return {"hours_full_run": {name: round(h, 2) for name, h in hours.items()}, "arithmetic": arithmetic}


def write_start(path: Path, words: Sequence[str]) -> Path:
    """A file of the network that a config would train from scratch, with random weights."""
    config = load_config(RECIPES["dinov2"], words)
    vit = new_backbone(config, 0.0, config.positions)
    return save_backbone(path, vit.state_dict(), name=config.backbone.name, model_kwargs=vit.model_kwargs)
