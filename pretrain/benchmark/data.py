"""How fast one core makes training samples, against decoding alone and against the usual torchvision and PIL
composition.

All contenders read the same JPEG files of about 500 x 375 px, ImageNet's usual size, cut from real
photographs. They take turns in one process on one thread. Times are processor times, and ratios are taken
within a round, so that other load hardly changes them. No figure includes handing batches to the trainer's
process, a copy in shared memory; it is the same for all contenders.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from pretrain.benchmark.turns import Work
from pretrain.config import load_config
from pretrain.data.loader import Collate, build_dataset, keep_memory
from pretrain.data.toy import photographs
from pretrain.device import choose_device
from pretrain.views.pixels import MEAN, STD

SIZE_PX = (500, 375)
QUALITY = 90


def measure(rounds: int = 5, batch: int = 8, device: str = "cpu", images_a_turn: int = 24) -> dict[str, Any]:
    """Images a second of each way to make the default recipe's views, 2 x 224 px and 8 x 96 px, and their
    ratios.

    torch and OpenCV are left on one thread.

    Args:
        rounds: turns of each contender; figures are medians over them.
        batch: images of a batch of the device path's crops, for its own rate; 64 is usual on a GPU.
        device: where these are made.
        images_a_turn: images that a turn makes.

    Returns:
        ``*_img_per_s`` for ``decode``, ``torchvision``, ``cpu`` (samples of the CPU path), ``device_worker``
        (a worker's part of the device path: decoding, draws, collation) and ``device_render`` (its crops,
        batched on ``device``; by the clock);
        ``cpu_ratio``: CPU path over torchvision; ``device_worker_ratio``: time of a worker over that of
        decoding.
    """
    where = choose_device(device)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_memory()  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        seconds = take_turns(build_contenders(folder, images_a_turn), rounds, images_a_turn)
        rendered = render_rate(folder, where, batch, rounds)
    rates = {name: 1 / median(times) for name, times in seconds.items()} | {"device_render": rendered}
    found: dict[str, Any] = {f"{name}_img_per_s": round(rate, 1) for name, rate in rates.items()}
    pairs = {"cpu_ratio": ("torchvision", "cpu"), "device_worker_ratio": ("device_worker", "decode")}
    for name, (a, b) in pairs.items():
        found[name] = round(median(x / y for x, y in zip(seconds[a], seconds[b])), 3)
    found |= {"device_render_on": str(where), "rounds": rounds, "images_a_turn": images_a_turn}
    return found | {"images": f"{SIZE_PX[0]} x {SIZE_PX[1]} JPEG, quality {QUALITY}"}


def write_photographs(folder: Path) -> None:
    """The installed packages' photographs, cut and scaled to ``SIZE_PX``, as JPEG files."""
    width, height = SIZE_PX
    for name, path in photographs().items():
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        assert image is not None, path
        scale = max(width / image.shape[1], height / image.shape[0])
        size = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{name}.jpg"), scaled[:height, :width], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def config_of(folder: str, path: str, batch_size: int) -> Any:
    """The default recipe on the files of a folder, through one of the data paths."""
    words = [f"data.root={folder}", f"data.path={path}", f"optim.batch_size={batch_size}"]
    return load_config(None, words)


def build_contenders(folder: str, n: int) -> dict[str, Work]:
    """One turn of each contender: the same ``n`` images; torchvision draws anew each time."""
    configs = [config_of(folder, path, n) for path in ("cpu", "device")]
    cpu, device = map(build_dataset, configs)
    collate, composition = Collate(device.rules, n, 0), torchvision_views(configs[0])
    files = sorted(Path(folder).iterdir())
    chosen = [files[cpu.order.image(i)] for i in range(n)]

    def usual(path: Path) -> list[Tensor]:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        return [view(pixels) for view in composition]

    return {
        "decode": lambda: [cpu.read(i) for i in range(n)],
        "torchvision": lambda: [usual(path) for path in chosen],
        "cpu": lambda: [cpu[i] for i in range(n)],
        "device_worker": lambda: collate([device[i] for i in range(n)]),
    }


def torchvision_views(config: Any) -> list[Callable[[Image.Image], Tensor]]:
    """The usual composition of DINOv2 on PIL images, one a view, with this config's numbers."""
    crops, color = config.crops, config.color

    def view(size: int, scale: tuple[float, float], kind: int) -> Callable[[Image.Image], Tensor]:
        cubic = transforms.InterpolationMode.BICUBIC
        blur = transforms.GaussianBlur(color.blur_kernel_px, color.blur_sigma)
        steps = [
            transforms.RandomResizedCrop(size, scale, crops.ratio, interpolation=cubic),
            transforms.RandomHorizontalFlip(crops.flip_p),
            transforms.RandomApply([transforms.ColorJitter(*color.jitter)], color.jitter_p),
            transforms.RandomGrayscale(color.grayscale_p),
            transforms.RandomApply([blur], color.blur_p[kind]),
            transforms.RandomSolarize(color.solarize_threshold, color.solarize_p[kind]),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
        return transforms.Compose(steps)

    of_globals = [view(crops.global_px, crops.global_scale, min(i, 1)) for i in range(crops.n_global)]
    return of_globals + [view(crops.local_px, crops.local_scale, 2)] * crops.n_local


def take_turns(contenders: dict[str, Work], rounds: int, n: int) -> dict[str, list[float]]:
    """Processor seconds an image, for each contender and round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, turn in contenders.items():
            started = time.process_time()
            turn()
            seconds[name].append((time.process_time() - started) / n)
    return {name: times[1:] for name, times in seconds.items()}


def render_rate(folder: str, device: torch.device, batch_size: int, rounds: int) -> float:
    """Images a second of the device path's crops on ``device``, with the copy to it, by the clock; median
    over the rounds."""
    dataset = build_dataset(config_of(folder, "device", batch_size))
    batch, _ = Collate(dataset.rules, batch_size, 0)([dataset[i] for i in range(batch_size)])
    if device.type == "cuda":
        batch = batch.pin_memory()
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        float(batch.to(device).local_crops[-1, 0, 0, 0])  # reading a value waits for the device
        times.append(time.perf_counter() - started)
    return batch_size / median(times[1:])
