"""How long a training step takes: the method against the DINOv2 baseline, by the same code, or rotary positions against
none."""

import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pretrain import distributed
from pretrain.backbones.vit import SIZES, ViT, size_name
from pretrain.benchmark.data import write_photographs
from pretrain.benchmark.turns import Work, in_turns, report, settle
from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader, draw
from pretrain.data.sampler import MASKS
from pretrain.device import choose_device
from pretrain.precision import product_dtype
from pretrain.train import by_iteration
from pretrain.trainer import Length, Trainer, choose_precision
from pretrain.views import draw_masks
from pretrain.views.batch import Batch

SIZE_PX = (375.0, 500.0)  # of the image that synthetic views are drawn in
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, by the makers' data sheets
WARM_UP = 4  # turns that do not count: memory is faulted in, caches fill, kernels are chosen
STEPS_A_TURN = {"cuda": 10}  # a queue of steps, as in training: launching hides behind computing; elsewhere 1
# Contenders, the one above first: a recipe, and whether it turns queries and keys
METHODS: dict[str, tuple[str, bool]] = {
    "intertwined": ("intertwined-100ep", True),
    "dinov2": ("dinov2-100ep", True),
}
ROTATION = {"rotary": ("rotary-100ep", True), "unrotated": ("rotary-100ep", False)}


def measure(
    backbone: str,
    batch: int,
    rounds: int,
    device: str = "auto",
    overrides: Sequence[str] = (),
    with_data: int | None = None,
    rotary: bool = False,
) -> dict[str, Any]:
    """Seconds and peak memory of a step with synthetic pixels, method and baseline (or the method with rotary
    positions and the same without turning any) in turns, each in its own process.

    Args:
        backbone: registry name.
        batch: images a step.
        rounds: counted turns of each; figures are medians, the ratio is the median over the turns' ratios.
        overrides: more ``key=value``, for both.
        with_data: decoding processes of :func:`measure_with_data`, which is measured too; None: it is not.
        rotary: what rotation costs.

    Returns:
        ``method_over_baseline`` or ``rotary_over_unrotated``, ``memory_ratio``, and for each its seconds,
        images/s, model FLOPs an image (:func:`flops_an_image`), and MFU where the GPU is known.

    Raises:
        UserError: no such backbone or device; settings that do not fit.
    """
    where = choose_device(device)
    words = [f"backbone.name={backbone}", f"optim.batch_size={batch}", f"run.device={where.type}", *overrides]
    contenders = ROTATION if rotary else METHODS
    above, below = contenders
    configs = {name: load_config(recipe, words) for name, (recipe, _) in contenders.items()}
    tasks = {name: (training_steps, (recipe, words, turns)) for name, (recipe, turns) in contenders.items()}
    found = in_turns(tasks, str(where), rounds, WARM_UP, STEPS_A_TURN.get(where.type, 1))
    told = report(found, {"{}_ratio": (above, below)})
    ratio = "rotary_over_unrotated" if rotary else "method_over_baseline"
    told = {ratio: told.pop("time_ratio"), **told}
    told["turns"] = [round(a / b, 3) for a, b in zip(found[above].seconds, found[below].seconds)]
    dtype, autocast = choose_precision(configs[below].run.precision, where)
    with autocast:
        precision = product_dtype(torch.zeros((), dtype=dtype, device=where))
    seconds = {name: median(figures.seconds) for name, figures in found.items()}
    figures = {name: figures_of(config, seconds[name], where) for name, config in configs.items()}
    data = {} if with_data is None else {"with_data": measure_with_data(words, 4 * rounds, with_data)}
    asked = {"backbone": backbone, "batch_size": batch, "device": str(where)}
    asked["precision"] = str(precision).removeprefix("torch.")
    return {**told, **asked, **figures, **data}


def training_steps(recipe: str, words: Sequence[str], rotates: bool = True) -> Work:
    """A training step of a config, on batches of noise, with rotary positions turning queries and keys or not."""
    config = load_config(recipe, words)
    trainer = Trainer(config, unfrozen_length())
    for network in trainer.method.modules():
        if isinstance(network, ViT) and not rotates:
            network.pos_encoding = "none"
    batches = cycle([resident(synthetic_batch(config, it), trainer.device) for it in range(4)])
    return lambda: trainer.step([next(batches)])


def resident(batch: Batch, device: torch.device) -> Batch:
    """Pin the batch if the device is a GPU, as the loader does."""
    return batch.pin_memory() if device.type == "cuda" else batch


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
    sizes = (crops.global_px, crops.n_global), (crops.local_px, crops.n_local)
    shapes = [(n * n_images, 3, px, px) for px, n in sizes]
    pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    return Batch(pixels[0], pixels[1], views, masks)


def figures_of(config: Any, seconds: float, device: torch.device) -> dict[str, Any]:
    """A step's time as people compare it."""
    rate, flops = config.optim.batch_size / seconds, flops_an_image(config)
    found = {
        "seconds": round(seconds, 4),
        "img_per_s": round(rate, 2),
        "gflops_an_image": round(flops / 1e9, 1),
        "tflops_per_s": round(flops * rate / 1e12, 3),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
    return found | ({"mfu": round(flops * rate / peak, 4)} if peak else {})


def flops_an_image(config: Any) -> float:
    """Model FLOPs of a step for one image: what the algorithm needs, recomputation not counted.

    A product of [m, k] and [k, n] counts 2 m k n. A block on a sequence of N tokens of width D: 8 D^2 a token
    for the projections, 16 D^2 for the MLP (6 D H where it is gated, of hidden width H), 4 N D for attention.
    The teacher: forward, global crops. The student: three times forward (itself, and the gradients by input
    and by weight), all crops. A head: its MLP and its prototypes on the rows that it sees, which are every
    [CLS], and on average the mean mask ratio of the crops of its kind. Patch embedding included; norms,
    softmax, positions and the optimizer are not.
    """
    backbone, crops, masks, heads = config.backbone, config.crops, config.masks, config.heads
    size = SIZES[size_name(backbone.name) or ""]
    dim, depth = size["embed_dim"], backbone.depth or size["depth"]
    mlp = 6 * size["mlp_ratio"] if size.get("swiglu") else 16

    def forward(px: int) -> float:
        n_patches = (px // backbone.patch_size) ** 2
        n_tokens = n_patches + 1 + backbone.n_registers
        embedding = 2 * n_patches * 3 * backbone.patch_size**2 * dim
        return depth * n_tokens * ((8 + mlp) * dim**2 + 4 * n_tokens * dim) + embedding

    widths = [dim, *[heads.hidden_dim] * (heads.n_layers - 1), heads.bottleneck_dim, heads.n_prototypes]
    row = sum(2 * a * b for a, b in zip(widths[:-1], widths[1:]))
    n_patches = (crops.global_px // backbone.patch_size) ** 2
    on = [k for k in ("content", "position") if getattr(config.losses, k) > 0]
    masked = crops.n_global * n_patches * sum(masks.ratio) / 2 * sum(getattr(masks, f"{k}_share") for k in on)
    teacher = crops.n_global * forward(crops.global_px) + (crops.n_global + masked) * row
    student = crops.n_global * forward(crops.global_px) + crops.n_local * forward(crops.local_px)
    student += (crops.n_global + crops.n_local + masked) * row
    return teacher + 3 * student


def measure_with_data(words: Sequence[str], iterations: int, workers: int) -> dict[str, Any]:
    """Images/s of the method with real JPEG files through each data path, beside the same loop on synthetic
    pixels.

    Args:
        words: ``key=value`` of the config.
        iterations: the number that counts, after :data:`WARM_UP` others.
        workers: decoding processes.
    """
    found: dict[str, Any] = {"workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        of_all = [f"data.root={folder}", f"data.workers={workers}", "optim.epoch_iters=1000", *words]
        for path in ("synthetic", "cpu", "device"):
            own = [] if path == "synthetic" else [f"data.path={path}"]
            rate = loop_rate(load_config(None, of_all + own), iterations, not own)
            found[f"{path}_img_per_s"] = round(rate, 2)
            found[f"{path}_over_synthetic"] = round(rate / found["synthetic_img_per_s"], 3)
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
        pinned = trainer.device.type == "cuda"
        loader = build_loader(config, build_dataset(config), 0, last, pin_memory=pinned)
    started = 0.0
    for it, (micro_batches, _, _) in enumerate(by_iteration(loader, 1)):
        if it == first:
            settle(trainer.device)
            started = time.perf_counter()
        trainer.step(micro_batches)
    settle(trainer.device)
    n_images = (last - first) * config.optim.batch_size * distributed.world_size()
    return n_images / (time.perf_counter() - started)
