"""How long a training step takes: the method against the DINOv2 baseline, by the same code, in turns in one
process."""

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pretrain import distributed
from pretrain.backbones.vit import SIZES
from pretrain.benchmark.data import write_photographs
from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader, draw
from pretrain.data.sampler import MASKS
from pretrain.precision import product_dtype
from pretrain.train import by_iteration
from pretrain.trainer import Length, Trainer
from pretrain.views import draw_masks
from pretrain.views.batch import Batch

SIZE_PX = (375.0, 500.0)  # of the image that synthetic views are drawn in
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, by the makers' data sheets
WARM_UP = 4  # turns that do not count: memory is faulted in, caches fill, kernels are chosen


RECIPES = {"intertwined": "intertwined-100ep", "dinov2": "dinov2-100ep"}


def measure(backbone: str, batch_size: int, rounds: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds and memory of a step with synthetic pixels, method and baseline in turns.

    Args:
        backbone: registry name.
        batch_size: images a step.
        rounds: counted turns of each; figures are medians, the ratio is the median over the turns' ratios.
        overrides: more ``key=value``, for both.

    Returns:
        ``method_over_baseline``, and for each its seconds, images/s, model FLOPs an image
        (:func:`flops_an_image`), MFU where the GPU is known, and on CUDA the peak memory (MiB) without what
        the other one holds.
    """
    runs = {}
    for method, recipe in RECIPES.items():
        config = load_config(
            recipe, [f"backbone.name={backbone}", f"optim.batch_size={batch_size}", *overrides]
        )
        trainer = Trainer(config, unfrozen_length())
        runs[method] = trainer, [resident(synthetic_batch(config, it), trainer.device) for it in range(4)]
    device = runs["dinov2"][0].device
    # a queue of steps, as in training: launching hides behind computing
    steps_a_turn = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    peaks: dict[str, list[float]] = {method: [] for method in runs}
    for turn in range(WARM_UP + rounds):
        for method, (trainer, batches) in runs.items():
            settle(device)
            held = start_peak(device)
            started = time.perf_counter()
            for step in range(steps_a_turn):
                trainer.step([batches[(turn + step) % len(batches)]])
            settle(device)
            if turn >= WARM_UP:
                seconds[method].append((time.perf_counter() - started) / steps_a_turn)
                if device.type == "cuda":
                    # networks, centers, moments
                    own = sum(tensor.nbytes for tensor in trainer.tensors().values()) / 2**20
                    peaks[method].append(torch.cuda.max_memory_allocated(device) / 2**20 - (held - own))
    with trainer.autocast:
        precision = product_dtype(torch.zeros((), dtype=trainer.dtype, device=device))
    ratios = [a / b for a, b in zip(seconds["intertwined"], seconds["dinov2"])]
    return {
        "method_over_baseline": round(median(ratios), 3),
        "turns": [round(ratio, 3) for ratio in ratios],
        "backbone": backbone,
        "batch_size": batch_size,
        "precision": str(precision).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        **{
            method: figures_of(trainer, median(seconds[method]), device)
            | ({"peak_memory_mib": round(median(peaks[method]), 1)} if peaks[method] else {})
            for method, (trainer, _) in runs.items()
        },
    }


def resident(batch: Batch, device: torch.device) -> Batch:
    """Pin the batch if the device is a GPU, as the loader does."""
    return batch.pin_memory() if device.type == "cuda" else batch


def start_peak(device: torch.device) -> float:
    """Forget earlier peaks; MiB that are held now (0 but on CUDA)."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def unfrozen_length() -> Length:
    """The middle of a long run. An epoch is one iteration, so that no layer is frozen after the first."""
    return Length(1, 100_000, 1000)


def synthetic_batch(config: Any, it: int) -> Batch:
    """A batch of noise with the recipe's views, masks and positions."""
    rules, n_images, seed = config.view_settings(), config.optim.batch_size, config.run.seed
    positions = range(it * n_images, (it + 1) * n_images)
    views, _ = draw(rules, seed, positions, np.tile(np.array(SIZE_PX), (n_images, 1)))
    masks = rules.masks and draw_masks(n_images, views.n_global, rules.grid, rules.masks, (seed, MASKS, it))
    generator = torch.Generator().manual_seed(it)
    crops = rules.crops
    counts = (crops.global_px, crops.n_global), (crops.local_px, crops.n_local)
    pixels = [
        torch.randint(0, 256, (n * n_images, 3, px, px), dtype=torch.uint8, generator=generator)
        for px, n in counts
    ]
    return Batch(pixels[0], pixels[1], views, masks)


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def figures_of(trainer: Trainer, seconds: float, device: torch.device) -> dict[str, Any]:
    """A step's time as people compare it."""
    n_images, flops = trainer.config.optim.batch_size, flops_an_image(trainer.config)
    found: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "img_per_s": round(n_images / seconds, 2),
        "gflops_an_image": round(flops / 1e9, 1),
        "tflops_per_s": round(flops * n_images / seconds / 1e12, 3),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for gpu, peak in PEAK_FLOPS.items():
        if gpu in name:
            found["mfu"] = round(flops * n_images / seconds / peak, 4)
    return found


def flops_an_image(config: Any) -> float:
    """Model FLOPs of a step for one image: what the algorithm needs, recomputation not counted.

    A product of [m, k] and [k, n] counts 2 m k n. A block on a sequence of N tokens of width D: 24 D^2 a
    token for the projections and the MLP, 4 N D a token for attention. The teacher: forward, global crops.
    The student: three times forward (itself, and the gradients by input and by weight), all crops. A head:
    its MLP and its prototypes on the rows that it sees, which are every [CLS], and on average the mean mask
    ratio of the crops of its kind. Patch embedding included; norms, softmax, positions and the optimizer are
    not.
    """
    backbone, crops, masks, heads = config.backbone, config.crops, config.masks, config.heads
    size = SIZES[backbone.name.split("_")[1]]
    dim, depth = size["embed_dim"], backbone.depth or size["depth"]

    def forward(px: int) -> float:
        n_patches = (px // backbone.patch_size) ** 2
        n_tokens = n_patches + 1 + backbone.n_registers
        embedding = 2 * n_patches * 3 * backbone.patch_size**2 * dim
        return depth * n_tokens * (24 * dim**2 + 4 * n_tokens * dim) + embedding

    widths = [dim, *[heads.hidden_dim] * (heads.n_layers - 1), heads.bottleneck_dim, heads.n_prototypes]
    row = sum(2 * a * b for a, b in zip(widths[:-1], widths[1:]))
    n_patches = (crops.global_px // backbone.patch_size) ** 2
    on = [k for k in ("content", "position") if getattr(config.losses, k) > 0]
    masked = crops.n_global * n_patches * sum(masks.ratio) / 2 * sum(getattr(masks, f"{k}_share") for k in on)
    teacher = crops.n_global * forward(crops.global_px) + (crops.n_global + masked) * row
    student = crops.n_global * forward(crops.global_px) + crops.n_local * forward(crops.local_px)
    student += (crops.n_global + crops.n_local + masked) * row
    return teacher + 3 * student


def measure_with_data(
    backbone: str, batch_size: int, iterations: int, workers: int, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Images/s of the method with real JPEG files through each data path, beside the same loop on synthetic
    pixels.

    Args:
        workers: decoding processes.
        iterations: the number that counts, after :data:`WARM_UP` others.
    """
    found: dict[str, Any] = {"workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        for path in ("synthetic", "cpu", "device"):
            own = [f"backbone.name={backbone}", f"optim.batch_size={batch_size}"]
            own += [f"data.root={folder}", f"data.workers={workers}"]
            own += [] if path == "synthetic" else [f"data.path={path}"]
            config = load_config(None, [*own, "optim.epoch_iters=1000", *overrides])
            found[f"{path}_img_per_s"] = round(loop_rate(config, iterations, path == "synthetic"), 2)
            ratio = found[f"{path}_img_per_s"] / found["synthetic_img_per_s"]
            found[f"{path}_over_synthetic"] = round(ratio, 3)
    return found


def loop_rate(config: Any, iterations: int, is_synthetic: bool) -> float:
    """Images/s of some training iterations."""
    trainer = Trainer(config, unfrozen_length())
    # Long enough that the batches which workers had ready at the start do not count, and that a slow loader
    # shows.
    first = WARM_UP + 2 * config.data.workers
    last = first + max(iterations, 4 * config.data.workers)
    loader: Iterable[Any] = [(resident(synthetic_batch(config, 0), trainer.device), ())] * last
    if not is_synthetic:
        loader = build_loader(
            config, build_dataset(config), 0, last, pin_memory=trainer.device.type == "cuda"
        )
    started = 0.0
    for it, (micro_batches, _, _) in enumerate(by_iteration(loader, 1)):
        if it == first:
            settle(trainer.device)
            started = time.perf_counter()
        trainer.step(micro_batches)
    settle(trainer.device)
    n_images = (last - first) * config.optim.batch_size * distributed.world_size()
    return n_images / (time.perf_counter() - started)
